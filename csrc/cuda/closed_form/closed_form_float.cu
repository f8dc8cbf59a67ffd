#include "launch.h"

namespace srpkd::cuda::closed_form {

template cudaError_t loss<float>(const Plan&, bool, Launches&);

}  // namespace srpkd::cuda::closed_form
