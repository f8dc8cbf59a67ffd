#include "launch.h"

template cudaError_t srpkd::cuda::sm80::launch<srpkd::cuda::Precision::tf32, false>(const Params&, bool, int,
                                                                                    Launches&);
