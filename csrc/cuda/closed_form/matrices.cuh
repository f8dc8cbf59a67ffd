// Sums of the partial moments over the ranges of pixels, and the matrices of 16-bit terms that they become. Free of
// torch.
#pragma once

#include "../algebra/moments.cuh"
#include "arguments.h"

namespace srpkd::cuda::closed_form {

// Writes the terms of two adjacent elements of a matrix, of which `to` is the first term's place.
template <class Term>
SRPKD_DEVICE void store_matrix_terms(uint16_t* to, float first, float second) {
  for (int term = 0; term < algebra::TERMS_OF_MATRIX<Term>; ++term) {
    const uint32_t pair = pack<Term>(first, second);
    store_global(reinterpret_cast<uint32_t*>(to + term * BLOCK * BLOCK), pair);
    first -= as_float(widen<Term, false>(pair)), second -= as_float(widen<Term, true>(pair));
  }
}

// Writes a tile of a symmetric matrix in terms, and its mirror image. That passes through shared memory: its lines are
// the columns of the tile, whose elements would be written one by one.
template <int THREADS, class Term>
struct SymmetricTile {
  static constexpr int STRIDE = BLOCK + 1, BYTES = BLOCK * STRIDE * 4;  // floats; of the buffer
  uint16_t* matrix;
  algebra::TileOfMoment at;
  int blocks;
  Address buffer;

  SRPKD_DEVICE Address place(int row, int column) const { return buffer + (row * STRIDE + column) * 4; }

  // Writes two adjacent elements.
  SRPKD_DEVICE void store(int row, int column, float first, float second) const {
    store_matrix_terms<Term>(matrix + algebra::panel_of_terms(at.row, at.column, blocks) + row * BLOCK + column, first,
                             second);
    if (at.row == at.column) return;
    store_shared(place(row, column), first);
    store_shared(place(row, column + 1), second);
  }

  // Writes the mirror image, after a barrier.
  SRPKD_DEVICE void store_mirrored() const {
    if (at.row == at.column) return;
    uint16_t* const to = matrix + algebra::panel_of_terms(at.column, at.row, blocks);
    for (int i = thread_index() * 2; i < BLOCK * BLOCK; i += THREADS * 2) {
      const int row = i / BLOCK, column = i % BLOCK;
      store_matrix_terms<Term>(to + i, load_shared<float>(place(column, row)),
                               load_shared<float>(place(column + 1, row)));
    }
  }
};

// The sums over the splits of a tile of BLOCK x BLOCK partial sums. A thread has pairs of adjacent elements.
template <int THREADS>
struct TileSums {
  static constexpr int PAIRS = BLOCK * BLOCK / 2 / THREADS;
  using Pair = unsigned long long;
  algebra::CompensatedSum sum[PAIRS][2];

  // All loads of a split are under way together. Stores of results between them would separate them.
  template <class Load>
  SRPKD_DEVICE TileSums(const float* partial, int splits, Load load) {
#pragma unroll 1
    for (int split = 0; split < splits; ++split) {
      Pair part[PAIRS];
#pragma unroll
      for (int n = 0; n < PAIRS; ++n)
        part[n] = load(reinterpret_cast<const Pair*>(partial + split * BLOCK * BLOCK + place(n)));
#pragma unroll
      for (int n = 0; n < PAIRS; ++n) {
        sum[n][0].add(as_float(static_cast<uint32_t>(part[n])));
        sum[n][1].add(as_float(static_cast<uint32_t>(part[n] >> 32)));
      }
    }
  }

  static SRPKD_DEVICE int place(int n) { return (n * THREADS + thread_index()) * 2; }

  // Calls f(row, column, sum, sum of the next column) for every pair.
  template <class F>
  SRPKD_DEVICE void for_each(F f) const {
#pragma unroll
    for (int n = 0; n < PAIRS; ++n) f(place(n) / BLOCK, place(n) % BLOCK, sum[n][0].value(), sum[n][1].value());
  }
};

}  // namespace srpkd::cuda::closed_form
