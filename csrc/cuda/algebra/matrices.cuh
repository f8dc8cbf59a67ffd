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
  fence_device();
  sync_block();
  if (thread_index() == 0) store_shared(shared, increment(counter) == blocks - 1 ? 1 : 0);
  sync_block();
  fence_device();
  return load_shared<int>(shared);
}

constexpr int UNIT = 4;  // adjacent elements of a matrix that a thread has
// Rows of a tile that a thread block finishes at once. Lines of its mirror image are a sector.
constexpr int STRIP = 16;

// Writes the three bfloat16 terms of a unit of a matrix. `to`: the first term's place.
SRPKD_DEVICE void store_matrix_terms(uint16_t* to, float (&x)[UNIT]) {
#pragma unroll
  for (int term = 0; term < MATRIX_TERMS; ++term) {
    const uint32_t pair[2] = {pack<BFloat16>(x[0], x[1]), pack<BFloat16>(x[2], x[3])};
    store_words(to + term * BLOCK * BLOCK, pair);
#pragma unroll
    for (int e = 0; e < UNIT; ++e) x[e] -= as_float(e % 2 ? pair[e / 2] & 0xffff0000u : pair[e / 2] << 16);
  }
}

// Writes a strip of a tile of a symmetric matrix in terms, and its mirror image. That passes through shared memory: its
// lines are the columns of the strip, whose elements would be written one by one.
template <int THREADS>
struct SymmetricStrip {
  static constexpr int STRIDE = BLOCK + 2, BYTES = STRIP * STRIDE * 4;  // floats; of the buffer
  uint16_t* matrix;
  TileOfMoment at;
  int blocks, first_row;
  Address buffer;

  SRPKD_DEVICE Address place(int row, int column) const { return buffer + ((row - first_row) * STRIDE + column) * 4; }

  SRPKD_DEVICE void store(int row, int column, float (&x)[UNIT]) const {
    if (at.row != at.column)
#pragma unroll
      for (int e = 0; e < UNIT; ++e) store_shared(place(row, column + e), x[e]);
    store_matrix_terms(matrix + panel_of_terms(at.row, at.column, blocks) + row * BLOCK + column, x);
  }

  // Writes the mirror image, after a barrier.
  SRPKD_DEVICE void store_mirrored() const {
    if (at.row == at.column) return;
    uint16_t* const to = matrix + panel_of_terms(at.column, at.row, blocks);
    for (int i = thread_index(); i < STRIP * BLOCK / UNIT; i += THREADS) {
      const int column = i / (STRIP / UNIT), row = first_row + i % (STRIP / UNIT) * UNIT;
      float x[UNIT];
#pragma unroll
      for (int e = 0; e < UNIT; ++e) x[e] = load_shared<float>(place(row + e, column));
      store_matrix_terms(to + column * BLOCK + row, x);
    }
  }
};

// The partial sums of a strip of a tile. All loads are under way together: each takes as long as all of them.
template <int THREADS, int MOST>  // splits
struct StripOfPartials {
  static constexpr int UNITS = STRIP * BLOCK / UNIT / THREADS;
  int splits, first_row;
  uint32_t part[MOST][UNITS][UNIT] = {};

  SRPKD_DEVICE StripOfPartials(const float* partial, int splits_of_sum, int row)
      : splits(splits_of_sum), first_row(row) {
#pragma unroll
    for (int split = 0; split < MOST; ++split)
      if (split < splits)
#pragma unroll
        for (int n = 0; n < UNITS; ++n) load_words_coherent(part[split][n], partial + split * BLOCK * BLOCK + place(n));
  }

  SRPKD_DEVICE int place(int n) const { return first_row * BLOCK + (n * THREADS + thread_index()) * UNIT; }

  // Calls f(row, column, sums of the splits) for every unit. The order of a sum is always the same.
  template <class F>
  SRPKD_DEVICE void for_each_sum(F f) const {
#pragma unroll
    for (int n = 0; n < UNITS; ++n) {
      CompensatedSum sum[UNIT];
#pragma unroll
      for (int split = 0; split < MOST; ++split)
        if (split < splits)
#pragma unroll
          for (int e = 0; e < UNIT; ++e) sum[e].add(as_float(part[split][n][e]));
      const double value[UNIT] = {sum[0].value(), sum[1].value(), sum[2].value(), sum[3].value()};
      f(place(n) / BLOCK, place(n) % BLOCK, value);
    }
  }
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
