#include "launch.h"

template cudaError_t srpkd::cuda::sm90::launch<srpkd::cuda::Precision::tf32x3, false>(const TilePlan&, Launches&);
