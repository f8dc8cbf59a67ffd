// csrc/cuda/sm90/tensor_map.h with a driver that only records. tests/csrc/test_cuda_launches.py calls it through
// ctypes.
#undef SRPKD_EMULATION

#include "../../../csrc/cuda/sm90/tensor_map.h"

namespace {

CUresult failure = CUDA_SUCCESS;
thread_local int calls = 0;
thread_local cuuint64_t extents[3];

}  // namespace

// Needs a context of the calling thread, as the driver does.
CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t* of_tensor,
                                const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  ++calls;
  if (recorded::context != recorded::device) return CUDA_ERROR_INVALID_CONTEXT;
  for (int i = 0; i < 3; ++i) extents[i] = of_tensor[i];
  return failure;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled), *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

extern "C" {

// Encodes a map of 8 x 2 x 3 elements in this thread, whose current context is that of a GPU, or -1. Returns the error
// of encode(). `of_driver`: the error of the driver.
int encode(int device, int context, int of_driver, int* driver_calls, int* extent) {
  recorded::device = device, recorded::context = context, failure = static_cast<CUresult>(of_driver), calls = 0;
  alignas(16) static char data[96];
  srpkd::cuda::sm90::TensorMap map{};
  const cudaError_t error = srpkd::cuda::sm90::encode({data, {8, 2, 3}, {16, 32}, {64, 64, 1}}, map);
  *driver_calls = calls, *extent = static_cast<int>(extents[0]);
  return error;
}
}
