// The order of the kernels of the closed form, for the GPU and for the emulation: four for "cosine", three for "none".
// Free of torch. See algebra/sequence.cuh for `launch`.
#pragma once

#include "../algebra/sequence.cuh"
#include "gradient.cuh"
#include "moments.cuh"

namespace srpkd::cuda::closed_form {

using algebra::KernelType;

template <class T, bool PIXELS_ADJACENT, bool DIFFERENCE, class Launch>
void launch_moments(const Arguments& p, Launch& launch) {
  using Sum = Moments<T, PIXELS_ADJACENT, DIFFERENCE>;
  launch(KernelType<Sum>{}, p, p.images * p.tiles.count(), p.ranges.splits, Sum::SHARED_BYTES);
}

template <class T, bool PIXELS_ADJACENT, class Launch>
void launch_loss(const Plan& plan, Launch& launch) {
  const Arguments& p = plan.arguments;
  const int row_blocks = p.images * static_cast<int>(ceil_div(p.pixels, BLOCK));
  if (plan.normalize == Normalize::cosine) {
    using Norms = algebra::PixelNorms<T, PIXELS_ADJACENT>;
    launch(KernelType<Norms>{}, plan.norms, 2 * row_blocks, 1, Norms::SHARED_BYTES);
  }
  if (p.difference)
    launch_moments<T, PIXELS_ADJACENT, true>(p, launch);
  else
    launch_moments<T, PIXELS_ADJACENT, false>(p, launch);
  launch(KernelType<SumMoments>{}, p, p.images * p.tiles.count(), 1, SumMoments::SHARED_BYTES);
  const auto launch_last = [&](auto kernel) {
    using Last = typename decltype(kernel)::type;
    launch(kernel, p, p.loss_blocks + (p.gradient ? row_blocks : 0), 1, Last::SHARED_BYTES);
  };
  if (plan.detach_norms)
    launch_last(KernelType<Gradient<T, PIXELS_ADJACENT, true>>{});
  else
    launch_last(KernelType<Gradient<T, PIXELS_ADJACENT>>{});
}

}  // namespace srpkd::cuda::closed_form
