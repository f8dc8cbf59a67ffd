#include "../sm90/algebra_sums.cuh"
#include "launch.h"

namespace srpkd::cuda::algebra {

template cudaError_t scales<float>(const ScalesPlan&, bool, Launches&);
template cudaError_t gradient<float, SumsOfSplits>(const GradientPlan<SumsOfSplits>&, bool, Launches&);
template cudaError_t gradient<float, sm90::SumsOfSegments>(const GradientPlan<sm90::SumsOfSegments>&, bool, Launches&);
template cudaError_t backward<float>(const BackwardArguments&, cudaStream_t);

}  // namespace srpkd::cuda::algebra
