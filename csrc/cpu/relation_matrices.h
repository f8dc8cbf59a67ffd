// The whole loss of small images, from their relation matrices.
#pragma once

#include <ATen/core/Tensor.h>

#include "../common/relation.h"

namespace srpkd::cpu {

// Takes raw features (B, N, C_s), (B, N, C_t) of one dtype, not float16, and any strides. Writes the mean of rho(D) of
// each image to loss (B,) in double, and `gradient_scale` times its gradient to `gradient`, of the student's shape, if
// it is defined.
void relation_matrices(const at::Tensor& student, const at::Tensor& teacher, const Relation& relation,
                       double gradient_scale, double* loss, const at::Tensor& gradient);

}  // namespace srpkd::cpu
