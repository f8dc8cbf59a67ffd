// The matrices (C, C) of moments: the sums of their partial sums over ranges of pixels, in 16-bit terms, of which later
// products copy panels. Free of torch.
#pragma once

#include "panels.cuh"

namespace srpkd::cuda::algebra {

SRPKD_DEVICE int64_t offset_of_partial(int image, int tiles, int tile, int splits, int split) {
  return ((int64_t{image} * tiles + tile) * splits + split) * BLOCK * BLOCK;
}

// Returns whether the other blocks of a group of `blocks` have written their sums. Their counter starts at 0.
SRPKD_DEVICE bool is_last_block(int* counter, int blocks, Address shared) {
  sync_block();
  if (thread_index() == 0) store_shared(shared, increment(counter) == blocks - 1 ? 1 : 0);
  sync_block();
  return load_shared<int>(shared);
}

constexpr int MATRIX_UNIT = 4;  // adjacent elements of a strip that a thread has

// The sums over at most MOST ranges of pixels of a strip of a tile. The loads of BATCH ranges are under way together:
// each takes as long as all of them. The first batch starts when the object is created.
template <int THREADS, int MOST, int BATCH = MOST>
struct StripOfPartials {
  static constexpr int UNITS = STRIP * BLOCK / MATRIX_UNIT / THREADS;
  const float* partial;  // of the tile
  int splits, first_row;
  uint32_t part[BATCH][UNITS][MATRIX_UNIT] = {};

  SRPKD_DEVICE StripOfPartials(const float* partial_of_tile, int splits_of_sum, int row)
      : partial(partial_of_tile), splits(splits_of_sum), first_row(row) {
    load(0);
  }

  // Calls f(row, column, sums) for every unit. The order of a sum is always the same.
  template <class F>
  SRPKD_DEVICE void for_each_sum(F f) {
    CompensatedSum sum[UNITS][MATRIX_UNIT];
    add(0, sum);
    if constexpr (BATCH < MOST)
#pragma unroll 1
      for (int first = BATCH; first < splits; first += BATCH) load(first), add(first, sum);
#pragma unroll
    for (int n = 0; n < UNITS; ++n) {
      double value[MATRIX_UNIT];
#pragma unroll
      for (int e = 0; e < MATRIX_UNIT; ++e) value[e] = sum[n][e].value();
      f(place(n) / BLOCK, place(n) % BLOCK, value);
    }
  }

 private:
  SRPKD_DEVICE int place(int n) const { return first_row * BLOCK + (n * THREADS + thread_index()) * MATRIX_UNIT; }

  SRPKD_DEVICE void load(int first) {
#pragma unroll
    for (int i = 0; i < BATCH; ++i)
      if (first + i < splits)
#pragma unroll
        for (int n = 0; n < UNITS; ++n)
          load_words_coherent(part[i][n], partial + (first + i) * BLOCK * BLOCK + place(n));
  }

  SRPKD_DEVICE void add(int first, CompensatedSum (&to)[UNITS][MATRIX_UNIT]) const {
#pragma unroll
    for (int i = 0; i < BATCH; ++i)
      if (first + i < splits)
#pragma unroll
        for (int n = 0; n < UNITS; ++n)
#pragma unroll
          for (int e = 0; e < MATRIX_UNIT; ++e) to[n][e].add(as_float(part[i][n][e]));
  }
};

// Writes adjacent elements of a matrix in terms, of which `to` is the first one's place.
template <class Term, int COUNT>
SRPKD_DEVICE void store_matrix_terms(uint16_t* to, float (&x)[COUNT]) {
#pragma unroll
  for (int term = 0; term < TERMS_OF_MATRIX<Term>; ++term) {
    uint32_t pairs[COUNT / 2];
    take_term<Term>(pairs, x);
    store_words(to + term * BLOCK * BLOCK, pairs);
  }
}

// Writes a strip of a tile of a matrix in terms and, if `mirrored`, the same strip of the tile's mirror image. That
// passes through shared memory: its lines are the columns of the strip, whose elements would be written one by one.
template <int THREADS, class Term>
struct StripOfMatrix {
  static constexpr int STRIDE = BLOCK + 2, BYTES = STRIP * STRIDE * 4;  // floats; of the buffer
  uint16_t* matrix;
  TileOfMoment at;
  int blocks, first_row;  // `blocks` in a row of the matrix
  bool mirrored;
  Address buffer;

  // Writes a unit, of which x is used up.
  SRPKD_DEVICE void store(int row, int column, float (&x)[MATRIX_UNIT]) const {
    if (mirrored)
#pragma unroll
      for (int e = 0; e < MATRIX_UNIT; ++e) store_shared(place(row, column + e), x[e]);
    store_matrix_terms<Term>(matrix + panel_of_terms(at.row, at.column, blocks) + row * BLOCK + column, x);
  }

  // Writes the mirror image, after a barrier.
  SRPKD_DEVICE void store_mirrored() const {
    if (!mirrored) return;
    uint16_t* const to = matrix + panel_of_terms(at.column, at.row, blocks);
    for (int i = thread_index(); i < STRIP * BLOCK / MATRIX_UNIT; i += THREADS) {
      const int column = i / (STRIP / MATRIX_UNIT), row = first_row + i % (STRIP / MATRIX_UNIT) * MATRIX_UNIT;
      float x[MATRIX_UNIT];
#pragma unroll
      for (int e = 0; e < MATRIX_UNIT; ++e) x[e] = load_shared<float>(place(row + e, column));
      store_matrix_terms<Term>(to + column * BLOCK + row, x);
    }
  }

 private:
  SRPKD_DEVICE Address place(int row, int column) const { return buffer + ((row - first_row) * STRIDE + column) * 4; }
};

// Copies a matrix panel, all its terms, from global to shared memory.
template <int THREADS, class G, class Term = BFloat16>
SRPKD_DEVICE void copy_matrix(const uint16_t* matrix, int row, int column, int blocks, Address to) {
  const uint16_t* const from = matrix + panel_of_terms(row, column, blocks);
#pragma unroll
  for (int unit = thread_index(); unit < TERMS_OF_MATRIX<Term> * PANEL_BYTES / 16; unit += THREADS) {
    const int line = unit / 8 % BLOCK, term = unit / 8 / BLOCK;
    copy_async<16>(to + term * PANEL_BYTES + sm80::swizzled<G>(line, unit % 8 * 16), from + unit * 8, 16);
  }
}

}  // namespace srpkd::cuda::algebra
