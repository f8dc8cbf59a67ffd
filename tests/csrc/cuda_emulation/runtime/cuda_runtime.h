// The parts of the CUDA runtime that launches.h, shared_limit.h and sm90/tensor_map.h in csrc/cuda need, for a GPU that
// only records.
#pragma once

#include <vector>

#define CUDART_VERSION 13000

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidDevice = 101, cudaErrorNotSupported = 801 };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointSymbolNotFound };
constexpr unsigned long long cudaEnableDefault = 0;
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrMaxSharedMemoryPerBlockOptin };
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

inline int device = 0, major = 9, ptx_version = 90;  // of the current GPU, and of the code that it has
inline int context = -1;                             // the GPU of the thread's current context, or -1
inline int queries = 0;
inline std::vector<cudaLaunchConfig_t> launches;
inline std::vector<bool> early;  // whether each of them may start early

}  // namespace recorded

inline cudaError_t cudaGetDevice(int* device) {
  *device = recorded::device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  recorded::device = recorded::context = device;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void**, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult*);
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = recorded::major;
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
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <class Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*)(Arguments), const Arguments&) {
  bool early = false;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    early |= config->attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization &&
             config->attrs[i].val.programmaticStreamSerializationAllowed;
  recorded::launches.push_back(*config), recorded::early.push_back(early);
  return cudaSuccess;
}
