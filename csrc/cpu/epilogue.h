// The elementwise part of one tile: from its two Gram matrices to its part of the loss and of h, and to its tile of K.
// Free of torch. Compiled once per instruction set, by epilogue_*.cpp.
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
  T* gram_s;                     // (rows, stride) G_s, overwritten with K
  const T* gram_t;               // (rows, stride) G_t
  const T *row_s, *row_t;        // (rows,) alpha of the rows, not read if normalize is none
  const T *column_s, *column_t;  // (stride,) alpha of the columns, not read if normalize is none
  T *h_row, *h_column;           // out: (rows,), (stride,) this tile's part of h
  T delta;
};

struct Kind {
  Normalize normalize;
  Distance distance;
  bool need_grad;
  bool mirrored;  // the tile also represents its mirror image
};

// Returns the sum of rho(D) over the tile, and over its mirror image if kind.mirrored.
template <typename T>
using Epilogue = double (*)(const TileOperands<T>&, Kind);

namespace baseline {
double epilogue(const TileOperands<float>&, Kind);
double epilogue(const TileOperands<double>&, Kind);
}  // namespace baseline

#if defined(__x86_64__)
#define SRPKD_HAS_AVX2
namespace avx2 {
double epilogue(const TileOperands<float>&, Kind);
double epilogue(const TileOperands<double>&, Kind);
}  // namespace avx2
#endif

}  // namespace srpkd
