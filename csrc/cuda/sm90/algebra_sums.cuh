// How the kernels of ../algebra read the sums of these tiles: overloads of the functions in ../algebra/sums.cuh. Free
// of torch.
#pragma once

#include "../algebra/sums.cuh"
#include "sums.cuh"

namespace srpkd::cuda::sm90 {

SRPKD_DEVICE double loss_of(const SumsOfTiles& sums, int64_t part) { return load_global(sums.losses + part); }

SRPKD_DEVICE float h_of(const SumsOfTiles& sums, int image, int pixel) {
  const int64_t at = int64_t{image} * sums.work.blocks * TILE + pixel;
  return static_cast<float>(static_cast<double>(load_global(sums.h + at)) / sums.h_scale);
}

template <bool PIXELS_ADJACENT>
SRPKD_DEVICE algebra::Raw<float, 4> U_of(const SumsOfTiles& sums, int image, int pixel, int channel, int valid) {
  float sum[4] = {};
  const int group = channel / GROUP, block = pixel / TILE;
  for_each_part(sums, image * sums.channel_splits + group, block, [&](const float* part) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < valid)
        sum[i] += load_global(part + position_in_U(channel % GROUP + (PIXELS_ADJACENT ? 0 : i),
                                                   pixel % TILE + (PIXELS_ADJACENT ? i : 0)));
  });
  const float unit = sums.sum_factor * unit_of_sums(sums.symmetric, load_global(sums.powers + image));
  algebra::Raw<float, 4> result{};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // a zero-norm pixel has K_ij = 0 with alpha_i alpha_j; here it is tiny, see Preparation::scale_of
    const int of_pixel = pixel + (PIXELS_ADJACENT ? i : 0);
    const bool zero = i >= valid || (sums.symmetric && sums.alpha &&
                                     load_global(sums.alpha + int64_t{image} * sums.pixels + of_pixel) == 0);
    result.word[i] = as_bits(zero ? 0.f : sum[i] * unit);
  }
  return result;
}

}  // namespace srpkd::cuda::sm90
