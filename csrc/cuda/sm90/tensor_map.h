// Tensor maps: how TMA reads a tensor. Compiles without nvcc; with SRPKD_EMULATION, also without the headers of CUDA.
#pragma once

#include <cstdint>

#if !defined(SRPKD_EMULATION)
#include <cuda.h>
#include <cuda_runtime.h>
#endif

#include "descriptors.h"

namespace srpkd::cuda::sm90 {

// A tensor of three dimensions with 16-bit elements. A load copies a box of it into shared memory, with the 128-byte
// swizzle. Elements outside the tensor are 0. The tests emulate loads from this description.
struct TensorMapShape {
  const void* data;
  int64_t extents[3];  // elements; those of dimension 0 are adjacent
  int64_t strides[2];  // bytes between the elements of dimensions 1 and 2
  int box[3];          // elements; 64 in dimension 0, which are one line
};

// Returns the requirement of TMA that a shape does not meet, or null.
inline const char* unsupported_reason(const TensorMapShape& shape) {
  if (reinterpret_cast<uintptr_t>(shape.data) % 16) return "the address is not a multiple of 16 bytes";
  for (const int64_t stride : shape.strides)
    if (stride <= 0 || stride % 16 || stride >= int64_t{1} << 40)
      return "a stride is not a positive multiple of 16 bytes below 2^40";
  for (const int64_t extent : shape.extents)
    if (extent <= 0 || extent > int64_t{1} << 32) return "an extent is not in [1, 2^32]";
  for (const int size : shape.box)
    if (size <= 0 || size > 256) return "the size of a box is not in [1, 256]";
  return shape.box[0] * 2 == LINE ? nullptr : "a line of the box does not have 128 bytes";
}

#if defined(SRPKD_EMULATION)
using TensorMap = TensorMapShape;
#else
using TensorMap = CUtensorMap;

// Encodes a shape that TMA supports. The driver's function is looked up at run time, so that nothing links to libcuda.
inline cudaError_t encode(const TensorMapShape& shape, TensorMap& map) {
  static void* const function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? found : nullptr;
  }();
  if (!function) return cudaErrorNotSupported;
  if (unsupported_reason(shape)) return cudaErrorInvalidValue;
  const cuuint64_t extents[] = {cuuint64_t(shape.extents[0]), cuuint64_t(shape.extents[1]),
                                cuuint64_t(shape.extents[2])};
  const cuuint64_t strides[] = {cuuint64_t(shape.strides[0]), cuuint64_t(shape.strides[1])};
  const cuuint32_t box[] = {cuuint32_t(shape.box[0]), cuuint32_t(shape.box[1]), cuuint32_t(shape.box[2])};
  const cuuint32_t element_strides[] = {1, 1, 1};
  // of the types with 16 bits any will do: it would only matter if the elements outside were NaN
  const auto encode_shape = [&] {
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
        &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(shape.data), extents, strides, box,
        element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = encode_shape();
  if (result == CUDA_ERROR_INVALID_CONTEXT) {
    // a thread has no context before its first kernel: torch's allocator and guards do not make it current
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaSetDevice(device);
    if (error != cudaSuccess) return error;
    result = encode_shape();
  }
  return static_cast<cudaError_t>(result);  // both have the same numbers
}

#endif

}  // namespace srpkd::cuda::sm90
