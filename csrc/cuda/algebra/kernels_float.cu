#include "launch.h"

namespace srpkd::cuda::algebra {

template cudaError_t scales<float>(const LossPlan&, bool, cudaStream_t);
template cudaError_t gradient<float, SumsOfSplits>(const WeightedMomentArguments<SumsOfSplits>&,
                                                   const GradientArguments<SumsOfSplits>&, bool, bool, cudaStream_t);

}  // namespace srpkd::cuda::algebra
