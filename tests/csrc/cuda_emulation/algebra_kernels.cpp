// The kernels of csrc/cuda/algebra and closed_form with their launches.
#include <cuda_runtime.h>
#define __CUDACC__
#include "../../../csrc/cuda/algebra/algebra_bf16.cu"
#include "../../../csrc/cuda/algebra/algebra_float.cu"
#include "../../../csrc/cuda/algebra/algebra_fp16.cu"
#include "../../../csrc/cuda/closed_form/closed_form_bf16.cu"
#include "../../../csrc/cuda/closed_form/closed_form_float.cu"
#include "../../../csrc/cuda/closed_form/closed_form_fp16.cu"
