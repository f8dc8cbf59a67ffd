// The primitive on the CPU: csrc/bindings.cpp makes an operator of it.
#pragma once

#include <ATen/core/Tensor.h>

#include "epilogue.h"

namespace srpkd::cpu {

struct Options {
  Normalize normalize;
  Distance distance;
  double delta;
  int64_t tile;  // pixels in a block, 0: as the cache suggests
};

// Raw features (B, N, C_s), (B, N, C_t) of one dtype and any strides; alpha (B, N), undefined where normalize is none.
// Adds to loss (B,) in double, and to U (B, N, C_s), h (B, N) in the accumulator's dtype where they are defined.
void relation_tiles(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& alpha_s,
                    const at::Tensor& alpha_t, const Options& options, const at::Tensor& loss, const at::Tensor& U,
                    const at::Tensor& h);

// Bytes of second-level cache that one core has.
int64_t cache_bytes();

// Pixels in a block where the caller leaves them open.
int64_t tile_size(int64_t images, int64_t pixels, int64_t element_bytes, int64_t threads);

}  // namespace srpkd::cpu
