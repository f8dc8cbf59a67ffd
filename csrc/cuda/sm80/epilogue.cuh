// The elementwise part of one tile, on the accumulators: from G_s and G_t to the loss, h and K. Free of torch.
#pragma once

#include "fragments.cuh"

namespace srpkd::cuda::sm80 {

template <Distance DISTANCE>
SRPKD_DEVICE float distance_value(float d, float delta) {
  const float size = fabsf(d);
  if constexpr (DISTANCE == Distance::l1) return size;
  if constexpr (DISTANCE == Distance::l2) return d * d;
  return size <= delta ? 0.5f * d * d : delta * (size - 0.5f * delta);
}

template <Distance DISTANCE>
SRPKD_DEVICE float distance_grad(float d, float delta) {
  if constexpr (DISTANCE == Distance::l1) return (d > 0 ? 1.f : 0.f) - (d < 0 ? 1.f : 0.f);
  if constexpr (DISTANCE == Distance::l2) return d + d;
  return d > delta ? delta : d < -delta ? -delta : d;  // NaN stays NaN
}

// rho'(D), or 0 where relations are rectified and this one, the student's A of that D, is not positive. NaN stays NaN.
template <Distance DISTANCE, bool RECTIFY>
SRPKD_DEVICE float relation_grad(float d, float relation, float delta) {
  const float grad = distance_grad<DISTANCE>(d, delta);
  return RECTIFY && relation <= 0 ? 0 : grad;
}

// max(G, 0) if relations are rectified: scales are not negative, so A has the sign of G. NaN stays NaN.
template <bool RECTIFY>
SRPKD_DEVICE float rectified(float gram) {
  return RECTIFY && gram < 0 ? 0 : gram;
}

// Adds this thread's part of the loss and of h, and overwrites s = G_s and t = G_t with the two terms of K.
template <bool ROW, Distance DISTANCE, class C>
SRPKD_DEVICE void epilogue(const Params& p, const Warp<C>& warp, Accumulator<C>& s, Accumulator<C>& t,
                           const RowVector<C>& row_s, const RowVector<C>& row_t, Address scales, bool mirrored,
                           double& loss, RowVector<C>& h) {
  float tile_loss = 0;
  RowVector<C> tile_h{};
#pragma unroll
  for (int n = 0; n < C::N_TILES; ++n) {
    float column_s[2], column_t[2];
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      column_s[odd] = load_shared<float>(scales + 4 * warp.column(n, odd));
      column_t[odd] = load_shared<float>(scales + 4 * (warp.column(n, odd) + TILE));
    }
#pragma unroll
    for (int m = 0; m < C::M_TILES; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float alpha_s = row_s[m][i / 2], alpha_t = row_t[m][i / 2], beta_s = column_s[i % 2],
                    beta_t = column_t[i % 2];
        const float g = rectified<C::RECTIFY>(s[m][n][i]), g_t = rectified<C::RECTIFY>(t[m][n][i]);
        const float scale = ROW ? alpha_s : product(alpha_s, beta_s);
        const float a = product(g, scale), d = a - product(g_t, ROW ? alpha_t : product(alpha_t, beta_t));
        tile_loss += distance_value<DISTANCE>(d, p.delta);
        const float b = ROW ? product(g, beta_s) : 0, e = ROW ? b - product(g_t, beta_t) : 0;  // A_ji, D_ji
        if constexpr (C::GRAD) {
          const float grad = relation_grad<DISTANCE, C::RECTIFY>(d, a, p.delta);
          tile_h[m][i / 2] += grad * a;
          const float mirrored_grad = ROW ? relation_grad<DISTANCE, C::RECTIFY>(e, b, p.delta) : 0;
          const float k = ROW ? grad * alpha_s + mirrored_grad * beta_s : grad * scale;
          uint32_t first, rest = 0;
          if constexpr (C::K_TERMS == 2)
            split_float(k, first, rest);
          else
            first = nearest_tf32_or_nan(k);
          s[m][n][i] = as_float(first), t[m][n][i] = as_float(rest);
        } else if (ROW && mirrored) {
          tile_loss += distance_value<DISTANCE>(e, p.delta);
        }
      }
  }
  loss += tile_loss * (!C::GRAD && !ROW && mirrored ? 2.f : 1.f);
#pragma unroll
  for (int m = 0; m < C::M_TILES; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) h[m][half] += tile_h[m][half];
}

// The same for the relation and the distance in p.
template <class C>
SRPKD_DEVICE void epilogue(const Params& p, const Warp<C>& warp, Accumulator<C>& s, Accumulator<C>& t,
                           const RowVector<C>& row_s, const RowVector<C>& row_t, Address scales, bool mirrored,
                           double& loss, RowVector<C>& h) {
#define SRPKD_EPILOGUE(ROW, DISTANCE) \
  return epilogue<ROW, Distance::DISTANCE>(p, warp, s, t, row_s, row_t, scales, mirrored, loss, h)
  if (p.row) {  // uniform across threads: one branch per tile
    if (p.distance == Distance::l1) SRPKD_EPILOGUE(true, l1);
    if (p.distance == Distance::l2) SRPKD_EPILOGUE(true, l2);
    SRPKD_EPILOGUE(true, huber);
  }
  if (p.distance == Distance::l1) SRPKD_EPILOGUE(false, l1);
  if (p.distance == Distance::l2) SRPKD_EPILOGUE(false, l2);
  SRPKD_EPILOGUE(false, huber);
#undef SRPKD_EPILOGUE
}

}  // namespace srpkd::cuda::sm80
