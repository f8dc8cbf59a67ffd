// The whole relation loss on the CPU, which csrc/bindings.cpp registers as an operator.
#pragma once

#include <ATen/core/Tensor.h>

#include "../common/arguments.h"

namespace srpkd::cpu {

// Takes raw features (B, N, C_s), (B, N, C_t) of one dtype and any strides. Returns the loss and the gradient of
// srpkd::relation_loss_forward.
LossAndGradient relation_loss(const at::Tensor& student, const at::Tensor& teacher, const Relation& relation,
                              Reduction reduction, bool need_grad);

// The same over sampled pairs: the loss of each image (B,), and its gradient. For `columns` (B, sets, m) and `tile` see
// indexed_tiles(); every pair counts as (i, j) and as (j, i).
LossAndGradient sampled_loss(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& columns,
                             const Relation& relation, bool need_grad, int64_t tile);

}  // namespace srpkd::cpu
