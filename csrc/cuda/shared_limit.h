// How much shared memory a kernel may use. Needs nvcc.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace srpkd::cuda {

// Lets a kernel without static shared memory use all that a thread block can have. The limit does not depend on the
// launch, because another thread may start the same kernel with another size at the same time. Set once for a device.
template <auto KERNEL>
cudaError_t allow_all_shared_memory() {
  static std::atomic<uint64_t> done{0};  // a bit for each of the first 64 devices
  int device = 0, bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (done.load(std::memory_order_acquire) & bit) return cudaSuccess;
  error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) done.fetch_or(bit, std::memory_order_release);
  return error;
}

}  // namespace srpkd::cuda
