// What becomes of one tile of the two Gram matrices: its share of the loss and of h, and the tile of K.
// Free of torch. Compiled once for every instruction set, by epilogue_*.cpp.
#pragma once

#include <cstdint>

namespace srpkd {

enum class Normalize { row, cosine, none };
enum class Distance { l1, l2, huber };

// Rows of a tile, and what belongs to its columns, have a multiple of this many elements, the last ones zero, and start
// at a multiple of it: whole vectors are read and written.
constexpr int64_t LINE = 16;

// A tile of rows i and columns j.
template <typename T>
struct TileOperands {
  int64_t rows, stride;
  T* gram_s;                     // (rows, stride) G_s; K takes its place
  const T* gram_t;               // (rows, stride) G_t
  const T *row_s, *row_t;        // alpha of the rows, not read where normalize is none
  const T *column_s, *column_t;  // alpha of the columns, likewise
  T *h_row, *h_column;           // out: this tile's share of h
  T delta;
};

struct Kind {
  Normalize normalize;
  Distance distance;
  bool need_grad;
  bool mirrored;  // the tile stands for its mirror image too
};

// The sum of rho(D) over the tile, and over its mirror image if it stands for that too.
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
