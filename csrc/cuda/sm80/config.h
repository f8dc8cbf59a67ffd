// What host and device share: the kernels' arguments and configurations, and the partition of the work. Compiles
// without nvcc.
#pragma once

#include <type_traits>

#include "../types.h"

namespace srpkd::cuda::sm80 {

constexpr int TILE = 64;              // pixels in a block
constexpr int LINE = 128;             // bytes, which span all banks of shared memory
constexpr int PANEL = TILE * LINE;    // bytes: TILE pixels with LINE bytes of channels each
constexpr int SCALES = 2 * TILE * 4;  // bytes: alpha_s, then alpha_t, of TILE pixels
constexpr int PREFETCH = 3;           // panels in flight while one is processed

// Raw features of a batch, with either pixels or channels adjacent in memory; strides in elements.
struct Features {
  const void* data;
  const float* alpha;  // (images, pixels), null if it is 1
  int64_t image_stride;
  int64_t line_stride;  // between channels if pixels are adjacent, else between pixels
  int channels;
  int copy_bytes;  // 16, 4 or 2: data and strides are multiples of this
};

struct Params {
  Features features[2];  // of the teacher, of the student
  int panels[2];         // of the teacher, of the student
  int images, pixels;
  int blocks;          // of TILE pixels in an image
  int splits;          // of the columns; each has its own loss, U and h
  int channel_splits;  // of U's channels
  int resident;        // row panels that stay in shared memory; the others pass through the ring with the column panels
  Distance distance;
  float delta;
  bool row;            // A_ij = G_ij alpha_i, else G_ij alpha_i alpha_j
  bool zero_diagonal;  // D_ii = 0
  bool rectify;        // max(A_ij, 0) instead of A_ij: other kernels
  double* loss;        // (images, splits, blocks)
  float* U;            // (splits, images, pixels, channels), with these strides
  int64_t U_strides[4];
  float* h;  // (splits, images, pixels), null if not computed
};

// The template arguments of one kernel: precision and layout of the features, the number of channels of U that a thread
// block computes (0: no gradient), and whether relations are rectified.
template <Precision PRECISION_, bool PIXELS_ADJACENT_, int U_CHANNELS_, bool RECTIFY_ = false>
struct Config {
  static constexpr Precision PRECISION = PRECISION_;
  static constexpr bool PIXELS_ADJACENT = PIXELS_ADJACENT_;
  static constexpr int U_CHANNELS = U_CHANNELS_;
  static constexpr bool GRAD = U_CHANNELS > 0;
  static constexpr bool RECTIFY = RECTIFY_;

  using Element = std::conditional_t<PRECISION == Precision::bf16, BFloat16,
                                     std::conditional_t<PRECISION == Precision::fp16, Half, float>>;
  static constexpr int SIZE = sizeof(Element);
  static constexpr bool NARROW = SIZE == 2;
  static constexpr int FEATURE_TERMS = PRECISION == Precision::tf32x3 ? 2 : 1;
  static constexpr int K_TERMS = PRECISION == Precision::bf16 || PRECISION == Precision::tf32 ? 1 : 2;

  // A warp computes 16 M_TILES rows and 8 N_TILES columns of a tile, and the contribution of its columns to U.
  static constexpr int WARPS_M = NARROW && K_TERMS == 1 && U_CHANNELS <= 64 ? 2 : 4;
  static constexpr int WARPS_N = NARROW && WARPS_M == 4 ? 1 : 2;
  static constexpr int THREADS = 32 * WARPS_M * WARPS_N;
  // Thread blocks per multiprocessor that its registers must allow: the most that compile without spills.
  static constexpr int MIN_BLOCKS = NARROW ? (GRAD ? 2 : 3) : !GRAD || (K_TERMS == 1 && U_CHANNELS <= 64) ? 2 : 1;
  static constexpr int M_TILES = TILE / 16 / WARPS_M, N_TILES = TILE / 8 / WARPS_N;

  static constexpr int PANEL_CHANNELS = LINE / SIZE;
  static constexpr int PANEL_LINES = PIXELS_ADJACENT ? PANEL_CHANNELS : TILE;  // each one channel or one pixel
  static constexpr int U_PANELS = U_CHANNELS / PANEL_CHANNELS;
  static constexpr int SLOTS = PREFETCH + (GRAD ? U_PANELS : 1);  // the panels of U stay until its product is done
};

// A slot of the ring holds a column panel, alpha of the columns, and a row panel if not all row panels are resident.
SRPKD_HOST_DEVICE constexpr int slot_bytes(bool with_rows) { return PANEL + SCALES + (with_rows ? PANEL : 0); }

// Returns the size of a thread block's shared memory in bytes.
template <class C>
SRPKD_HOST_DEVICE constexpr int shared_bytes(const Params& p) {
  return p.resident * PANEL + C::SLOTS * slot_bytes(p.resident < p.panels[TEACHER] + p.panels[STUDENT]);
}

// The column blocks that a row block visits in one split: `steps` blocks from `first`, wrapping around. With a gradient
// the splits together visit all blocks. Without, each pair of blocks is visited once: a row block starts at itself and
// visits half of all blocks.
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

}  // namespace srpkd::cuda::sm80
