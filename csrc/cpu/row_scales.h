// The scales alpha = 1 / ||G_i|| of row normalisation, from moments, without G.
#pragma once

#include <ATen/core/Tensor.h>

namespace srpkd::cpu {

struct RowScales {
  at::Tensor alpha, moment;  // (B, N), and M = Q^T Q (B, C, C), in the dtype of sums
};

// Takes features (B, N, C) of any dtype but float16, and any strides.
RowScales row_scales(const at::Tensor& features, double eps);

// Returns the largest power of two below the root of M's largest element, (B, 1, 1), for moments (B, C, C).
at::Tensor power_of_two_scale(const at::Tensor& moment);

// Returns alpha = 1 / norm: 0 for a zero-norm pixel, NaN if the norm is NaN or overflows.
at::Tensor inverse(const at::Tensor& norm, double eps);

}  // namespace srpkd::cpu
