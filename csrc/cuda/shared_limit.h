// How much shared memory a kernel may use. Needs nvcc.
#pragma once

#include <cuda_runtime.h>

namespace srpkd::cuda {

// Lets a kernel without static shared memory use all that a thread block can have. The limit does not depend on the
// launch, because another thread may start the same kernel with another size at the same time.
template <class Kernel>
cudaError_t allow_all_shared_memory(Kernel kernel) {
  int device = 0, bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  return error;
}

}  // namespace srpkd::cuda
