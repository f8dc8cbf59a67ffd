#include "launch.h"

template cudaError_t srpkd::cuda::sm90::launch<srpkd::cuda::Precision::fp16, true>(const TilePlan&, Launches&);
