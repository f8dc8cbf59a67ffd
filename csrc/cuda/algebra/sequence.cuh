// The order of the kernels before and after the relation tiles, for the GPU and for the emulation. Free of torch.
//
// launch(phases...) starts kernels that follow each other, see phases.cuh and launch.h.
#pragma once

#include "../loss_plan.h"
#include "backward.cuh"
#include "gradient.cuh"
#include "moments.cuh"
#include "norms.cuh"
#include "phases.cuh"

namespace srpkd::cuda::algebra {

template <class T, bool PIXELS_ADJACENT, int WARPS_M, class Launch>
void launch_row_norms(const ScalesPlan& plan, Launch& launch) {
  using Sum = Moments<T, PIXELS_ADJACENT>;
  using Norms = RowNorms<T, PIXELS_ADJACENT, WARPS_M>;
  using Finish = FinishMoments<Norms::THREADS>;
  const MomentArguments& p = plan.moments.sums;
  const int blocks = p.images * (tiles_of(p.features[TEACHER].channels) + tiles_of(p.features[STUDENT].channels));
  launch(Phase<Sum>{p, blocks, p.ranges.splits, Sum::SHARED_BYTES},
         Phase<Finish>{plan.moments, blocks, STRIPS, Finish::SHARED_BYTES},
         Phase<Norms>{plan.norms, 2 * p.images * static_cast<int>(ceil_div(p.pixels, Norms::G::ROWS)), 1,
                      plan.norms.resident * Norms::FEATURE_BYTES + plan.norms.slots * Norms::MATRIX_BYTES});
}

// Computes alpha of both networks and, for "row", M of the student.
template <class T, bool PIXELS_ADJACENT, class Launch>
void launch_scales(const ScalesPlan& plan, Launch& launch) {
  if (plan.normalize == Normalize::row)
    return plan.wide ? launch_row_norms<T, PIXELS_ADJACENT, 4>(plan, launch)
                     : launch_row_norms<T, PIXELS_ADJACENT, 2>(plan, launch);
  if (plan.normalize == Normalize::cosine) {
    using Norms = PixelNorms<T, PIXELS_ADJACENT>;
    launch(Phase<Norms>{plan.norms, 2 * plan.norms.images * static_cast<int>(ceil_div(plan.norms.pixels, BLOCK)), 1,
                        Norms::SHARED_BYTES});
  }
}

template <class T, bool PIXELS_ADJACENT, int WARPS_M, class SumsOfTiles, class Launch>
void launch_gradient_of(const GradientPlan<SumsOfTiles>& plan, Launch& launch) {
  using Sum = WeightedMoment<T, PIXELS_ADJACENT, SumsOfTiles>;
  using Kernel = Gradient<T, PIXELS_ADJACENT, WARPS_M, SumsOfTiles>;
  const GradientArguments<SumsOfTiles>& p = plan.gradient;
  const WeightedMomentArguments<SumsOfTiles>& w = plan.weighted;
  const int row_blocks = static_cast<int>(ceil_div(p.pixels, Kernel::G::ROWS));
  const int blocks = p.gradient ? p.images * row_blocks * blocks_of(p.features.channels) : 0;
  const bool products = p.gradient && p.normalize == Normalize::row;
  const Phase<Kernel> last{p, p.loss_blocks + blocks, 1,
                           products ? Kernel::ROW_SHARED_BYTES : Kernel::OTHER_SHARED_BYTES};
  if (!products) return launch(last);
  const int tiles = w.images * tiles_of(w.features.channels);
  const Phase<Sum> sum{w, tiles, w.ranges.splits, Sum::SHARED_BYTES};
  if constexpr (WARPS_M == 2) {
    using Finish = FinishWeightedMoment<Kernel::THREADS, SumsOfTiles>;
    launch(sum, Phase<Finish>{w, tiles, STRIPS, Finish::SHARED_BYTES}, last);
  } else {
    launch(sum, last);
  }
}

// Computes the loss and, if required, the gradient from the sums of the tiles.
template <class T, bool PIXELS_ADJACENT, class SumsOfTiles, class Launch>
void launch_gradient(const GradientPlan<SumsOfTiles>& plan, Launch& launch) {
  if (plan.wide)
    launch_gradient_of<T, PIXELS_ADJACENT, 4>(plan, launch);
  else
    launch_gradient_of<T, PIXELS_ADJACENT, 2>(plan, launch);
}

}  // namespace srpkd::cuda::algebra
