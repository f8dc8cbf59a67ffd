// Launches the kernels of the closed form on a GPU. Each of the files closed_form_*.cu instantiates one element type.
#pragma once

#include "../algebra/launch.h"
#include "arguments.h"

#if defined(__CUDACC__)
#include "sequence.cuh"
#endif

namespace srpkd::cuda::closed_form {

// T: BFloat16, Half or float, the element type of the features.
template <class T>
cudaError_t loss(const Plan& plan, bool pixels_adjacent, Launches& launches);

#if defined(__CUDACC__)
template <class T>
cudaError_t loss(const Plan& plan, bool pixels_adjacent, Launches& launches) {
  algebra::Launch launch{launches};
  if (pixels_adjacent)
    launch_loss<T, true>(plan, launch);
  else
    launch_loss<T, false>(plan, launch);
  return launch.error;
}
#endif

}  // namespace srpkd::cuda::closed_form
