#include "launch.h"

namespace srpkd::cuda::algebra {

template cudaError_t scales<BFloat16>(const LossPlan&, bool, cudaStream_t);
template cudaError_t gradient<BFloat16, SumsOfSplits>(const WeightedMomentArguments<SumsOfSplits>&,
                                                      const GradientArguments<SumsOfSplits>&, bool, bool, cudaStream_t);

}  // namespace srpkd::cuda::algebra
