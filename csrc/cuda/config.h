// What host and device agree on: the arguments of the kernels, their configurations, and who does which part. It needs
// neither a GPU nor its compiler.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/index.h"

namespace srpkd::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

SRPKD_HOST_DEVICE constexpr int minimum(int a, int b) { return a < b ? a : b; }

enum class Distance : int { l1, l2, huber };
enum class Precision : int { bf16, fp16, tf32, tf32x3 };  // tf32x3: a float is the sum of two tf32, and three products

constexpr int TILE = 64;              // pixels in a block
constexpr int LINE = 128;             // bytes: every bank of shared memory once
constexpr int PANEL = TILE * LINE;    // bytes: 64 pixels of 128 bytes of channels
constexpr int SCALES = 2 * TILE * 4;  // bytes: alpha_s, then alpha_t, of 64 pixels
constexpr int PREFETCH = 3;           // panels on their way while one is worked on

// Raw features of a batch in which either the pixels or the channels are adjacent; strides in elements.
struct Features {
  const void* data;
  const float* alpha;  // (images, pixels), null where it is 1
  int64_t image_stride;
  int64_t line_stride;  // from channel to channel if pixels are adjacent, else from pixel to pixel
  int channels;
  int copy_bytes;  // 16, 4 or 2: data and its strides are multiples of this
};

struct Params {
  Features features[2];  // the teacher's, the student's
  int panels[2];         // that they have
  int images, pixels;
  int blocks;          // of 64 pixels in an image
  int splits;          // of the columns, each with its own loss, U and h
  int channel_splits;  // of U's channels
  int resident;        // panels of i that stay in shared memory; the others come through the ring with those of j
  Distance distance;
  float delta;
  bool row;            // A_ij = G_ij alpha_i, else G_ij alpha_i alpha_j
  bool tied_diagonal;  // D_ii = 0
  double* loss;        // (images, splits, blocks)
  float* U;            // (splits, images, pixels, channels), with these strides
  int64_t U_strides[4];
  float* h;  // (splits, images, pixels), null where it is not wanted
};

// One kernel: the features' precision and layout, and how many channels of U a block of threads owns (0: no gradient).
template <Precision PRECISION_, bool PIXELS_ADJACENT_, int U_CHANNELS_>
struct Config {
  static constexpr Precision PRECISION = PRECISION_;
  static constexpr bool PIXELS_ADJACENT = PIXELS_ADJACENT_;
  static constexpr int U_CHANNELS = U_CHANNELS_;
  static constexpr bool GRAD = U_CHANNELS > 0;

  using Element = std::conditional_t<PRECISION == Precision::bf16, BFloat16,
                                     std::conditional_t<PRECISION == Precision::fp16, Half, float>>;
  static constexpr int SIZE = sizeof(Element);
  static constexpr bool NARROW = SIZE == 2;
  static constexpr int FEATURE_TERMS = PRECISION == Precision::tf32x3 ? 2 : 1;
  static constexpr int K_TERMS = PRECISION == Precision::bf16 || PRECISION == Precision::tf32 ? 1 : 2;

  // A warp owns 16 M_TILES rows and 8 N_TILES columns of a tile, and adds its columns' share to U.
  static constexpr int WARPS_M = NARROW && K_TERMS == 1 && U_CHANNELS <= 64 ? 2 : 4;
  static constexpr int WARPS_N = NARROW && WARPS_M == 4 ? 1 : 2;
  static constexpr int THREADS = 32 * WARPS_M * WARPS_N;
  // On one multiprocessor, as far as its registers go: as many as the compiler manages without spills.
  static constexpr int MIN_BLOCKS = NARROW ? (GRAD ? 2 : 3) : !GRAD || (K_TERMS == 1 && U_CHANNELS <= 64) ? 2 : 1;
  static constexpr int M_TILES = TILE / 16 / WARPS_M, N_TILES = TILE / 8 / WARPS_N;

  static constexpr int PANEL_CHANNELS = LINE / SIZE;
  static constexpr int PANEL_LINES = PIXELS_ADJACENT ? PANEL_CHANNELS : TILE;  // each a channel, or a pixel
  static constexpr int U_PANELS = U_CHANNELS / PANEL_CHANNELS;
  static constexpr int SLOTS = PREFETCH + (GRAD ? U_PANELS : 1);  // U's panels stay until its product is done
};

// What the ring's slots hold: a panel of j, alpha of j, and a panel of i where those are not resident.
SRPKD_HOST_DEVICE constexpr int slot_bytes(bool with_rows) { return PANEL + SCALES + (with_rows ? PANEL : 0); }

// How many bytes of shared memory a kernel takes.
template <class C>
SRPKD_HOST_DEVICE constexpr int shared_bytes(const Params& p) {
  return p.resident * PANEL + C::SLOTS * slot_bytes(p.resident < p.panels[0] + p.panels[1]);
}

// The blocks of columns that a block of rows meets in one split, from `first` on and around. With a gradient they are
// all; without, as many as give each pair of blocks once: from its own on, half of the way around.
struct Walk {
  int first, steps;
};
SRPKD_HOST_DEVICE constexpr Walk walk_of(int row_block, int blocks, bool grad, int split, int splits) {
  const int count = grad ? blocks : (blocks + 1) / 2 + (blocks % 2 == 0 && row_block < blocks / 2);
  const int begin = static_cast<int>(int64_t{count} * split / splits);
  const int end = static_cast<int>(int64_t{count} * (split + 1) / splits);
  const int first = grad ? begin : row_block + begin;
  return {first < blocks ? first : first - blocks, end - begin};
}

}  // namespace srpkd::cuda
