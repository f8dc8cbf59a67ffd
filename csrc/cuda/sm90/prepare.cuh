// What the kernel does before the tiles, with all threads of the grid: the units of features, the scales of the pixels,
// zeros where sums start, and the 16-bit terms of features that TMA cannot read in place. Free of torch.
#pragma once

#if defined(SRPKD_EMULATION)
#include "sm90_primitives.h"  // tests/csrc/cuda_emulation
#else
#include "primitives.cuh"
#endif
#include "plan.h"

namespace srpkd::cuda::sm90 {

template <class C>
struct Preparation {
  const Params& p;
  const int thread = thread_index(), block = block_index(0);
  const int padded = p.work.blocks * TILE;          // pixels of an image in `scales` and `h`
  const bool with_units = C::SCALED && p.units[0];  // bfloat16 has none

  static SRPKD_DEVICE float alpha_of(const float* alpha, int64_t pixel) {
    return alpha ? load_global(alpha + pixel) : 1.f;
  }
  SRPKD_DEVICE float measured_unit(int network, int64_t pixel) const {
    return with_units ? load_global_coherent(p.measured_units[network] + pixel) : 1.f;
  }

  static SRPKD_DEVICE int exponent_of(float value) { return static_cast<int>(as_bits(value) >> 23) - 127; }
  static SRPKD_DEVICE float power_of_two(int exponent) { return as_float(static_cast<uint32_t>(127 + exponent) << 23); }
  static SRPKD_DEVICE float reciprocal(float power) { return power_of_two(-exponent_of(power)); }
  static SRPKD_DEVICE int clamped(int exponent, int limit) {
    return minimum(exponent < -limit ? -limit : exponent, limit);
  }

  // --- the units of features ----------------------------------------------------------------------------------------
  // A feature divided by its pixel's unit is below 2^14. As two float16 terms it has an error of at most 2^-23 of
  // itself or 2^-25, which is 2^-38 of the largest feature of the pixel; as one, 2^-11 of itself or 2^-25.

  static constexpr int FEATURE_EXPONENT = 14;

  // Loads the bits of a feature.
  static SRPKD_DEVICE uint32_t feature(const Source& from, int64_t at) {
    return from.element_bytes == 4 ? load_input(static_cast<const uint32_t*>(from.data) + at)
                                   : load_input(static_cast<const uint16_t*>(from.data) + at);
  }
  static SRPKD_DEVICE float value_of(const Source& from, uint32_t bits) {
    return as_float(from.element_bytes == 4 ? bits : widen<typename C::Element, false>(bits));
  }

  // Stores the units of 32 pixels: 0 for those without any feature but 0, which get theirs in prepare_pixels.
  SRPKD_DEVICE void measure(const Source& from, float* units, int image, int first) const {
    constexpr int WARPS = C::THREADS / 32;
    const int lane = thread % 32, warp = thread / 32;
    const auto largest = [&](int pixel, int channel, int step) {
      const int64_t at = image * from.strides[0] + pixel * from.strides[1];
      float result = 0;
#pragma unroll 8
      for (; channel < from.channels; channel += step)
        result = fmaxf(result, fabsf(value_of(from, feature(from, at + channel * from.strides[2]))));
      return result;
    };
    const auto store = [&](int pixel, float value) {
      const int exponent = exponent_of(value) + 1 - FEATURE_EXPONENT;  // beyond those of NaN and infinity is room
      store_global(units + int64_t{image} * p.pixels + pixel,
                   value > 0 ? power_of_two(exponent < -126 ? -126 : exponent) : 0.f);
    };
    if (from.strides[1] == 1) {  // each warp reads adjacent elements
      const Address of_warps = shared_memory();
      sync_block();
      store_shared(of_warps + 4 * thread, first + lane < p.pixels ? largest(first + lane, warp, WARPS) : 0.f);
      sync_block();
      if (warp > 0 || first + lane >= p.pixels) return;
      float value = 0;
      for (int i = 0; i < WARPS; ++i) value = fmaxf(value, load_shared<float>(of_warps + 4 * (32 * i + lane)));
      store(first + lane, value);
    } else {
      for (int pixel = first + warp; pixel < minimum(first + 32, p.pixels); pixel += WARPS) {
        float value = largest(pixel, lane, 32);
        for (int lanes = 1; lanes < 32; lanes *= 2) value = fmaxf(value, shuffle_xor(value, lanes));
        if (lane == 0) store(pixel, value);
      }
    }
  }

  SRPKD_DEVICE void measure_all() const {
    const int across = static_cast<int>(ceil_div(p.pixels, 32));
    for (int64_t i = block; i < int64_t{p.images} * across; i += p.work.grid)
      for (int network = 0; network < 2; ++network)
        measure(p.sources[network], p.measured_units[network], static_cast<int>(i / across),
                static_cast<int>(i % across) * 32);
  }

  static constexpr bool OF_PIXELS = C::SYMMETRIC || C::UNITS_OF_COLUMNS;  // pixels may have different units

  // Returns the unit of a pixel, given that of its own features and the largest of the image. K_ij times the units of
  // both pixels has about the same size for all pairs if K_ij is in proportion to 1 / q_i. Without alpha, and for
  // zero-norm pixels, it is not: they have the same unit. Features down to 2^-15 of the largest still have 24 bits as
  // two terms, down to 2^-27 11 bits as one. So row with one term has the same unit for all pixels, too.
  static SRPKD_DEVICE float choose_unit(const float* alpha, int64_t pixel, float own, float largest) {
    return OF_PIXELS && alpha && load_global(alpha + pixel) != 0 ? own : largest;
  }

  // --- the scales ---------------------------------------------------------------------------------------------------

  // The largest values of an image, none of which is 0. See largest_of.
  struct Largest {
    float alpha;     // of the student, times the unit of its pixel
    float units[2];  // of the student and the teacher
  };

  SRPKD_DEVICE float largest_of_block(float value) const {
    constexpr int WARPS = C::THREADS / 32;
    for (int lanes = 1; lanes < 32; lanes *= 2) value = fmaxf(value, shuffle_xor(value, lanes));
    const Address of_warps = shared_memory();
    sync_block();
    if (thread % 32 == 0) store_shared(of_warps + thread / 32 * 4, value);
    sync_block();
    for (int i = 0; i < WARPS; ++i) value = fmaxf(value, load_shared<float>(of_warps + i * 4));
    return value;
  }

  SRPKD_DEVICE Largest largest_of(int image) const {
    const bool of_pixels = OF_PIXELS && p.alpha_student;
    Largest result{};
    for (int i = thread; i < p.pixels; i += C::THREADS) {
      const int64_t pixel = int64_t{image} * p.pixels + i;
      const float unit = measured_unit(0, pixel);
      result.alpha = fmaxf(result.alpha, alpha_of(p.alpha_student, pixel) * (of_pixels ? unit : 1));
      result.units[0] = fmaxf(result.units[0], unit);
      if (with_units) result.units[1] = fmaxf(result.units[1], measured_unit(1, pixel));
    }
    float (&units)[2] = result.units;
    for (float& unit : units) unit = with_units ? largest_of_block(unit) : 1;
    // A network without any feature but 0 has the unit of the other, and does not raise the bound of K.
    if (units[0] == 0) units[0] = units[1] == 0 ? 1 : units[1];
    if (units[1] == 0) units[1] = units[0];
    // G_t in units of the student is finite: the relations of a much smaller student do not matter beside it.
    if (!p.alpha_student) units[0] = fmaxf(units[0], 0x1p-40f * units[1]);
    result.alpha = largest_of_block(of_pixels ? result.alpha : result.alpha * units[0]);
    // Without any alpha, those of scale_of are to be small beside it. 1 / norm of a row is in proportion to 1 / unit^2.
    if (result.alpha == 0) result.alpha = C::SYMMETRIC ? 1 : 0x1p-30f * reciprocal(units[0]);
    return result;
  }

  // Returns x such that |rho'(D)| <= 2^x for all pairs of an image. normalize="none" has only this bound: a feature is
  // below 2^14 of its unit.
  SRPKD_DEVICE int exponent_of_P(const Largest& largest) const {
    if (!with_units || C::L1 || p.alpha_student) return 1;
    const auto of_product = [&](int network) {  // |G_ij| < C 2^28 unit^2
      const int channels = exponent_of(static_cast<float>(p.sources[network].channels)) + 1;
      return channels + 2 * (FEATURE_EXPONENT + exponent_of(largest.units[network]));
    };
    const int student = of_product(0), teacher = of_product(1);
    return minimum((student > teacher ? student : teacher) + 1, exponent_of(p.delta) + 1);
  }

  // Returns the power of two that brings the largest alpha of the student to about 2^11, or 2^5 if two are multiplied
  // and |rho'| <= 2, so that K is in the range of float16: at most 2^14, and its error at most 2^-11 |K| + 2^-25.
  SRPKD_DEVICE float power_of(const Largest& largest) const {
    constexpr int EXPONENT_OF_K = 14;
    const int alpha = exponent_of(largest.alpha);
    if constexpr (!C::SYMMETRIC) return power_of_two(clamped(11 - alpha, 126));                 // K is a sum of two
    const int scaled_alpha = clamped(((EXPONENT_OF_K - exponent_of_P(largest)) >> 1) - 1, 62);  // its square is finite
    return power_of_two(clamped(scaled_alpha - alpha, 126));
  }

  // A pixel whose student has norm 0 has alpha 0 in the relation matrix, but D_ij = -alpha_t G_t. Its alpha here is so
  // small that G_s and K do not matter: with SMALL, K is 0 in float16. LEAST keeps the product of two ratios finite.
  static SRPKD_DEVICE PixelScale scale_of(float student, float teacher) {
    constexpr float LEAST = C::SYMMETRIC ? 0x1p-60f : 0x1p-100f, SMALL = C::SCALED ? 0x1p-36f : LEAST;
    if (student == 0 && teacher == 0) return {};
    const float alpha = student == 0 ? fmaxf(SMALL, LEAST * teacher) : student;
    return {alpha, teacher / alpha};
  }

  // The scales, the units and the zeros of h of a part of an image.
  SRPKD_DEVICE void prepare_pixels(int image, int part, int parts) const {
    const Largest largest = C::SCALED ? largest_of(image) : Largest{1, {1, 1}};
    const float power = C::SCALED ? power_of(largest) : 1;
    // alpha of row depends on the unit of column j, too: the largest, or relative to it in PixelScaleWithUnits
    const float common = C::SYMMETRIC ? 1 : largest.units[0];
    if (part == 0 && thread == 0) store_global(p.powers + image, power / common);
    const int end = static_cast<int>(int64_t{padded} * (part + 1) / parts);
    for (int i = static_cast<int>(int64_t{padded} * part / parts) + thread; i < end; i += C::THREADS) {
      const int64_t pixel = int64_t{image} * p.pixels + i, to = int64_t{image} * padded + i;
      typename C::Scale scale{};
      if (i < p.pixels) {
        float units[2] = {1, 1};
        if (with_units) {
          const float* const alphas[2] = {p.alpha_student, p.alpha_teacher};
          for (int network = 0; network < 2; ++network) {
            units[network] = choose_unit(alphas[network], pixel, measured_unit(network, pixel), largest.units[network]);
            store_global(p.units[network] + pixel, units[network]);
          }
        }
        const PixelScale own = scale_of(alpha_of(p.alpha_student, pixel) * units[0] * power,
                                        alpha_of(p.alpha_teacher, pixel) * units[1] * power);
        if constexpr (C::UNITS_OF_COLUMNS)
          scale = {own.alpha, own.ratio, units[0] / common, units[1] / units[0]};
        else
          scale = {own.alpha, C::SYMMETRIC ? own.ratio : own.ratio * (units[1] / units[0])};
      }
      store_global(static_cast<typename C::Scale*>(p.scales) + to, scale);
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
    using Element = typename C::Element;
    const uint32_t term = pack<Element>(value, 0.f);
    value -= as_float(widen<Element, false>(term));
    return term & 0xffff;
  }

  // Writes the terms of 64 pixels and 64 channels with adjacent pixels. Reads and writes adjacent elements; all loads
  // of a thread are under way together.
  SRPKD_DEVICE void split_tile(int network, int image, int first_pixel, int first_channel) const {
    const Source& from = p.sources[network];
    constexpr int SIDE = 64, COUNT = ceil_div(SIDE * SIDE, C::THREADS);
    constexpr int STRIDE = SIDE + 1;  // floats, so that both directions use all banks
    static_assert(C::THREADS % SIDE == 0);
    // calls f(n, pixel, channel) for this thread's elements of the tile, of which either pixels or channels are
    // adjacent
    const auto for_each = [&](bool pixels_adjacent, auto f) {
#pragma unroll
      for (int n = 0; n < COUNT; ++n) {
        const int i = thread + n * C::THREADS;
        const int pixel = pixels_adjacent ? i % SIDE : i / SIDE, channel = pixels_adjacent ? i / SIDE : i % SIDE;
        if (i < SIDE * SIDE && first_pixel + pixel < p.pixels && first_channel + channel < from.channels)
          f(n, pixel, channel);
      }
    };
    const bool pixels_adjacent = from.strides[1] == 1;
    const int64_t first = image * from.strides[0] + first_pixel * from.strides[1] + first_channel * from.strides[2];
    uint32_t bits[COUNT] = {};
    for_each(pixels_adjacent, [&](int n, int pixel, int channel) {
      bits[n] = feature(from, first + pixel * from.strides[1] + channel * from.strides[2]);
    });
    if (!pixels_adjacent) {  // transpose
      const Address tile = shared_memory();
      const auto place = [&](int pixel, int channel) { return tile + (channel * STRIDE + pixel) * 4; };
      sync_block();
      for_each(false, [&](int n, int pixel, int channel) { store_shared(place(pixel, channel), bits[n]); });
      sync_block();
      for_each(true, [&](int n, int pixel, int channel) { bits[n] = load_shared<uint32_t>(place(pixel, channel)); });
    }
    const int64_t of_thread = first_pixel + thread % SIDE;
    float factor = 1;
    if (with_units && of_thread < p.pixels)
      factor = reciprocal(load_global_coherent(p.units[network] + image * int64_t{p.pixels} + of_thread));
    for_each(true, [&](int n, int pixel, int channel) {
      float value = value_of(from, bits[n]) * factor;
      for (int term = 0; term < C::TERMS; ++term) {
        const int64_t line = (int64_t{image} * C::TERMS + term) * from.channels + first_channel + channel;
        if (from.element_bytes == 4 || with_units) bits[n] = take_term(value);
        store_global(from.terms + line * from.line + first_pixel + pixel, static_cast<uint16_t>(bits[n]));
      }
    });
  }

  // From the last tile to the first: their features may still be in L2 if units were measured, which starts with those
  // of the first pixels.
  SRPKD_DEVICE void split(int network) const {
    const Source& from = p.sources[network];
    const int across = static_cast<int>(ceil_div(p.pixels, 64)), down = static_cast<int>(ceil_div(from.channels, 64));
    const int64_t tiles = int64_t{p.images} * across * down;
    for (int64_t i = tiles - 1 - block; i >= 0; i -= p.work.grid)
      split_tile(network, static_cast<int>(i / (across * down)), static_cast<int>(i % across) * 64,
                 static_cast<int>(i / across % down) * 64);
  }

  SRPKD_DEVICE void run() const {
    if (with_units) {
      measure_all();
      sync_grid();
    }
    const int parts = p.images < p.work.grid ? p.work.grid / p.images : 1;
    for (int64_t unit = block; unit < int64_t{p.images} * parts; unit += p.work.grid)
      prepare_pixels(static_cast<int>(unit / parts), static_cast<int>(unit % parts), parts);
    zero(p.loss, p.loss_count);
    if constexpr (C::GRAD) zero(p.additions, p.additions_count);
    if (with_units) sync_grid();
    for (int network = 0; network < 2; ++network)
      if (p.sources[network].terms) split(network);
    // what follows is asynchronous: this thread's accesses to shared and global memory come first
    fence_async_proxy();
    fence_async_proxy_global();
    sync_grid();
    fence_async_proxy_global();
  }
};

}  // namespace srpkd::cuda::sm90
