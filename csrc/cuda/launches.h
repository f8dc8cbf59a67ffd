// The kernel launches of a call, in order. A kernel may start while the one before it ends, see overlap.cuh.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace srpkd::cuda {

// Sets `waits` to whether a kernel executes wait_for_earlier_kernels on the current GPU. Code for an older architecture
// does not, not even if the driver has compiled it for this GPU. Asks once for a device.
template <auto KERNEL>
cudaError_t waits_for_earlier_kernels(bool& waits) {
  static std::atomic<uint64_t> asked{0}, waiting{0};  // a bit for each of the first 64 devices; false for others
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (!(asked.load(std::memory_order_acquire) & bit)) {
    cudaFuncAttributes attributes{};
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, KERNEL);
    if (error != cudaSuccess) return error;
    if (major >= 9 && attributes.ptxVersion >= 90) waiting.fetch_or(bit, std::memory_order_relaxed);
    asked.fetch_or(bit, std::memory_order_release);
  }
  waits = (waiting.load(std::memory_order_relaxed) & bit) != 0;
  return cudaSuccess;
}

// Sets `blocks` to how many thread blocks of a kernel a multiprocessor of the current GPU holds. Asks if the GPU or the
// bytes are others than in the last call.
template <auto KERNEL>
cudaError_t blocks_of_multiprocessor(int threads, int bytes, int& blocks) {
  static std::atomic<uint64_t> last{0};  // the GPU, the bytes, and the blocks
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const uint64_t key = static_cast<uint64_t>(device) << 40 | static_cast<uint64_t>(bytes) << 8;
  const uint64_t known = last.load(std::memory_order_relaxed);
  blocks = known & 255;
  if (blocks && known - blocks == key) return cudaSuccess;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, KERNEL, threads, bytes);
  if (error == cudaSuccess) last.store(key + blocks, std::memory_order_relaxed);
  return error;
}

struct Launches {
  cudaStream_t stream;
  bool overlap = false;  // whether kernels after the first may start early: SRPKD_CUDA_OVERLAP
  int together = 0;      // multiprocessors for launches of several phases; 0 if there are none: SRPKD_CUDA_TOGETHER
  bool any = false;      // whether a kernel of this call has been launched

  // Launches a kernel that begins with run_in_order.
  template <auto KERNEL, class Arguments>
  cudaError_t launch(dim3 grid, int threads, int bytes, const Arguments& arguments) {
    bool early = false;
    if (overlap && any) {
      const cudaError_t error = waits_for_earlier_kernels<KERNEL>(early);
      if (error != cudaSuccess) return error;
    }
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    return launch_with<KERNEL>(early ? &attribute : nullptr, grid, threads, bytes, arguments);
  }

  // Launches a kernel whose thread blocks wait for each other: all are resident. It does not start early.
  template <auto KERNEL, class Arguments>
  cudaError_t launch_cooperatively(int grid, int threads, int bytes, const Arguments& arguments) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeCooperative, attribute.val.cooperative = 1;
    return launch_with<KERNEL>(&attribute, dim3(grid), threads, bytes, arguments);
  }

  // `attribute`: null for none.
  template <auto KERNEL, class Arguments>
  cudaError_t launch_with(cudaLaunchAttribute* attribute, dim3 grid, int threads, int bytes,
                          const Arguments& arguments) {
    any = true;
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = bytes, config.stream = stream;
    config.attrs = attribute, config.numAttrs = attribute ? 1 : 0;
    return cudaLaunchKernelEx(&config, KERNEL, arguments);
  }
};

}  // namespace srpkd::cuda
