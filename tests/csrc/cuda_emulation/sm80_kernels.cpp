// The kernels of csrc/cuda/sm80 with their launches.
#include <cuda_runtime.h>
#define __CUDACC__
#include "../../../csrc/cuda/sm80/sm80_bf16.cu"
#include "../../../csrc/cuda/sm80/sm80_bf16_rectified.cu"
#include "../../../csrc/cuda/sm80/sm80_fp16.cu"
#include "../../../csrc/cuda/sm80/sm80_fp16_rectified.cu"
#include "../../../csrc/cuda/sm80/sm80_tf32.cu"
#include "../../../csrc/cuda/sm80/sm80_tf32_rectified.cu"
#include "../../../csrc/cuda/sm80/sm80_tf32x3.cu"
#include "../../../csrc/cuda/sm80/sm80_tf32x3_rectified.cu"
