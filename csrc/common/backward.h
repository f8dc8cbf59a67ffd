// The product of the gradient and the upstream gradient, for any device and dtype: an elementwise operation of PyTorch.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>

namespace srpkd {

// result, gradient (B, N, C), grad_loss () or (B,).
inline void multiply_into(at::Tensor& result, const at::Tensor& gradient, const at::Tensor& grad_loss) {
  // on a GPU, a grad_loss without dimensions would be rounded to the dtype of the gradient
  const bool view = grad_loss.dim() || gradient.is_cuda();
  at::mul_out(result, gradient, view ? grad_loss.view({-1, 1, 1}) : grad_loss);
}

inline at::Tensor multiply(const at::Tensor& gradient, const at::Tensor& grad_loss, at::ScalarType dtype) {
  at::Tensor result = at::empty_like(gradient, gradient.options().dtype(dtype));
  multiply_into(result, gradient, grad_loss);
  return result;
}

}  // namespace srpkd
