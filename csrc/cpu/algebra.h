// The algebra around the tiles, kernels/algebra.py in a few passes over blocks of pixels: the scales before, and the
// correction of the gradient after. PyTorch's own operations would each start and end all threads.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "epilogue.h"

namespace srpkd::cpu {

// alpha (B, N) of student and teacher, and the student's M (B, C_s, C_s); M is undefined for cosine. All in the type
// that sums are kept in. A pixel whose norm is at most eps has alpha 0.
std::tuple<at::Tensor, at::Tensor, at::Tensor> scales(const at::Tensor& student, const at::Tensor& teacher,
                                                      Normalize normalize, double eps);

// U (B, N, C_s) becomes the gradient of the mean over all pairs. h, alpha (B, N) and moment (B, C_s, C_s) are those of
// the tiles and of `scales`, undefined where normalize does without.
void correct(const at::Tensor& U, const at::Tensor& h, const at::Tensor& alpha, const at::Tensor& moment,
             const at::Tensor& student, Normalize normalize);

}  // namespace srpkd::cpu
