// The primitive on the CPU, which csrc/bindings.cpp registers as an operator.
#pragma once

#include <ATen/core/Tensor.h>

#include "../common/relation.h"

namespace srpkd::cpu {

// Takes raw features (B, N, C_s), (B, N, C_t) of one dtype, not float16, and any strides, and alpha (B, N), undefined
// if normalize is none. Adds to loss (B,) in double, and to U (B, N, C_s) and h (B, N) in the accumulator's dtype if
// they are defined. `tile` is the number of pixels in a block; 0: chosen by tile_size().
void relation_tiles(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& alpha_s,
                    const at::Tensor& alpha_t, const Relation& relation, int64_t tile, const at::Tensor& loss,
                    const at::Tensor& U, const at::Tensor& h);

// Returns the size of the second-level cache of one core in bytes.
int64_t cache_bytes();

// Returns the number of pixels in a block that suits the cache and the number of threads.
int64_t tile_size(int64_t images, int64_t pixels, int64_t element_bytes, int64_t threads);

}  // namespace srpkd::cpu
