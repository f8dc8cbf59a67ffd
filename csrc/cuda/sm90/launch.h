// Launches the kernels. Each of the files sm90_*.cu instantiates those of one precision and half of the
// normalisations, so that they compile in parallel, and only they need nvcc.
#pragma once

#include <cuda_runtime.h>

#include "../launches.h"
#include "tile_plan.h"

#if defined(__CUDACC__)
#include "../shared_limit.h"
#include "relation_tiles.cuh"
#endif

namespace srpkd::cuda::sm90 {

// Computes the tiles of a plan for this precision, and for row (SYMMETRIC false) or for cosine and none.
template <Precision PRECISION, bool SYMMETRIC>
cudaError_t launch(const TilePlan& plan, Launches& launches);

#if defined(__CUDACC__)
// Launches one kernel. `plan` is of its precision and variant.
template <class C>
cudaError_t launch_kernel(const TilePlan& plan, Launches& launches) {
  Params p = plan.params;
  cudaError_t error = encode(plan.student, p.student);
  if (error == cudaSuccess) error = encode(plan.teacher, p.teacher);
  if (error == cudaSuccess) error = allow_all_shared_memory<relation_tiles<C>>();
  if (error != cudaSuccess) return error;
  return launches.launch_cooperatively<relation_tiles<C>>(p.work.grid, C::THREADS, C::bytes(p), p);
}

template <Precision PRECISION, bool SYMMETRIC>
cudaError_t launch(const TilePlan& plan, Launches& launches) {
  return with_config(std::integral_constant<Precision, PRECISION>{}, plan.variant, [&](auto config) {
    using C = decltype(config);
    if constexpr (C::SYMMETRIC == SYMMETRIC)
      return launch_kernel<C>(plan, launches);
    else
      return cudaErrorInvalidValue;  // another instantiation has these kernels
  });
}
#else
inline cudaError_t launch(const TilePlan& plan, Launches& launches) {
  return with_precision(plan.precision, [&](auto chosen) {
    constexpr Precision PRECISION = decltype(chosen)::value;
    return plan.variant.symmetric ? launch<PRECISION, true>(plan, launches) : launch<PRECISION, false>(plan, launches);
  });
}
#endif

}  // namespace srpkd::cuda::sm90
