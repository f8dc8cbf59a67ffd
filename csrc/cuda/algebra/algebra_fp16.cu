#include "../sm90/algebra_sums.cuh"
#include "launch.h"

namespace srpkd::cuda::algebra {

template cudaError_t scales<Half>(const ScalesPlan&, bool, Launches&);
template cudaError_t gradient<Half, SumsOfSplits>(const GradientPlan<SumsOfSplits>&, bool, Launches&);
template cudaError_t gradient<Half, sm90::SumsOfSegments>(const GradientPlan<sm90::SumsOfSegments>&, bool, Launches&);
template cudaError_t backward<Half>(const BackwardArguments&, cudaStream_t);

}  // namespace srpkd::cuda::algebra
