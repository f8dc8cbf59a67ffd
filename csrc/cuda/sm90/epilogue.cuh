// The elementwise part of a tile, on the accumulators of one warpgroup: from G_s and G_t (64 x 128) to K, and to the
// sums of the loss and of h. Free of torch.
//
// With d_ij = G_s,ij - ratio_i G_t,ij, D_ij = alpha_i d_ij. alpha is scaled, and so are K, h and the loss of l1: see
// unit_of_sums.
//
// If features are in units, so are G and K: K_ij contains the units of both pixels, so the sum over the columns of
// K_ij q_j is right except for the unit of pixel i, which for_each_U takes out. For cosine and none the units are part
// of alpha and ratio. For row with two terms, D_ij and K_ij also have the unit of column j, and D_ji has that of row i;
// with one term, all pixels of an image have the same.
#pragma once

#include <cmath>

#if defined(SRPKD_EMULATION)
#include "sm90_primitives.h"  // tests/csrc/cuda_emulation
#else
#include "primitives.cuh"
#endif
#include "plan.h"

namespace srpkd::cuda::sm90 {

// The rows of a lane are g and g + 8 of its warp's 16, g = lane / 4. Its columns are 8 n + 2 t and 8 n + 2 t + 1,
// t = lane % 4.
template <class C>
struct Rows {
  typename C::Scale scale[2];
};

// A lane's sums over the columns of a segment. loss_of_columns is that of D_ji, row only.
struct RowSums {
  float h[2] = {}, loss[2] = {}, loss_of_columns = 0;

  // After the tile on the diagonal, the first of its segment. It has D_ij and D_ji at their own places, the others have
  // both at one.
  template <class C>
  SRPKD_DEVICE void count_once() {
    loss_of_columns = 0;
    if (C::SYMMETRIC) loss[0] *= 0.5f, loss[1] *= 0.5f;
  }
  template <class C>
  SRPKD_DEVICE float total_loss(const Rows<C>& rows) const {
    if (C::SYMMETRIC) return 2 * (loss[0] + loss[1]);
    if (!C::L1 || C::UNITS_OF_COLUMNS) return loss[0] + loss[1] + loss_of_columns;
    return fused_multiply_add(rows.scale[0].alpha, loss[0],
                              fused_multiply_add(rows.scale[1].alpha, loss[1], loss_of_columns));
  }
};

// magnitude * sign(d) with sign(0) = 0 for any difference but denormal ones, without a branch: two instructions. A sign
// taken from the sign bit needs one, but a branch that computes ties again; instructions that are jumped over make the
// code outgrow the instruction cache.
SRPKD_DEVICE float with_sign(float magnitude, float d) {
  return fused_multiply_add(saturate(fused_multiply_add(d, 0x1p127f, 0.5f)), 2 * magnitude, -magnitude);
}

// K of the rows of a lane, packed, one operand of wgmma for each 16 columns.
template <class C>
using Weights = uint32_t[C::TERMS][8][4];

template <class C>
struct Epilogue {
  static constexpr bool SYMMETRIC = C::SYMMETRIC, L1 = C::L1;
  using Scale = typename C::Scale;

  const Params& p;
  const Rows<C>& rows;
  const float unit;  // of alpha, the reciprocal of Params::powers; not used for l1
  const int lane;

  SRPKD_DEVICE float difference(float alpha, float d) const {
    if (!C::SCALED) return alpha * d;
    return SYMMETRIC ? alpha * unit * d * unit : alpha * d * unit;  // the square of a unit may be out of range
  }

  // rho'(D) times alpha, given d and alpha.
  SRPKD_DEVICE float weight(float alpha, float d) const {
    if constexpr (L1) return with_sign(alpha, d);
    return clamp(difference(alpha, d), p.delta) * alpha;
  }
  // alpha and ratio of D_ij with the units of the other pixel.
  static SRPKD_DEVICE PixelScale with_units(const Scale& own, [[maybe_unused]] const Scale& other) {
    if constexpr (C::UNITS_OF_COLUMNS)
      return {own.alpha * other.unit, own.ratio * other.ratio_of_units};
    else
      return own;
  }

  // rho(D); for l1 without the factor alpha.
  SRPKD_DEVICE float distance(float alpha, float d) const {
    if constexpr (L1) return fabsf(d);
    const float D = difference(alpha, d), P = clamp(D, p.delta);
    return P * fused_multiply_add(-0.5f, P, D);
  }

  // Columns [8 n, 8 n + 8). Sets `h` to this lane's part of the sums over the rows, and `k` to the elements of K.
  SRPKD_DEVICE void columns(const float* s, const float* t, const Scale (&scale)[2], RowSums& sums, float (&h)[2],
                            float (&k)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const PixelScale row = with_units(rows.scale[i / 2], scale[i % 2]);
      const PixelScale column = with_units(scale[i % 2], rows.scale[i / 2]);
      float of_row, of_column;  // K_ij and h_i without their units: of D_ij, of D_ji
      if constexpr (SYMMETRIC) {
        const float d = fused_multiply_add(-(row.ratio * column.ratio), t[i], s[i]), alpha = row.alpha * column.alpha;
        of_row = of_column = k[i] = weight(alpha, d);
        sums.loss[i / 2] += L1 ? of_row * d : distance(alpha, d);
      } else {
        const float d = fused_multiply_add(-row.ratio, t[i], s[i]);
        const float mirrored = fused_multiply_add(-column.ratio, t[i], s[i]);
        of_row = weight(row.alpha, d), of_column = weight(column.alpha, mirrored);
        k[i] = of_row + of_column;
        if constexpr (L1 && C::UNITS_OF_COLUMNS)
          sums.loss[i / 2] = fused_multiply_add(of_row, d, sums.loss[i / 2]);
        else
          sums.loss[i / 2] += distance(row.alpha, d);
        if constexpr (L1)
          sums.loss_of_columns = fused_multiply_add(of_column, mirrored, sums.loss_of_columns);
        else
          sums.loss_of_columns += distance(column.alpha, mirrored);
      }
      if constexpr (C::GRAD) {
        sums.h[i / 2] = fused_multiply_add(of_row, s[i], sums.h[i / 2]);
        h[i % 2] = i < 2 ? of_column * s[i] : fused_multiply_add(of_column, s[i], h[i % 2]);
      }
    }
  }

  // Columns [64 HALF, 64 HALF + 64). Sets h to the sums over the warp's rows of columns 64 HALF + 2 lane and the next.
  template <int HALF>
  SRPKD_DEVICE void half(const float (&s)[64], const float (&t)[64], Address scales, RowSums& sums, float (&h)[2],
                         Weights<C>& K) const {
    // Columns are added up over the rows as soon as there are two: each step halves the columns of a lane.
    float halved[3][2][2];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int n = 8 * HALF + i % 2 * 4 + i / 2 % 2 * 2 + i / 4;
      Scale scale[2];
      load_scales(scale, scales + (8 * n + 2 * (lane % 4)) * int{sizeof(Scale)});
      float k[4];
      columns(s + 4 * n, t + 4 * n, scale, sums, halved[0][i % 2], k);
      if constexpr (C::GRAD) {
        pack_terms(K, n, k);
        if (i % 2 == 1) halve(halved[0], halved[1][i / 2 % 2], 16);
        if (i % 4 == 3) halve(halved[1], halved[2][i / 4], 8);
      }
    }
    if constexpr (C::GRAD) halve(halved[2], h, 4);
  }

  static SRPKD_DEVICE void load_scales(Scale (&scale)[2], Address from) {
    if constexpr (C::UNITS_OF_COLUMNS) {
      scale[0] = load_shared<Scale>(from), scale[1] = load_shared<Scale>(from + int{sizeof(Scale)});
    } else {
      struct alignas(16) Pair {
        float value[4];
      };
      const Pair pair = load_shared<Pair>(from);
      scale[0] = {pair.value[0], pair.value[1]}, scale[1] = {pair.value[2], pair.value[3]};
    }
  }

  static SRPKD_DEVICE void pack_terms(Weights<C>& K, int n, float (&k)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      K[0][n / 2][n % 2 * 2 + i / 2] = pack<typename C::Element>(k[i], k[i + 1]);
#pragma unroll
      for (int term = 1; term < C::TERMS; ++term) {
        const uint32_t before = K[term - 1][n / 2][n % 2 * 2 + i / 2];
        k[i] -= as_float(widen<typename C::Element, false>(before));
        k[i + 1] -= as_float(widen<typename C::Element, true>(before));
        K[term][n / 2][n % 2 * 2 + i / 2] = pack<typename C::Element>(k[i], k[i + 1]);
      }
    }
  }

  // Of two columns, adds the first over two lanes and leaves it in the lower one, and the second in the upper one.
  SRPKD_DEVICE void halve(const float (&from)[2][2], float (&to)[2], int lanes) const {
    const bool upper = lane & lanes;
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const float sent = upper ? from[0][odd] : from[1][odd];
      to[odd] = (upper ? from[1][odd] : from[0][odd]) + shuffle_xor(sent, lanes);
    }
  }
};

// Zeros G_ii in a tile on the diagonal, so that D_ii is exactly 0; NaN stays NaN. `row`: of the lane's first row.
SRPKD_DEVICE void zero_diagonal(float (&sum)[64], int row, int lane) {
#pragma unroll
  for (int i = 0; i < 64; ++i)
    if (i / 4 * 8 + lane % 4 * 2 + i % 2 == row + i % 4 / 2 * 8) sum[i] *= 0;
}

}  // namespace srpkd::cuda::sm90
