// Launches the kernels of a planned loss: scales, tiles, gradient. Free of torch.
#pragma once

#include "algebra/launch.h"
#include "sm80/launch.h"
#include "sm90/launch.h"
#include "sm90_loss_plan.h"

namespace srpkd::cuda {

inline cudaError_t launch_tiles(const LossPlan& plan, const LossArguments& a, Launches& launches) {
  return sm80::launch(plan.tiles, a.precision, a.pixels_adjacent, plan.u_channels, launches);
}
inline cudaError_t launch_tiles(const Sm90LossPlan& plan, const LossArguments&, Launches& launches) {
  return sm90::launch(plan.tiles, launches);
}

// T: the element type of the features. Returns the first error.
template <class T, class Plan>
cudaError_t launch_loss(const Plan& plan, const LossArguments& a, Launches& launches) {
  cudaError_t error = algebra::scales<T>(plan.scales, a.pixels_adjacent, launches);
  if (error == cudaSuccess) error = launch_tiles(plan, a, launches);
  return error == cudaSuccess ? algebra::gradient<T>(plan.gradient, a.pixels_adjacent, launches) : error;
}

}  // namespace srpkd::cuda
