// The order of the kernels of the closed form, for the GPU and for the emulation: five for "row", four for "cosine",
// three for "none". Free of torch. See algebra/sequence.cuh for `launch`.
#pragma once

#include "../algebra/sequence.cuh"
#include "gradient.cuh"
#include "moments.cuh"
#include "row.cuh"

namespace srpkd::cuda::closed_form {

using algebra::KernelType;

// Launches Kernel<T, PIXELS_ADJACENT, whether it is the difference form>.
template <template <class, bool, bool> class Kernel, class T, bool PIXELS_ADJACENT, class Launch>
void launch_moments(const Arguments& p, Launch& launch) {
  const auto launch_form = [&](auto type) {
    using Sum = typename decltype(type)::type;
    launch(type, p, p.images * p.tiles.count(), p.ranges.splits, Sum::SHARED_BYTES);
  };
  if (p.difference)
    launch_form(KernelType<Kernel<T, PIXELS_ADJACENT, true>>{});
  else
    launch_form(KernelType<Kernel<T, PIXELS_ADJACENT, false>>{});
}

template <class T, bool PIXELS_ADJACENT, Normalize NORMALIZE, bool DETACH_NORMS = false, class Launch>
void launch_gradient(const Arguments& p, Launch& launch) {
  using Last = Gradient<T, PIXELS_ADJACENT, NORMALIZE, DETACH_NORMS>;
  const int row_blocks = p.images * static_cast<int>(ceil_div(p.pixels, BLOCK));
  launch(KernelType<Last>{}, p, p.loss_blocks + (p.gradient ? row_blocks : 0), 1, Last::SHARED_BYTES);
}

template <class T, bool PIXELS_ADJACENT, bool DIFFERENCE>
using ExactMoments = Moments<T, PIXELS_ADJACENT, DIFFERENCE, BFloat16>;
template <class T, bool PIXELS_ADJACENT, bool DIFFERENCE>
using MomentsOfUnitVectors = Moments<T, PIXELS_ADJACENT, DIFFERENCE, Half>;

template <class T, bool PIXELS_ADJACENT, class Launch>
void launch_loss(const Plan& plan, Launch& launch) {
  const Arguments& p = plan.arguments;
  const int row_blocks = p.images * static_cast<int>(ceil_div(p.pixels, BLOCK));
  const auto launch_sum = [&](auto type) {
    using Sum = typename decltype(type)::type;
    launch(type, p, p.images * p.tiles.count(), STRIPS, Sum::SHARED_BYTES);
  };
  if (plan.normalize == Normalize::cosine) {
    using Norms = algebra::PixelNorms<T, PIXELS_ADJACENT>;
    launch(KernelType<Norms>{}, plan.norms, 2 * row_blocks, 1, Norms::SHARED_BYTES);
    launch_moments<MomentsOfUnitVectors, T, PIXELS_ADJACENT>(p, launch);
    launch_sum(KernelType<SumMoments<Half>>{});
    if (plan.detach_norms) return launch_gradient<T, PIXELS_ADJACENT, Normalize::cosine, true>(p, launch);
    return launch_gradient<T, PIXELS_ADJACENT, Normalize::cosine>(p, launch);
  }
  launch_moments<ExactMoments, T, PIXELS_ADJACENT>(p, launch);
  launch_sum(KernelType<SumMoments<BFloat16>>{});
  if (plan.normalize == Normalize::none) return launch_gradient<T, PIXELS_ADJACENT, Normalize::none>(p, launch);
  using Scales = RowScales<T, PIXELS_ADJACENT>;
  launch(KernelType<Scales>{}, p, row_blocks, 1, Scales::SHARED_BYTES);
  if (plan.has_second) launch_moments<ScaledMoments, T, PIXELS_ADJACENT>(plan.second, launch);
  launch_gradient<T, PIXELS_ADJACENT, Normalize::row>(plan.has_second ? plan.second : p, launch);
}

}  // namespace srpkd::cuda::closed_form
