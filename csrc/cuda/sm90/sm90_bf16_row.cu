#include "launch.h"

template cudaError_t srpkd::cuda::sm90::launch<srpkd::cuda::Precision::bf16, false>(const TilePlan&, Launches&);
