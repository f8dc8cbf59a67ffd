// srpkd::relation_tiles on an NVIDIA GPU: argument checks, memory layouts and the launch.
#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <string_view>

#include "../common/arguments.h"
#include "sm80/launch.h"

namespace srpkd::cuda {
namespace {

using namespace sm80;

using at::Tensor;

// Returns the precision of float32 products that torch is set to.
Precision float32_precision() {
  try {
    switch (at::globalContext().float32MatmulPrecision()) {
      case at::Float32MatmulPrecision::HIGHEST:
        return Precision::tf32x3;
      case at::Float32MatmulPrecision::HIGH:
        return Precision::tf32;
      default:
        return Precision::bf16;
    }
  } catch (const c10::Error&) {  // it was set per backend, with torch.backends.cuda.matmul.fp32_precision
    const auto set = at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL);
    return set == at::Float32Precision::TF32 ? Precision::tf32 : Precision::tf32x3;
  }
}

bool adjacent(const Tensor& x, int64_t dim) { return x.stride(dim) == 1 || x.size(dim) == 1; }

// Gives both tensors one of the two layouts that the kernels read, pixels adjacent or channels adjacent, and returns
// whether pixels are adjacent. Copies neither if they already share one, else prefers the layout of the larger.
bool unify_layouts(Tensor& student, Tensor& teacher) {
  for (const int64_t dim : {2, 1})
    if (adjacent(student, dim) && adjacent(teacher, dim)) return dim == 1;
  const Tensor& larger = student.size(2) > teacher.size(2) ? student : teacher;
  const Tensor& smaller = student.size(2) > teacher.size(2) ? teacher : student;
  const bool pixels = !adjacent(larger, 2) && (adjacent(larger, 1) || adjacent(smaller, 1));
  for (Tensor* x : {&student, &teacher})
    if (!adjacent(*x, pixels ? 1 : 2)) *x = pixels ? x->mT().contiguous().mT() : x->contiguous();
  return pixels;
}

Features features_of(const Tensor& x, const Tensor& alpha, bool pixels_adjacent) {
  const auto stride = [&](int64_t dim) {
    return x.size(dim) == 1 ? 0 : x.stride(dim);
  };  // a stride along a dimension of size 1 is arbitrary
  const int64_t image_stride = stride(0), line_stride = stride(pixels_adjacent ? 2 : 1);
  return {x.const_data_ptr(),
          alpha.defined() ? alpha.const_data_ptr<float>() : nullptr,
          image_stride,
          line_stride,
          static_cast<int>(x.size(2)),
          copy_bytes(x.const_data_ptr(), image_stride, line_stride, static_cast<int>(x.element_size()))};
}

Device device_of(c10::DeviceIndex index) {
  const auto attribute = [&](cudaDeviceAttr name) {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, index));
    return value;
  };
  const int major = attribute(cudaDevAttrComputeCapabilityMajor);
  TORCH_CHECK_NOT_IMPLEMENTED(major >= 8,
                              "the native backend needs a GPU of compute capability 8.0 or newer, received ", major,
                              ".", attribute(cudaDevAttrComputeCapabilityMinor), ": use backend='blocked'");
  return {attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor), attribute(cudaDevAttrReservedSharedMemoryPerBlock)};
}

Outputs relation_tiles_cuda(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& alpha_s,
                            const std::optional<Tensor>& alpha_t, std::string_view normalize, std::string_view distance,
                            double delta, bool need_grad, int64_t) {
  const Normalize kind = parse_normalize(normalize);
  Params p{};
  p.distance = parse_distance(distance), p.delta = static_cast<float>(delta);
  p.row = kind == Normalize::row, p.zero_diagonal = kind == Normalize::cosine;
  check_tensors(student, teacher, alpha_s, alpha_t, normalize);
  TORCH_CHECK_NOT_IMPLEMENTED(student.scalar_type() == at::kFloat || student.scalar_type() == at::kBFloat16 ||
                                  student.scalar_type() == at::kHalf,
                              "the native backend supports float32, bfloat16 and float16 features on a GPU, received ",
                              student.scalar_type(), ": use backend='blocked'");
  const c10::cuda::CUDAGuard guard(student.device());
  if (!student.numel() || !teacher.numel()) return zero_outputs(student, normalize, need_grad);
  const int64_t images = student.size(0), pixels = student.size(1), channels = student.size(2);
  const bool need_h = need_grad && kind != Normalize::none;
  const auto sums = student.options().dtype(at::kFloat), double_sums = student.options().dtype(at::kDouble);

  Precision precision = student.scalar_type() == at::kHalf ? Precision::fp16 : Precision::bf16;
  if (student.scalar_type() == at::kFloat) precision = float32_precision();
  Tensor q_s = student, q_t = teacher;
  if (precision == Precision::bf16) q_s = q_s.to(at::kBFloat16), q_t = q_t.to(at::kBFloat16);
  const bool pixels_adjacent = unify_layouts(q_s, q_t);
  const auto scale = [](const std::optional<Tensor>& alpha) {
    return alpha ? alpha->to(at::kFloat).contiguous() : Tensor();
  };
  const Tensor scale_s = scale(alpha_s), scale_t = scale(alpha_t);

  p.features[0] = features_of(q_t, scale_t, pixels_adjacent);
  p.features[1] = features_of(q_s, scale_s, pixels_adjacent);
  p.images = static_cast<int>(images), p.pixels = static_cast<int>(pixels);
  const int u_channels = plan(p, precision, need_grad, device_of(student.get_device()));
  TORCH_CHECK_VALUE(pixels <= (1 << 30) && images * p.blocks * p.channel_splits <= std::numeric_limits<int>::max(),
                    "expected features that fit into one launch, received ", student.sizes(), ": split the batch");

  const bool split = p.splits > 1;
  Tensor U = need_grad ? at::empty_like(student, sums) : at::empty({0}, sums), U_of_splits = U;
  Tensor h = at::empty({need_h ? images : 0, pixels}, sums), h_of_splits = h;
  Tensor loss_of_blocks = at::empty({images, p.splits * p.blocks}, double_sums);
  if (split && need_grad)
    U_of_splits = pixels_adjacent ? at::empty({p.splits, images, channels, pixels}, sums).mT()
                                  : at::empty({p.splits, images, pixels, channels}, sums);
  if (split && need_h) h_of_splits = at::empty({p.splits, images, pixels}, sums);
  p.loss = loss_of_blocks.mutable_data_ptr<double>();
  if (need_h) p.h = h_of_splits.mutable_data_ptr<float>();
  if (need_grad) {
    p.U = U_of_splits.mutable_data_ptr<float>();
    for (int i = split ? 0 : 1; i < 4; ++i) p.U_strides[i] = U_of_splits.stride(split ? i : i - 1);
  }

  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  C10_CUDA_CHECK(with_precision(
      precision, [&](auto chosen) { return launch<decltype(chosen)::value>(p, pixels_adjacent, u_channels, stream); }));

  if (split && need_grad) at::sum_out(U, U_of_splits, 0);
  if (split && need_h) at::sum_out(h, h_of_splits, 0);
  return {at::sum(loss_of_blocks, 1), U, need_h ? h : at::empty({0}, sums)};
}

}  // namespace

TORCH_LIBRARY_IMPL(srpkd, CUDA, m) { m.impl("relation_tiles", relation_tiles_cuda); }

}  // namespace srpkd::cuda
