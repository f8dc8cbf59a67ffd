// Selects the kernel and partitions the work for a GPU. Compiles and runs without one.
#pragma once

#include "config.h"

namespace srpkd::cuda::sm80 {

constexpr int64_t MAX_SPLIT_BYTES = 64 << 20;  // of U, which each split of the columns has its own copy of

// Returns the widest unit, 16, 4 or 2 bytes, in which features can be copied; strides in elements.
inline int copy_bytes(const void* data, int64_t image_stride, int64_t line_stride, int element_bytes) {
  const auto bits = reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(image_stride * element_bytes) |
                    static_cast<uintptr_t>(line_stride * element_bytes);
  return bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : 2;
}

// Calls f(Config<...>{}) for one precision, an integral_constant.
template <bool RECTIFY = false, class P, class F>
auto with_config(P, bool pixels_adjacent, int u_channels, F f) {
  const auto with_layout = [&](auto adjacent) {
    constexpr bool ADJACENT = decltype(adjacent)::value;
    if (u_channels == 0) return f(Config<P::value, ADJACENT, 0, RECTIFY>{});
    if (u_channels == 64) return f(Config<P::value, ADJACENT, 64, RECTIFY>{});
    return f(Config<P::value, ADJACENT, 128, RECTIFY>{});
  };
  return pixels_adjacent ? with_layout(std::true_type{}) : with_layout(std::false_type{});
}

// Calls f with the precision as an integral_constant.
template <class F>
auto with_precision(Precision precision, F f) {
  switch (precision) {
    case Precision::bf16:
      return f(std::integral_constant<Precision, Precision::bf16>{});
    case Precision::fp16:
      return f(std::integral_constant<Precision, Precision::fp16>{});
    case Precision::tf32:
      return f(std::integral_constant<Precision, Precision::tf32>{});
    default:
      return f(std::integral_constant<Precision, Precision::tf32x3>{});
  }
}

// Sets the parameters that follow from the sizes of a kernel, with as many resident row panels as `shared_limit` bytes
// allow. Returns the bytes of shared memory required, which exceed the limit if the ring alone does not fit.
template <class C>
int fill_sizes(Params& p, int shared_limit) {
  for (int i = 0; i < 2; ++i) p.panels[i] = static_cast<int>(ceil_div(p.features[i].channels, C::PANEL_CHANNELS));
  p.blocks = static_cast<int>(ceil_div(p.pixels, TILE));
  p.channel_splits = C::GRAD ? static_cast<int>(ceil_div(p.features[STUDENT].channels, C::U_CHANNELS)) : 1;
  p.resident = minimum(p.panels[TEACHER] + p.panels[STUDENT], shared_limit / PANEL);
  if (shared_bytes<C>(p) > shared_limit) {
    p.resident = 0;
    if (shared_bytes<C>(p) < shared_limit) p.resident = (shared_limit - shared_bytes<C>(p)) / PANEL;
  }
  return shared_bytes<C>(p);
}

// Returns the number of splits of the columns that takes the least time on a GPU that runs `concurrent` thread blocks
// at once. A thread block takes one step per column block, and about two more to start and to finish.
template <class C>
int best_splits(const Params& p, int concurrent) {
  const int64_t blocks = int64_t{p.images} * p.blocks * p.channel_splits;
  const int64_t steps = walk_of(0, p.blocks, C::GRAD, 0, 1).steps;
  const int64_t U_bytes = C::GRAD ? int64_t{p.images} * p.pixels * p.features[STUDENT].channels * 4 : 0;
  int64_t best = 1, least = INT64_MAX;
  for (int64_t splits = 1; splits <= steps && (splits == 1 || splits * U_bytes <= MAX_SPLIT_BYTES); ++splits) {
    const int64_t time = ceil_div(blocks * splits, concurrent) * (ceil_div(steps, splits) + 2);
    if (time < least) best = splits, least = time;
  }
  return static_cast<int>(best);
}

// Sets all parameters that follow from the features, and returns the number of channels of U that a thread block
// computes: 64, or 128 if the student has more than 64 and the ring fits. Further channels are computed by further
// thread blocks, each of which computes K again.
inline int plan(Params& p, Precision precision, bool grad, const Device& device) {
  return with_precision(precision, [&](auto chosen) {
    int channels = !grad ? 0 : p.features[STUDENT].channels <= 64 ? 64 : 128;
    const auto fits = [&](auto config) {
      using C = decltype(config);
      const int bytes = fill_sizes<C>(p, device.shared_of_block);
      const int concurrent = minimum(C::MIN_BLOCKS, device.shared_of_multiprocessor / (bytes + device.shared_reserved));
      p.splits = best_splits<C>(p, device.multiprocessors * (concurrent < 1 ? 1 : concurrent));
      return bytes <= device.shared_of_block;
    };
    if (!with_config(chosen, false, channels, fits) && channels == 128) with_config(chosen, false, channels = 64, fits);
    return channels;
  });
}

}  // namespace srpkd::cuda::sm80
