// From tensors to the arguments of the CUDA kernels: precision, memory layouts and the properties of the GPU.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>

#include <vector>

#include "sm80/plan.h"

namespace srpkd::cuda {

using at::Tensor;

// Returns the precision of products of features, which for float32 is what torch is set to.
inline Precision precision_of(at::ScalarType dtype) {
  TORCH_CHECK_NOT_IMPLEMENTED(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
                              "the native backend supports float32, bfloat16 and float16 features on a GPU, received ",
                              dtype, ": use backend='blocked'");
  if (dtype != at::kFloat) return dtype == at::kHalf ? Precision::fp16 : Precision::bf16;
  const at::Context& context = at::globalContext();
  // as formulas.matmul_precision
  if (context.float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) != at::Float32Precision::TF32)
    return Precision::tf32x3;
  try {
    return context.float32MatmulPrecision() == at::Float32MatmulPrecision::MEDIUM ? Precision::bf16 : Precision::tf32;
  } catch (const c10::Error&) {  // other devices have another setting
    return Precision::tf32;
  }
}

inline bool adjacent(const Tensor& x, int64_t dim) { return x.stride(dim) == 1 || x.size(dim) == 1; }

// Copies x unless its pixels, or else its channels, are adjacent as requested.
inline void make_adjacent(Tensor& x, bool pixels) {
  if (!adjacent(x, pixels ? 1 : 2)) x = pixels ? x.mT().contiguous().mT() : x.contiguous();
}

// Gives both tensors one of the two layouts that the kernels read, pixels adjacent or channels adjacent, and returns
// whether pixels are adjacent. Copies neither if they already share one, else prefers the layout of the larger.
inline bool unify_layouts(Tensor& student, Tensor& teacher) {
  for (const int64_t dim : {2, 1})
    if (adjacent(student, dim) && adjacent(teacher, dim)) return dim == 1;
  const Tensor& larger = student.size(2) > teacher.size(2) ? student : teacher;
  const Tensor& smaller = student.size(2) > teacher.size(2) ? teacher : student;
  const bool pixels = !adjacent(larger, 2) && (adjacent(larger, 1) || adjacent(smaller, 1));
  make_adjacent(student, pixels), make_adjacent(teacher, pixels);
  return pixels;
}

inline sm80::Features features_of(const Tensor& x, const Tensor& alpha, bool pixels_adjacent) {
  const auto stride = [&](int64_t dim) {
    return x.size(dim) == 1 ? 0 : x.stride(dim);
  };  // a stride along a dimension of size 1 is arbitrary
  const int64_t image_stride = stride(0), line_stride = stride(pixels_adjacent ? 2 : 1);
  return {x.const_data_ptr(),
          alpha.defined() ? alpha.const_data_ptr<float>() : nullptr,
          image_stride,
          line_stride,
          static_cast<int>(x.size(2)),
          sm80::copy_bytes(x.const_data_ptr(), image_stride, line_stride, static_cast<int>(x.element_size()))};
}

// Returns the properties of a GPU, which are read once: a call of the loss asks for them on the host's critical path.
inline const Device& device_of(c10::DeviceIndex index) {
  static const std::vector<Device> devices = [] {
    int count = 0;
    C10_CUDA_CHECK(cudaGetDeviceCount(&count));
    std::vector<Device> all;
    for (int device = 0; device < count; ++device) {
      const auto attribute = [&](cudaDeviceAttr name) {
        int value = 0;
        C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
        return value;
      };
      all.push_back({attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                     attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
                     attribute(cudaDevAttrReservedSharedMemoryPerBlock), attribute(cudaDevAttrComputeCapabilityMajor),
                     attribute(cudaDevAttrCooperativeLaunch) != 0});
    }
    return all;
  }();
  const Device& device = devices.at(index);
  TORCH_CHECK_NOT_IMPLEMENTED(device.major >= 8,
                              "the native backend needs a GPU of compute capability 8.0 or newer, received ",
                              device.major, ".x: use backend='blocked'");
  return device;
}

// Checks that 32 bits count images, pixels and channels, with room for the padding of a block.
inline void check_sizes(const Tensor& features) {
  for (const int64_t size : features.sizes())
    TORCH_CHECK_VALUE(size <= 1 << 30, "expected features with sizes of at most 2^30, received ", features.sizes(),
                      ": use fewer pixels, or split the batch");
}

// Checks that 32 bits count the tiles of the moments, matrices of channels by channels: more would take 4 TB.
inline void check_moments(const Tensor& features) {
  TORCH_CHECK_VALUE(features.size(2) <= 1 << 20,
                    "expected at most 2^20 channels with normalize=\"row\" or the closed form, received ",
                    features.sizes(), ": use fewer channels, or backend='reference'");
}

inline void check_grid(const Tensor& student, int64_t blocks) {
  TORCH_CHECK_VALUE(blocks <= INT32_MAX, "expected features that fit into one launch, received ", student.sizes(),
                    ": split the batch");
}

}  // namespace srpkd::cuda
