// What the kernel does before the tiles, with all threads of the grid: the scales of the pixels, zeros where sums
// start, and the 16-bit terms of features that TMA cannot read in place. Free of torch.
#pragma once

#if defined(__CUDACC__)
#include "primitives.cuh"
#else
#include "sm90_primitives.h"  // tests/csrc/cuda_emulation
#endif
#include "plan.h"

namespace srpkd::cuda::sm90 {

template <class C>
struct Preparation {
  const Params& p;
  const int thread = thread_index(), block = block_index(0);
  const int padded = p.work.blocks * TILE;  // pixels of an image in `scales` and `h`

  // D_ij = alpha_i (G_s - ratio_i G_t). A pixel whose student has norm 0 has alpha 0 in the relation matrix, but D_ij =
  // -alpha_t G_t. Its alpha here is alpha_t divided by a number so large that G_s and K do not matter.
  static SRPKD_DEVICE PixelScale scale_of(float student, float teacher, float power) {
    constexpr float LARGE = 0x1p40f;
    if (student == 0) return {teacher / LARGE * power, teacher > 0 ? LARGE : 0.f};
    return {student * power, teacher / student};
  }

  static SRPKD_DEVICE float alpha_of(const float* alpha, int64_t pixel) {
    return alpha ? load_global(alpha + pixel) : 1.f;
  }

  // Returns the power of two that brings the largest alpha of the student to about 2^11, or 2^5 if two are multiplied,
  // so that K is in the range of float16: at most 2^14, and its error at most 2^-11 |K| + 2^-25.
  SRPKD_DEVICE float power_of(int image) const {
    if (!C::SCALED) return 1;
    constexpr int WARPS = C::THREADS / 32;
    float largest = 0;
    for (int i = thread; i < p.pixels; i += C::THREADS)
      largest = fmaxf(largest, alpha_of(p.alpha_student, int64_t{image} * p.pixels + i));
    for (int lanes = 1; lanes < 32; lanes *= 2) largest = fmaxf(largest, shuffle_xor(largest, lanes));
    const Address of_warps = shared_memory();
    sync_block();
    if (thread % 32 == 0) store_shared(of_warps + thread / 32 * 4, largest);
    sync_block();
    for (int i = 0; i < WARPS; ++i) largest = fmaxf(largest, load_shared<float>(of_warps + i * 4));
    if (largest == 0) return 1;
    const int exponent = static_cast<int>(as_bits(largest) >> 23) - 127;
    const int wanted = (C::SYMMETRIC ? 5 : 11) - exponent;
    return as_float(static_cast<uint32_t>(127 + (wanted < -126 ? -126 : minimum(wanted, 126))) << 23);
  }

  // The scales and the zeros of h of a part of an image.
  SRPKD_DEVICE void prepare_pixels(int image, int part, int parts) const {
    const float power = power_of(image);
    if (part == 0 && thread == 0) store_global(p.powers + image, power);
    const int end = static_cast<int>(int64_t{padded} * (part + 1) / parts);
    for (int i = static_cast<int>(int64_t{padded} * part / parts) + thread; i < end; i += C::THREADS) {
      const int64_t pixel = int64_t{image} * p.pixels + i, to = int64_t{image} * padded + i;
      PixelScale scale{0, 0};
      if (i < p.pixels) scale = scale_of(alpha_of(p.alpha_student, pixel), alpha_of(p.alpha_teacher, pixel), power);
      store_global(p.scales + to, scale);
      if (p.h) store_global(p.h + to, int64_t{0});
    }
  }

  template <typename T>
  SRPKD_DEVICE void zero(T* to, int64_t count) const {
    for (int64_t i = int64_t{block} * C::THREADS + thread; i < count; i += int64_t{p.work.grid} * C::THREADS)
      store_global(to + i, T{0});
  }

  // The next 16-bit term of a value, which becomes the rest.
  static SRPKD_DEVICE uint32_t take_term(float& value) {
    const uint32_t term = pack<BFloat16>(value, 0.f) & 0xffff;
    value -= as_float(term << 16);
    return term;
  }

  // Writes the terms of 64 pixels and 64 channels with adjacent pixels. Reads and writes adjacent elements.
  SRPKD_DEVICE void split_tile(const Source& from, int image, int first_pixel, int first_channel) const {
    constexpr int SIDE = 64, STRIDE = SIDE + 1;  // floats, so that both directions use all banks
    const Address tile = shared_memory();
    const bool pixels_adjacent = from.strides[1] == 1;
    sync_block();
    for (int i = thread; i < SIDE * SIDE; i += C::THREADS) {
      const int pixel = pixels_adjacent ? i % SIDE : i / SIDE, channel = pixels_adjacent ? i / SIDE : i % SIDE;
      if (first_pixel + pixel >= p.pixels || first_channel + channel >= from.channels) continue;
      const int64_t at = image * from.strides[0] + (first_pixel + pixel) * from.strides[1] +
                         (first_channel + channel) * from.strides[2];
      const uint32_t bits = from.element_bytes == 4 ? load_global(static_cast<const uint32_t*>(from.data) + at)
                                                    : load_global(static_cast<const uint16_t*>(from.data) + at);
      store_shared(tile + (channel * STRIDE + pixel) * 4, bits);
    }
    sync_block();
    for (int i = thread; i < SIDE * SIDE; i += C::THREADS) {
      const int pixel = first_pixel + i % SIDE, channel = first_channel + i / SIDE;
      if (pixel >= p.pixels || channel >= from.channels) continue;
      uint32_t bits = load_shared<uint32_t>(tile + (i / SIDE * STRIDE + i % SIDE) * 4);
      float value = as_float(bits);
      for (int term = 0; term < C::TERMS; ++term) {
        const int64_t line = (int64_t{image} * C::TERMS + term) * from.channels + channel;
        if (from.element_bytes == 4) bits = take_term(value);
        store_global(from.terms + line * from.line + pixel, static_cast<uint16_t>(bits));
      }
    }
  }

  SRPKD_DEVICE void split(const Source& from) const {
    const int across = static_cast<int>(ceil_div(p.pixels, 64)), down = static_cast<int>(ceil_div(from.channels, 64));
    const int64_t tiles = int64_t{p.images} * across * down;
    for (int64_t i = block; i < tiles; i += p.work.grid)
      split_tile(from, static_cast<int>(i / (across * down)), static_cast<int>(i % across) * 64,
                 static_cast<int>(i / across % down) * 64);
  }

  SRPKD_DEVICE void run() const {
    const int parts = p.images < p.work.grid ? p.work.grid / p.images : 1;
    for (int64_t unit = block; unit < int64_t{p.images} * parts; unit += p.work.grid)
      prepare_pixels(static_cast<int>(unit / parts), static_cast<int>(unit % parts), parts);
    zero(p.loss, p.loss_count);
    if constexpr (C::GRAD) zero(p.additions, p.additions_count);
    for (const Source& source : p.sources)
      if (source.terms) split(source);
    // what follows is asynchronous: this thread's accesses to shared and global memory come first
    fence_async_proxy();
    fence_async_proxy_global();
    sync_grid();
    fence_async_proxy_global();
  }
};

}  // namespace srpkd::cuda::sm90
