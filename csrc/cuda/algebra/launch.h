// Launches the kernels around the relation tiles on a GPU. Each of the files algebra_*.cu instantiates one element
// type, so that they compile in parallel, and only they need nvcc.
#pragma once

#include <cuda_runtime.h>

#include "../launches.h"
#include "../loss_plan.h"

#if defined(__CUDACC__)
#include "../overlap.cuh"
#include "../shared_limit.h"
#include "sequence.cuh"
#endif

namespace srpkd::cuda::algebra {

// T: BFloat16, Half or float, the element type of the features.
template <class T>
cudaError_t scales(const ScalesPlan& plan, bool pixels_adjacent, Launches& launches);

template <class T, class SumsOfTiles>
cudaError_t gradient(const GradientPlan<SumsOfTiles>& plan, bool pixels_adjacent, Launches& launches);

// T: the element type of the result.
template <class T>
cudaError_t backward(const BackwardArguments& p, cudaStream_t stream);

#if defined(__CUDACC__)
template <class Kernel>
__global__ void __launch_bounds__(Kernel::THREADS, Kernel::MIN_BLOCKS)
    run(const __grid_constant__ typename Kernel::Arguments arguments) {
  run_in_order<Kernel>(arguments);
}

constexpr int SHARED_WITHOUT_ATTRIBUTE = 48 << 10;  // bytes

// Starts kernels until the first error.
struct Launch {
  Launches& launches;
  cudaError_t error = cudaSuccess;

  template <class Kernel>
  void operator()(KernelType<Kernel>, const typename Kernel::Arguments& arguments, int x, int y, int bytes) {
    if (error == cudaSuccess && bytes > SHARED_WITHOUT_ATTRIBUTE) error = allow_all_shared_memory<run<Kernel>>();
    if (error == cudaSuccess) error = launches.launch<run<Kernel>>(dim3(x, y), Kernel::THREADS, bytes, arguments);
  }
};

template <class T>
cudaError_t scales(const ScalesPlan& plan, bool pixels_adjacent, Launches& launches) {
  Launch launch{launches};
  if (pixels_adjacent)
    launch_scales<T, true>(plan, launch);
  else
    launch_scales<T, false>(plan, launch);
  return launch.error;
}

template <class T, class SumsOfTiles>
cudaError_t gradient(const GradientPlan<SumsOfTiles>& plan, bool pixels_adjacent, Launches& launches) {
  Launch launch{launches};
  if (pixels_adjacent)
    launch_gradient<T, true>(plan, launch);
  else
    launch_gradient<T, false>(plan, launch);
  return launch.error;
}

template <class T>
cudaError_t backward(const BackwardArguments& p, cudaStream_t stream) {
  Launches launches{stream};
  Launch launch{launches};
  launch_backward<T>(p, launch);
  return launch.error;
}
#endif

}  // namespace srpkd::cuda::algebra
