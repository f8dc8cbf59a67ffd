// Launches the kernels around the relation tiles on a GPU. Each of the files algebra_*.cu instantiates one element
// type, so that they compile in parallel, and only they need nvcc.
#pragma once

#include <cuda_runtime.h>

#include "../launches.h"
#include "../loss_plan.h"

#if defined(__CUDACC__)
#include <algorithm>

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
  run_in_order<Kernel>(arguments, BlockIndex{block_index(0), block_index(1)});
}
template <class... Kernels>
__global__ void __launch_bounds__(std::max({Kernels::THREADS...}), std::min({Kernels::MIN_BLOCKS...}))
    run_together(const __grid_constant__ Together<Kernels...> arguments) {
  run_phases(arguments.phases, arguments.grid);
}

constexpr int SHARED_WITHOUT_ATTRIBUTE = 48 << 10;  // bytes

// Starts kernels until the first error.
struct Launch {
  Launches& launches;
  cudaError_t error = cudaSuccess;

  // Launches phases that follow each other: together if their thread blocks are of one size, as those of small calls
  // are, see is_wide.
  template <class... Kernels>
  void operator()(const Phase<Kernels>&... phases) {
    if constexpr (sizeof...(Kernels) > 1 && std::min({Kernels::THREADS...}) == std::max({Kernels::THREADS...}))
      if (launches.together) {
        launch_together<run_together<Kernels...>>(phases...);
        if (error != cudaErrorCooperativeLaunchTooLarge) return;
        error = cudaSuccess, launches.together = 0;  // the stream has fewer multiprocessors, those of a green context
        cudaGetLastError();                          // which forgets the error
      }
    (launch(phases), ...);
  }

 private:
  template <class Kernel>
  void launch(const Phase<Kernel>& phase) {
    prepare<run<Kernel>>(phase.bytes);
    if (error == cudaSuccess)
      error = launches.launch<run<Kernel>>(dim3(phase.x, phase.y), Kernel::THREADS, phase.bytes, phase.arguments);
  }

  template <auto KERNEL, class... Kernels>
  void launch_together(const Phase<Kernels>&... phases) {
    constexpr int THREADS = std::max({Kernels::THREADS...});
    const int bytes = std::max({phases.bytes...}), most = std::max({phases.x * phases.y...});
    prepare<KERNEL>(bytes);
    int resident = 0;
    if (error == cudaSuccess) error = blocks_of_multiprocessor<KERNEL>(THREADS, bytes, resident);
    if (error != cudaSuccess) return;
    const int grid = std::min(most, resident * launches.together);
    error =
        launches.launch_cooperatively<KERNEL>(grid, THREADS, bytes, Together<Kernels...>{phases_of(phases...), grid});
  }

  template <auto KERNEL>
  void prepare(int bytes) {
    if (error == cudaSuccess && bytes > SHARED_WITHOUT_ATTRIBUTE) error = allow_all_shared_memory<KERNEL>();
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
