// The operands and the accumulators of tensor core products: which elements each thread of a warp holds, how panels are
// laid out in shared memory, and the loads from there into registers. Free of torch.
#pragma once

#include <cfloat>
#include <cmath>

#include "config.h"
#if defined(SRPKD_EMULATION)
#include "emulation.h"  // tests/csrc/cuda_emulation
#else
#include "../primitives.cuh"
#endif

namespace srpkd::cuda::sm80 {

template <class C>
using Accumulator = float[C::M_TILES][C::N_TILES][4];
template <class C>
using Fragment = uint32_t[C::FEATURE_TERMS][4];  // 16 pixels (or channels) by 32 bytes
template <class C>
using RowVector = float[C::M_TILES][2];  // one value for each of the rows lane / 4 and lane / 4 + 8

// Calls f(m, n, i) for the elements that a thread holds of M x N accumulators of 16 x 8.
template <int M, int N, class F>
SRPKD_DEVICE void for_each(F f) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) f(m, n, i);
}

// --- numbers ---------------------------------------------------------------------------------------------------------

// Tensor cores ignore the last 13 bits of a tf32. Adding half of the last significant bit rounds to nearest, but makes
// -0 of the NaN that all arithmetic of a GPU returns, 0x7fffffff.
SRPKD_DEVICE uint32_t nearest_tf32(float value) { return as_bits(value) + 0x1000; }
SRPKD_DEVICE uint32_t nearest_tf32_or_nan(float value) {
  return fabsf(value) <= FLT_MAX ? nearest_tf32(value) : as_bits(value);
}

// Splits value = first + second into two tf32. NaN and infinity, which `first` may lose, become NaN in `second`.
SRPKD_DEVICE void split_float(float value, uint32_t& first, uint32_t& second) {
  first = nearest_tf32(value) & ~0x1fffu;
  second = as_bits(value - as_float(first));
}

template <class C>
SRPKD_DEVICE void split_feature(uint32_t bits, uint32_t& first, uint32_t& second) {
  const float value = as_float(bits);
  if constexpr (C::FEATURE_TERMS == 2)
    split_float(value, first, second);
  else
    first = nearest_tf32_or_nan(value);
}

struct alignas(16) Words {
  uint32_t word[4];
};

// --- shared memory ---------------------------------------------------------------------------------------------------

// Returns the offset in a panel of byte `byte` of line `line`. The 16-byte units of a line are permuted, differently in
// each of eight lines, so that units of one column, which ldmatrix reads together, are in different banks.
template <class C>
SRPKD_DEVICE int swizzled(int line, int byte) {
  return byte / LINE * (C::PANEL_LINES * LINE) + line * LINE + (byte % LINE ^ (line % 8 * 16));
}

// Returns a swizzled address moved by lines and bytes.
template <class C>
SRPKD_DEVICE Address moved(Address from, int lines, int bytes) {
  return (from ^ bytes % LINE) + lines * LINE + bytes / LINE * (C::PANEL_LINES * LINE);
}

// One thread of a warp, and its position in the tile.
//
// The operand of a product has 16 pixels or channels from `outer`, and 32 bytes of k. r[i] holds eight of the outer
// dimension and half of k, in the order of the LEFT operand, or of two right operands side by side.
//
// ldmatrix cannot transpose floats. If their k is not adjacent in memory, they are read one by one, and k = t, t + 4 of
// the product are lines 2t, 2t + 1: four lines whose units of 32 bytes are in different banks, and the order in which
// the accumulator of K has its columns. If pixels are adjacent, those lines are channels, and the product with K
// receives its pixels from ldmatrix in their own order. Then the columns of G are permuted instead, see column().
template <class C>
struct Warp {
  const int thread = thread_index(), lane = thread % 32, group = lane / 4, member = lane % 4;
  const int warp_m = thread / 32 / C::WARPS_N, warp_n = thread / 32 % C::WARPS_N;
  const int first_row = warp_m * 16 * C::M_TILES, first_column = warp_n * 8 * C::N_TILES;

  // Returns the part of an operand's offset that differs from lane to lane. Panels are aligned to lines, so moved() can
  // apply the rest once the panel's address is known: in immediate operands instead of registers.
  template <bool K_ADJACENT, bool LEFT>
  SRPKD_DEVICE int lane_offset(int outer, int k) const {
    if constexpr (K_ADJACENT || C::NARROW) {
      const int matrix = lane / 8, line = lane % 8;
      const int o = LEFT ? matrix % 2 : matrix / 2, half = LEFT ? matrix / 2 : matrix % 2;
      return K_ADJACENT ? swizzled<C>(outer + 8 * o + line, k * C::SIZE + 16 * half)
                        : swizzled<C>(k + 8 * half + line, (outer + 8 * o) * C::SIZE);
    } else {
      return swizzled<C>(k + 2 * member,
                         (outer + (!LEFT && C::PIXELS_ADJACENT ? group / 2 + group % 2 * 4 : group)) * C::SIZE);
    }
  }

  template <bool K_ADJACENT, bool LEFT>
  static SRPKD_DEVICE void load(uint32_t (&r)[4], Address from, int outer, int k) {
    if constexpr (K_ADJACENT) {
      load_matrices<false>(r, moved<C>(from, outer, k * C::SIZE));
    } else if constexpr (C::NARROW) {
      load_matrices<true>(r, moved<C>(from, k, outer * C::SIZE));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int o = LEFT ? i % 2 : i / 2, half = LEFT ? i / 2 : i % 2;
        r[i] = load_shared<uint32_t>(moved<C>(from, k + half, (outer + 8 * o) * C::SIZE) ^ 16 * half);
      }
    }
  }

  template <bool LEFT>
  static SRPKD_DEVICE void load_features(Fragment<C>& to, Address from, int outer, int k) {
    load<!C::PIXELS_ADJACENT, LEFT>(to[0], from, outer, k);
    if constexpr (!C::NARROW)
#pragma unroll
      for (int i = 0; i < 4; ++i) split_feature<C>(to[0][i], to[0][i], to[C::FEATURE_TERMS - 1][i]);
  }

  // Returns the row of a tile that elements 0, 1 (half = 0) and 2, 3 (half = 1) of an accumulator belong to.
  SRPKD_DEVICE int row(int m, int half) const { return first_row + 16 * m + 8 * half + group; }

  // Returns the column of a tile that elements 0, 2 (odd = 0) and 1, 3 (odd = 1) of an accumulator belong to.
  SRPKD_DEVICE int column(int n, int odd) const {
    const bool permuted = C::PIXELS_ADJACENT && !C::NARROW;
    return first_column + 8 * n + (permuted ? member + 4 * odd : 2 * member + odd);
  }
};

}  // namespace srpkd::cuda::sm80
