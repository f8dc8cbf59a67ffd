// The relations of sets of rows to the columns that an index lists: of sampled pixels, or of the pixels of another
// rank.
#pragma once

#include <ATen/core/Tensor.h>

#include "../common/relation.h"

namespace srpkd::cpu {

// Returns a contiguous copy of features (B, N, C) in the dtype of the accumulator, or themselves if they are that.
at::Tensor by_pixel(const at::Tensor& features);

// Features (B, N, C_s), (B, N, C_t) and alpha (B, N) of both, in the dtype of the accumulator and contiguous. The
// alphas are undefined if normalize is none.
struct Pixels {
  at::Tensor student, teacher, alpha_s, alpha_t;
};

// Sums over the pairs of row i and column j of which `index` (B, sets, m) lists j in the set of i: set s has the rows
// s, s + sets, s + 2 sets and so on. Adds to loss (B,) in double, and to U (B, N, C_s) and h (B, N) if they are
// defined. With `mirrored`, rows and columns are the same pixels, and every pair counts as (i, j) and as (j, i). `tile`
// is the number of pixels in a block; 0: chosen by tile_size().
void indexed_tiles(const Pixels& rows, const Pixels& columns, const at::Tensor& index, const Relation& relation,
                   bool mirrored, int64_t tile, const at::Tensor& loss, const at::Tensor& U, const at::Tensor& h);

}  // namespace srpkd::cpu
