// The Gram matrix of one tile, as the epilogue reads it.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/mm_cpu_dispatch.h>

#include <algorithm>

namespace srpkd::cpu {

// Computes the product left right^T into a workspace (rows, stride), with zeros after the last column, and returns a
// view of the product (rows, columns).
template <typename T>
at::Tensor gram(const at::Tensor& workspace, const at::Tensor& left, const at::Tensor& right, int64_t stride) {
  const int64_t rows = left.size(0), columns = right.size(0);
  at::Tensor product = workspace.as_strided({rows, columns}, {stride, 1});
  at::cpu::mm_out(product, left, right.t());
  T* const data = workspace.mutable_data_ptr<T>();
  for (int64_t i = 0; columns < stride && i < rows; ++i)
    std::fill(data + i * stride + columns, data + (i + 1) * stride, T(0));
  return product;
}

}  // namespace srpkd::cpu
