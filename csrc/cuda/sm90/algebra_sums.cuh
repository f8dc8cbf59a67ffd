// How the kernels of ../algebra read the sums of these tiles: overloads of the functions in ../algebra/sums.cuh. Free
// of torch.
#pragma once

#include "../algebra/sums.cuh"
#include "sums.cuh"

namespace srpkd::cuda::sm90 {

SRPKD_DEVICE double loss_of(const SumsOfSegments& sums, int64_t part) { return load_global(sums.losses + part); }

SRPKD_DEVICE float h_of(const SumsOfSegments& sums, int image, int pixel) {
  const int64_t at = int64_t{image} * sums.work.blocks * TILE + pixel;
  return static_cast<float>(static_cast<double>(load_global(sums.h + at)) / sums.h_scale);
}

// Calls f(pixel, channel, x, x of the next pixel) for U of PIXELS pixels x 64 channels, of which the first are given.
// Each thread reads 16 bytes of the order in the workspace, beside those of its neighbours; all of a part are under way
// together.
template <int THREADS, int PIXELS, class F>
SRPKD_DEVICE void for_each_U(algebra::Constant<THREADS>, algebra::Constant<PIXELS>, const SumsOfSegments& sums,
                             int image, int pixel, int channel, F f) {
  constexpr int COUNT = PIXELS * GROUP / 4 / THREADS;
  float sum[COUNT][4] = {};
  const int first = position_in_U(0, pixel % TILE) + thread_index() * 4;
  for_each_part(sums, image * sums.channel_splits + channel / GROUP, pixel / TILE, [&](const float* part) {
    uint32_t word[COUNT][4];
#pragma unroll
    for (int n = 0; n < COUNT; ++n) load_words(word[n], part + first + n * THREADS * 4);
#pragma unroll
    for (int n = 0; n < COUNT; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[n][i] += as_float(word[n][i]);
  });
  const float power = load_global(sums.powers + image);
  const float unit = sums.sum_factor * unit_of_U(sums.symmetric, power, 1);
#pragma unroll
  for (int n = 0; n < COUNT; ++n) {
    const ChannelAndPixel at = place_in_U((n * THREADS + thread_index()) * 4);
    float units[2] = {unit, unit};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t of_image = pixel + at.pixel + i, of_batch = int64_t{image} * sums.pixels + of_image;
      if (of_image >= sums.pixels) continue;
      if (sums.units) units[i] = sums.sum_factor * unit_of_U(sums.symmetric, power, load_global(sums.units + of_batch));
      // a zero-norm pixel has K_ij = 0 with alpha_i alpha_j; here it is tiny, see Preparation::scale_of
      if (sums.symmetric && sums.alpha && load_global(sums.alpha + of_batch) == 0) units[i] = 0;
    }
    f(at.pixel, at.channel, sum[n][0] * units[0], sum[n][1] * units[1]);
    f(at.pixel, at.channel + 8, sum[n][2] * units[0], sum[n][3] * units[1]);
  }
}

}  // namespace srpkd::cuda::sm90
