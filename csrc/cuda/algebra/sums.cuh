// How the kernels here read the sums of the relation tiles. Tiles that keep them in another order have their own struct
// and overloads of these functions. Free of torch.
#pragma once

#include "panels.cuh"

namespace srpkd::cuda::algebra {

template <int VALUE>
using Constant = std::integral_constant<int, VALUE>;

SRPKD_DEVICE double loss_of(const SumsOfSplits& sums, int64_t part) { return load_global(sums.losses + part); }

SRPKD_DEVICE float h_of(const SumsOfSplits& sums, int image, int pixel) {
  float sum = 0;
  for (int split = 0; split < sums.splits; ++split)
    sum += load_global(sums.h + split * sums.h_strides[0] + image * sums.h_strides[1] + pixel);
  return sum;
}

// Returns U of `valid` adjacent elements, pixels or channels, of which the first is given.
template <bool PIXELS_ADJACENT>
SRPKD_DEVICE Raw<float, 4> U_of(const SumsOfSplits& sums, int image, int pixel, int channel, int valid) {
  const float* from = sums.U + image * sums.U_strides[1] + pixel * sums.U_strides[2] + channel * sums.U_strides[3];
  Raw<float, 4> result{}, part;
  for (int split = 0; split < sums.splits; ++split, from += sums.U_strides[0]) {
    part.template load<false>(from, valid, reinterpret_cast<uintptr_t>(from) % 16 == 0);
#pragma unroll
    for (int i = 0; i < 4; ++i) result.word[i] = as_bits(result[i] + part[i]);
  }
  return result;
}

// Returns w_i size^2: size is that of M, and products with it are divided by size^2.
template <class SumsOfTiles>
SRPKD_DEVICE float weight_of(const SumsOfTiles& sums, const float* alpha, float size, int image, int pixels,
                             int pixel) {
  const float scaled = load_global(alpha + int64_t{image} * pixels + pixel) * size;
  return h_of(sums, image, pixel) * scaled * scaled;
}

}  // namespace srpkd::cuda::algebra
