#include "../sm90/algebra_sums.cuh"
#include "launch.h"

namespace srpkd::cuda::algebra {

template cudaError_t scales<BFloat16>(const ScalesPlan&, bool, Launches&);
template cudaError_t gradient<BFloat16, SumsOfSplits>(const GradientPlan<SumsOfSplits>&, bool, Launches&);
template cudaError_t gradient<BFloat16, sm90::SumsOfSegments>(const GradientPlan<sm90::SumsOfSegments>&, bool,
                                                              Launches&);
template cudaError_t backward<BFloat16>(const BackwardArguments&, cudaStream_t);

}  // namespace srpkd::cuda::algebra
