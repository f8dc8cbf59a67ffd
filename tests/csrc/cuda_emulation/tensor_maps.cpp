// csrc/cuda/sm90/tensor_map.h with a driver that only records. tests/csrc/test_cuda_launches.py calls it through
// ctypes.
#undef SRPKD_EMULATION

#include <algorithm>

#include "../../../csrc/cuda/sm90/tensor_map.h"

namespace {

CUresult failure = CUDA_SUCCESS;
thread_local int calls = 0;
alignas(16) char data[96];
const srpkd::cuda::sm90::TensorMapShape SHAPE{data, {8, 2, 3}, {16, 32}, {64, 128, 1}};
thread_local bool as_described;  // whether the driver received SHAPE

}  // namespace

// Needs a context of the calling thread, as the driver does.
CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t rank, void* address,
                                const cuuint64_t* extents, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  ++calls;
  if (recorded::context != recorded::device) return CUDA_ERROR_INVALID_CONTEXT;
  as_described = rank == 3 && address == SHAPE.data && std::equal(extents, extents + 3, SHAPE.extents) &&
                 std::equal(strides, strides + 2, SHAPE.strides) && std::equal(box, box + 3, SHAPE.box) &&
                 std::count(steps, steps + 3, 1) == 3;
  return failure;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled), *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

#pragma GCC visibility push(default)
extern "C" {

// Encodes SHAPE in this thread, whose current context is that of a GPU, or -1. Returns the error of encode().
// `of_driver`: the error of the driver.
int encode(int device, int context, int of_driver, int* driver_calls, int* received) {
  recorded::device = device, recorded::context = context, failure = static_cast<CUresult>(of_driver), calls = 0;
  as_described = false;
  srpkd::cuda::sm90::TensorMap map{};
  const cudaError_t error = srpkd::cuda::sm90::encode(SHAPE, map);
  *driver_calls = calls, *received = as_described;
  return error;
}

// Returns what TMA does not support in SHAPE with another address, extents, strides and box, or null.
const char* unsupported(int64_t offset, const int64_t* extents, const int64_t* strides, const int* box) {
  srpkd::cuda::sm90::TensorMapShape shape = SHAPE;
  shape.data = data + offset;
  std::copy_n(extents, 3, shape.extents), std::copy_n(strides, 2, shape.strides), std::copy_n(box, 3, shape.box);
  return srpkd::cuda::sm90::unsupported_reason(shape);
}
}
#pragma GCC visibility pop
