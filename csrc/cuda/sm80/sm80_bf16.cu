#include "launch.h"

template cudaError_t srpkd::cuda::sm80::launch<srpkd::cuda::Precision::bf16, false>(const Params&, bool, int,
                                                                                    Launches&);
