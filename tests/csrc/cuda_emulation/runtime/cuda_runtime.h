// The parts of the CUDA runtime that csrc/cuda needs. Launches are recorded, and executed if `run` is set.
#pragma once

#include <algorithm>
#include <functional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#define CUDART_VERSION 13000
#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge,
  cudaErrorNotSupported = 801
};
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointSymbolNotFound };
constexpr unsigned long long cudaEnableDefault = 0;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrReservedSharedMemoryPerBlock,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrCooperativeLaunch
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative, cudaLaunchAttributeProgrammaticStreamSerialization };

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct cudaFuncAttributes {
  int ptxVersion;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative, programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  unsigned long dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace recorded {

// of the current GPU, and of the code that it has; a negative number: the runtime returns an error
inline int device = 0, major = 9, ptx_version = 90;
// of each GPU, in the order of cudaDeviceAttr, and the multiprocessors of the stream if they are fewer; by default
// `major`
inline std::vector<std::vector<int>> attributes;
inline int context = -1;  // the GPU of the thread's current context, or -1
inline int queries = 0;
struct Launch {
  cudaLaunchConfig_t config;
  bool early, cooperative;
};
inline std::vector<Launch> launches;
// kernels that may use all shared memory of a GPU, by its number and their addresses. csrc/cuda/shared_limit.h sets
// that once for a GPU, but tests give the same number to GPUs with more shared memory
inline std::set<std::pair<int, void*>> without_limit;
// executes a launch, whose threads call a function, and returns what went wrong, or ""
inline std::function<std::string(const Launch&, std::function<void()>)> run;
inline std::string problem;  // of the last launch
inline cudaError_t last_error = cudaSuccess;

}  // namespace recorded

inline cudaError_t cudaGetDevice(int* device) {
  if (recorded::device < 0) return cudaErrorInvalidDevice;
  *device = recorded::device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  recorded::device = recorded::context = device;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void**, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult*);
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = static_cast<int>(recorded::attributes.size());
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int device) {
  if (recorded::attributes.empty() && recorded::major < 0) return cudaErrorInvalidDevice;
  *value = recorded::attributes.empty() ? recorded::major : recorded::attributes.at(device).at(name);
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  ++recorded::queries;
  if (recorded::ptx_version == 0) return cudaErrorInvalidDevice;
  attributes->ptxVersion = recorded::ptx_version;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  ++recorded::queries;
  if (bytes < 0 || bytes != recorded::attributes.at(recorded::device).at(cudaDevAttrMaxSharedMemoryPerBlockOptin))
    return cudaErrorInvalidValue;
  recorded::without_limit.insert({recorded::device, reinterpret_cast<void*>(kernel)});
  return cudaSuccess;
}
// As many thread blocks as the shared memory of a multiprocessor and its 2,048 threads allow.
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int threads, unsigned long bytes) {
  ++recorded::queries;
  const std::vector<int>& of_gpu = recorded::attributes.at(recorded::device);
  if (of_gpu.at(cudaDevAttrMaxSharedMemoryPerMultiprocessor) < 0) return cudaErrorInvalidDevice;
  const int of_block = static_cast<int>(bytes) + of_gpu.at(cudaDevAttrReservedSharedMemoryPerBlock);
  *blocks = std::min(2048 / threads, of_gpu.at(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / std::max(of_block, 1));
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return std::exchange(recorded::last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) {
  static thread_local std::string text;
  text = error == cudaErrorLaunchFailure ? recorded::problem : "error " + std::to_string(error) + " of the runtime";
  return error == cudaSuccess ? "" : text.c_str();
}
template <class Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Arguments),
                               const Arguments& arguments) {
  recorded::Launch launch{*config, false, false};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    launch.early |= attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization &&
                    attribute.val.programmaticStreamSerializationAllowed;
    launch.cooperative |= attribute.id == cudaLaunchAttributeCooperative && attribute.val.cooperative;
  }
  recorded::launches.push_back(launch);
  if (!recorded::run) return cudaSuccess;

  const std::vector<int>& of_gpu = recorded::attributes.at(recorded::device);
  const int all = of_gpu.at(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int bytes = recorded::without_limit.count({recorded::device, reinterpret_cast<void*>(kernel)})
                        ? all
                        : std::min(all, 48 << 10);
  const dim3 grid = config->gridDim;
  if (static_cast<int>(config->dynamicSmemBytes) > bytes || config->blockDim.x > 1024 || grid.y > 65535 ||
      grid.x == 0 || grid.y == 0)
    return cudaErrorInvalidValue;
  if (launch.cooperative) {
    int blocks = 0;
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, config->blockDim.x, config->dynamicSmemBytes);
    if (!of_gpu.at(cudaDevAttrCooperativeLaunch)) return cudaErrorNotSupported;
    const int of_stream = of_gpu.size() > 6 ? of_gpu.at(6) : of_gpu.at(cudaDevAttrMultiProcessorCount);
    if (static_cast<int>(grid.x * grid.y) > blocks * of_stream) {
      recorded::launches.pop_back();
      return recorded::last_error = cudaErrorCooperativeLaunchTooLarge;
    }
  }
  recorded::problem = recorded::run(launch, [=] { kernel(arguments); });
  return recorded::problem.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}
