// Launches the kernels of one precision. Each of the files sm80_*.cu instantiates one precision, rectified or not,
// so that they compile in parallel, and only they need nvcc.
#pragma once

#include <cuda_runtime.h>

#include "../launches.h"
#include "plan.h"

#if defined(__CUDACC__)
#include "../shared_limit.h"
#include "relation_tiles.cuh"
#endif

namespace srpkd::cuda::sm80 {

template <Precision PRECISION, bool RECTIFY>
cudaError_t launch(const Params& p, bool pixels_adjacent, int u_channels, Launches& launches);

#if defined(__CUDACC__)
template <Precision PRECISION, bool RECTIFY>
cudaError_t launch(const Params& p, bool pixels_adjacent, int u_channels, Launches& launches) {
  const auto run = [&](auto config) {
    using C = decltype(config);
    const int bytes = shared_bytes<C>(p);
    const cudaError_t error = allow_all_shared_memory<relation_tiles<C>>();
    if (error != cudaSuccess) return error;
    return launches.launch<relation_tiles<C>>(dim3(p.images * p.channel_splits * p.blocks, p.splits), C::THREADS, bytes,
                                              p);
  };
  return with_config<RECTIFY>(std::integral_constant<Precision, PRECISION>{}, pixels_adjacent, u_channels, run);
}
#else
inline cudaError_t launch(const Params& p, Precision precision, bool pixels_adjacent, int u_channels,
                          Launches& launches) {
  return with_precision(precision, [&](auto chosen) {
    constexpr Precision PRECISION = decltype(chosen)::value;
    return p.rectify ? launch<PRECISION, true>(p, pixels_adjacent, u_channels, launches)
                     : launch<PRECISION, false>(p, pixels_adjacent, u_channels, launches);
  });
}
#endif

}  // namespace srpkd::cuda::sm80
