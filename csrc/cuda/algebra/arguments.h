// The arguments of the kernels around the relation tiles, and the geometry of their work. Compiles without nvcc.
#pragma once

#include "../sm80/config.h"

namespace srpkd::cuda::algebra {

using sm80::Features;

constexpr int BLOCK = 64;                       // channels or pixels in one dimension of a panel
constexpr int PANEL_BYTES = BLOCK * BLOCK * 2;  // of one bfloat16 term
constexpr int MATRIX_TERMS = 3;                 // bfloat16 terms of an element of M: 24 bits
constexpr int STRIP = 16;                       // rows of a tile that are finished at once: a sector of a mirrored line
constexpr int STRIPS = BLOCK / STRIP;           // of a tile
constexpr int MAX_SPLITS = 16;                  // of the pixels in a sum over them
constexpr int MAX_WEIGHTED_SPLITS = 12;         // of M_w where its kernel adds them too: it has registers for so many

SRPKD_HOST_DEVICE constexpr int blocks_of(int channels) { return static_cast<int>(ceil_div(channels, BLOCK)); }
SRPKD_HOST_DEVICE constexpr int padded(int channels) { return blocks_of(channels) * BLOCK; }

// A moment is symmetric: only its tiles of BLOCK x BLOCK channels on and above the diagonal are computed, row by row.
SRPKD_HOST_DEVICE constexpr int tiles_of(int channels) { return tile_count(blocks_of(channels)); }

struct TileOfMoment {
  int row, column;
};
SRPKD_HOST_DEVICE constexpr TileOfMoment tile_of_moment(int tile, int blocks) {
  int row = 0;
  for (; tile >= blocks - row; ++row) tile -= blocks - row;
  return {row, row + tile};
}

// A matrix (C, C) in bfloat16 terms: panels (row block, column block, term) of BLOCK x BLOCK elements, padded by zeros.
SRPKD_HOST_DEVICE constexpr int64_t elements_of_terms(int channels) {
  return int64_t{padded(channels)} * padded(channels) * MATRIX_TERMS;
}
SRPKD_HOST_DEVICE constexpr int64_t panel_of_terms(int row, int column, int blocks) {
  return (int64_t{row} * blocks + column) * MATRIX_TERMS * BLOCK * BLOCK;
}

// Sums over all pixels of an image, as partial sums over `splits` ranges of `split_pixels` pixels.
struct Ranges {
  int splits, split_pixels;
};

// Partial moments. The kernel subtracts a shift near the mean from each channel: then sums over pixels that share a
// large mean keep the digits that differ.
struct MomentArguments {
  Features features[2];
  int images, pixels;
  Ranges ranges;
  float* partial;  // (images, tiles of both networks, splits, BLOCK, BLOCK)
  float* sums;     // (images, splits, channels): sums of the shifted features; channels of both networks, padded
  float* squares;  // the same, of their squares
  float* shift;    // (images, channels)
};

// What the last kernel of the moments makes of the partial sums, for each image. M = Q^T Q = M' + N m m^T with the mean
// m of the features; both are divided by size^2, a power of two.
struct MomentResults {
  uint16_t* centred[2];  // M' in terms
  uint16_t* whole;       // M of the student in terms
  float* mean;           // (images, channels): m sqrt(N) / size; channels of both networks, padded
  float* size;           // (images, 2)
  int* counters;         // (images, tiles of the student): zeroed for WeightedMoment; null if it does not count
};

struct FinishArguments {
  MomentArguments sums;
  MomentResults results;
};

struct NormArguments {
  Features features[2];
  int images, pixels;
  float eps;
  MomentResults moments;  // this and the next only for "row"
  int resident;           // blocks of 64 channels that stay in shared memory; features with more are read repeatedly
  int slots;              // of panels of M there: 2, or 3 to copy them two steps ahead
  float* alpha[2];        // (images, pixels)
};

// Where the sm80 tiles leave the loss, U and h.
struct SumsOfSplits {
  static constexpr bool PERMUTED = false;  // U is in the order of the features, see U_of
  const double* losses;                    // (images, loss_parts)
  int loss_parts;
  const float* U;  // (splits, images, pixels, channels)
  int64_t U_strides[4];
  const float* h;  // (splits, images, pixels)
  int64_t h_strides[2];
  int splits;
};

// M_w = Q^T diag(w) Q of the student, with w_i = h_i alpha_i^2.
template <class SumsOfTiles>
struct WeightedMomentArguments {
  Features features;
  int images, pixels;
  Ranges ranges;
  SumsOfTiles sums;
  const float* alpha;
  const float* size;   // MomentResults::size
  float* partial;      // (images, tiles, splits, BLOCK, BLOCK)
  uint16_t* weighted;  // M_w in terms
  int* counters;       // (images, tiles): zero; how many ranges are done; null if FinishWeightedMoment adds them
};

template <class SumsOfTiles>
struct GradientArguments {
  Features features;
  int images, pixels;
  Normalize normalize;  // whose norms have a gradient
  SumsOfTiles sums;
  const float* alpha;
  const float* size;         // this and the next two only for "row": MomentResults::size
  const uint16_t* moment;    // MomentResults::whole
  const uint16_t* weighted;  // WeightedMomentArguments::weighted
  void* gradient;  // (images, pixels, channels): bfloat16 for bfloat16 features, else float32; null if not required
  int64_t gradient_strides[3];
  double scale;  // of the loss and the gradient: 1/N^2, for the mean over images also 1/images
  bool per_image;
  int loss_blocks;  // images if per_image, else 1
  float* loss;      // (images,) if per_image, else ()
};

// The product of the gradient and the upstream gradient, element by element in the order of the memory.
struct BackwardArguments {
  const void* gradient;  // bfloat16 if narrow, else float32; both pointers are multiples of 16 bytes
  bool narrow;
  void* result;
  const float* grad_loss;
  int64_t count;           // elements
  int64_t image_elements;  // that share an element of grad_loss
  int64_t grad_loss_stride;
};

}  // namespace srpkd::cuda::algebra
