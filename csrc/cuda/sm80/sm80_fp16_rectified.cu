#include "launch.h"

template cudaError_t srpkd::cuda::sm80::launch<srpkd::cuda::Precision::fp16, true>(const Params&, bool, int, Launches&);
