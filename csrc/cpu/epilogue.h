// The elementwise part of one tile: from its two Gram matrices to its part of the loss and of h, and to its tile of K.
// Free of torch. Compiled once per instruction set, by epilogue_*.cpp; kernels.h chooses between them.
#pragma once

#include <cstdint>

#include "../common/relation.h"

namespace srpkd {

// Elements in a line. The rows of a tile, and the vectors for its columns, start at a multiple of LINE and are padded
// with zeros to a multiple of LINE, because the epilogue reads and writes whole vectors.
constexpr int64_t LINE = 16;

// A tile of rows i and columns j.
template <typename T>
struct TileOperands {
  int64_t rows, stride;
  const T *gram_s, *gram_t;      // (rows, stride) G_s and G_t
  T* K;                          // out: (rows, stride), may be gram_s or gram_t
  const T *row_s, *row_t;        // (rows,) alpha of the rows, not read if normalize is none
  const T *column_s, *column_t;  // (stride,) alpha of the columns, not read if normalize is none
  T *h_row, *h_column;           // out: (rows,), (stride,) this tile's part of h
  T delta;
  int64_t diagonal;  // the column of row 0 that is on the diagonal, if the tile is not mirrored
};

struct Kind {
  Normalize normalize;
  Distance distance;
  bool need_grad;
  bool mirrored;  // the tile also represents its mirror image
  bool rectify;
};

template <typename T>
struct Kernels {
  // Returns the sum of rho(D) over the tile, and over its mirror image if kind.mirrored.
  double (*epilogue)(const TileOperands<T>&, Kind);
  // Returns the sum of squares of a row of `stride` elements, in double: it neither overflows nor underflows.
  double (*sum_of_squares)(const T* row, int64_t stride);
  // Subtracts the derivative of row norms from K: (w_i + w_j) G_ij with w = h alpha^2.
  void (*subtract_norm_terms)(const TileOperands<T>&, const T* h_columns);
};

#define SRPKD_DECLARE_KERNELS(target)                                          \
  namespace target {                                                           \
  double epilogue(const TileOperands<float>&, Kind);                           \
  double epilogue(const TileOperands<double>&, Kind);                          \
  double sum_of_squares(const float*, int64_t);                                \
  double sum_of_squares(const double*, int64_t);                               \
  void subtract_norm_terms(const TileOperands<float>&, const float*);          \
  void subtract_norm_terms(const TileOperands<double>&, const double*);        \
  template <typename T>                                                        \
  constexpr Kernels<T> kernels{epilogue, sum_of_squares, subtract_norm_terms}; \
  }

SRPKD_DECLARE_KERNELS(baseline)
#if defined(__x86_64__)
SRPKD_DECLARE_KERNELS(avx2)
SRPKD_DECLARE_KERNELS(avx512)
#endif

}  // namespace srpkd
