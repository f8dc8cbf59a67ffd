// srpkd::relation_loss_backward on an NVIDIA GPU, in one launch.
#include "../common/backward.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "algebra/launch.h"

namespace srpkd::cuda {
namespace {

using at::Tensor;

bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// Returns whether the kernel covers a product: that of the loss's own gradient, with one factor for each image or for
// all. `result` has no gaps, so neither has a gradient with the same strides.
bool covered(const Tensor& gradient, const Tensor& grad_loss, const Tensor& result) {
  const auto narrow_or_float = [](const Tensor& x) {
    return x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16;
  };
  if (!narrow_or_float(gradient) || !(narrow_or_float(result) || result.scalar_type() == at::kHalf)) return false;
  if (grad_loss.scalar_type() != at::kFloat || grad_loss.device() != gradient.device() || grad_loss.dim() > 1)
    return false;
  const int64_t images = gradient.size(0), count = gradient.numel();
  const bool in_order = grad_loss.numel() == 1 || (grad_loss.numel() == images && gradient.stride(0) * images == count);
  return in_order && count && result.strides() == gradient.strides() && aligned(gradient.const_data_ptr()) &&
         aligned(result.const_data_ptr());
}

Tensor relation_loss_backward(const Tensor& gradient, const Tensor& grad_loss, at::ScalarType dtype) {
  const c10::cuda::CUDAGuard guard(gradient.device());
  Tensor result = at::empty_like(gradient, gradient.options().dtype(dtype));
  if (!covered(gradient, grad_loss, result)) {
    multiply_into(result, gradient, grad_loss);
    return result;
  }
  const bool single = grad_loss.numel() == 1;
  const algebra::BackwardArguments p{gradient.const_data_ptr(),
                                     gradient.scalar_type() == at::kBFloat16,
                                     result.mutable_data_ptr(),
                                     grad_loss.const_data_ptr<float>(),
                                     gradient.numel(),
                                     single ? gradient.numel() : gradient.stride(0),
                                     single ? 0 : grad_loss.stride(0)};
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  C10_CUDA_CHECK(dtype == at::kFloat      ? algebra::backward<float>(p, stream)
                 : dtype == at::kBFloat16 ? algebra::backward<BFloat16>(p, stream)
                                          : algebra::backward<Half>(p, stream));
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(srpkd, CUDA, m) { m.impl("relation_loss_backward", relation_loss_backward); }

}  // namespace srpkd::cuda
