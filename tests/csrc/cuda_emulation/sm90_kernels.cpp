// The kernels of csrc/cuda/sm90 with their launches.
#include <cuda_runtime.h>
#define __CUDACC__
#include "../../../csrc/cuda/sm90/tensor_map.h"

namespace srpkd::cuda::sm90 {

inline cudaError_t encode(const TensorMapShape& shape, TensorMap& map) {
  map = shape;
  return unsupported_reason(shape) ? cudaErrorInvalidValue : cudaSuccess;
}

}  // namespace srpkd::cuda::sm90

#include "../../../csrc/cuda/sm90/sm90_bf16_row.cu"
#include "../../../csrc/cuda/sm90/sm90_bf16_symmetric.cu"
#include "../../../csrc/cuda/sm90/sm90_float32_row.cu"
#include "../../../csrc/cuda/sm90/sm90_float32_symmetric.cu"
#include "../../../csrc/cuda/sm90/sm90_fp16_row.cu"
#include "../../../csrc/cuda/sm90/sm90_fp16_symmetric.cu"
