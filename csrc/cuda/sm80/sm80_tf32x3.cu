#include "launch.h"

template cudaError_t srpkd::cuda::sm80::launch<srpkd::cuda::Precision::tf32x3, false>(const Params&, bool, int,
                                                                                      Launches&);
