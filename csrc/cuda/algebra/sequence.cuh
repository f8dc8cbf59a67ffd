// The order of the kernels before and after the relation tiles, for the GPU and for the emulation. Free of torch.
//
// launch(kernel type, arguments, x, y, bytes of shared memory) starts a grid of x * y thread blocks.
#pragma once

#include "../loss_plan.h"
#include "backward.cuh"
#include "gradient.cuh"
#include "moments.cuh"
#include "norms.cuh"

namespace srpkd::cuda::algebra {

template <class T, bool PIXELS_ADJACENT, int WARPS_M, class Launch>
void launch_row_norms(const NormArguments& p, Launch& launch) {
  using Norms = RowNorms<T, PIXELS_ADJACENT, WARPS_M>;
  launch(KernelType<Norms>{}, p, 2 * p.images * static_cast<int>(ceil_div(p.pixels, Norms::G::ROWS)), 1,
         p.resident * Norms::FEATURE_BYTES + 2 * Norms::MATRIX_BYTES);
}

// Computes alpha of both networks and, for "row", M of the student.
template <class T, bool PIXELS_ADJACENT, class Launch>
void launch_scales(const ScalesPlan& plan, Launch& launch) {
  if (plan.normalize == Normalize::row) {
    using Sum = Moments<T, PIXELS_ADJACENT>;
    const MomentArguments& p = plan.moments.sums;
    const int blocks = p.images * (tiles_of(p.features[TEACHER].channels) + tiles_of(p.features[STUDENT].channels));
    launch(KernelType<Sum>{}, p, blocks, p.ranges.splits, Sum::SHARED_BYTES);
    launch(KernelType<FinishMoments>{}, plan.moments, blocks, STRIPS, FinishMoments::SHARED_BYTES);
    if (plan.wide)
      launch_row_norms<T, PIXELS_ADJACENT, 4>(plan.norms, launch);
    else
      launch_row_norms<T, PIXELS_ADJACENT, 2>(plan.norms, launch);
  }
  if (plan.normalize == Normalize::cosine) {
    using Norms = PixelNorms<T, PIXELS_ADJACENT>;
    launch(KernelType<Norms>{}, plan.norms,
           2 * plan.norms.images * static_cast<int>(ceil_div(plan.norms.pixels, BLOCK)), 1, Norms::SHARED_BYTES);
  }
}

template <class T, bool PIXELS_ADJACENT, int WARPS_M, class SumsOfTiles, class Launch>
void launch_gradient_of(const GradientArguments<SumsOfTiles>& p, Launch& launch) {
  using Kernel = Gradient<T, PIXELS_ADJACENT, WARPS_M, SumsOfTiles>;
  const int row_blocks = static_cast<int>(ceil_div(p.pixels, Kernel::G::ROWS));
  const int blocks = p.gradient ? p.images * row_blocks * blocks_of(p.features.channels) : 0;
  const bool products = p.gradient && p.normalize == Normalize::row;
  launch(KernelType<Kernel>{}, p, p.loss_blocks + blocks, 1,
         products ? Kernel::ROW_SHARED_BYTES : Kernel::OTHER_SHARED_BYTES);
}

// Computes the loss and, if required, the gradient from the sums of the tiles.
template <class T, bool PIXELS_ADJACENT, class SumsOfTiles, class Launch>
void launch_gradient(const GradientPlan<SumsOfTiles>& plan, Launch& launch) {
  if (plan.gradient.gradient && plan.gradient.normalize == Normalize::row) {
    using Sum = WeightedMoment<T, PIXELS_ADJACENT, SumsOfTiles>;
    const WeightedMomentArguments<SumsOfTiles>& p = plan.weighted;
    launch(KernelType<Sum>{}, p, p.images * tiles_of(p.features.channels), p.ranges.splits, Sum::SHARED_BYTES);
  }
  if (plan.wide)
    launch_gradient_of<T, PIXELS_ADJACENT, 4>(plan.gradient, launch);
  else
    launch_gradient_of<T, PIXELS_ADJACENT, 2>(plan.gradient, launch);
}

}  // namespace srpkd::cuda::algebra
