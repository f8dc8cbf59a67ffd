// The operators' schemas with their CPU and meta implementations, and a Python module with the versions it was built
// for, the CPU's capabilities and the index arithmetic.
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "common/arguments.h"
#include "common/backward.h"
#include "common/index.h"
#include "cpu/indexed_tiles.h"
#include "cpu/loss.h"
#include "cpu/packed_features.h"
#include "cpu/relation_tiles.h"
#include "cuda/fastest_kernel.h"

// kernels/build.py reads this from the binary before loading it.
extern "C" __attribute__((used, visibility("default"))) const char srpkd_built_for[] =
    "srpkd-built-for-torch:" SRPKD_TORCH_VERSION ";srpkd-built-from-sources:" SRPKD_SOURCES ";";

namespace srpkd {
namespace {

using at::Tensor;

// Turns an output that is not computed, which is empty, into an undefined tensor.
Tensor if_nonempty(const Tensor& output) { return output.numel() ? output : Tensor(); }

Outputs relation_tiles_cpu(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& alpha_s,
                           const std::optional<Tensor>& alpha_t, std::string_view normalize, std::string_view distance,
                           double delta, bool rectify, bool need_grad, int64_t tile) {
  const Relation relation = parse_relation(normalize, distance, delta, 0, rectify, false);
  check_tensors(student, teacher, alpha_s, alpha_t, normalize);
  auto [loss, U, h] = zero_outputs(student, normalize, need_grad);
  if (student.numel() == 0 || teacher.numel() == 0) return {loss, U, h};
  cpu::relation_tiles(cpu::widened(student), cpu::widened(teacher), alpha_s.value_or(Tensor()),
                      alpha_t.value_or(Tensor()), relation, tile, loss, if_nonempty(U), if_nonempty(h));
  return {loss, U, h};
}

// Converts [student, teacher], followed by alpha of both unless normalize is none, for remote_tiles.
cpu::Pixels pixels_of(const char* name, at::TensorList tensors, std::string_view normalize) {
  const size_t expected = normalize == "none" ? 2 : 4;
  TORCH_CHECK_VALUE(tensors.size() == expected, "expected ", expected, " tensors of the ", name, " with normalize=\"",
                    normalize, "\", received ", tensors.size());
  const auto optional = [&](size_t i) { return expected == 4 ? std::optional(tensors[i]) : std::nullopt; };
  check_tensors(tensors[0], tensors[1], optional(2), optional(3), normalize);
  const at::ScalarType sums = accumulator(tensors[0].scalar_type());
  const auto alpha = [&](size_t i) { return i < expected ? tensors[i].to(sums).contiguous() : Tensor(); };
  return {cpu::by_pixel(tensors[0]), cpu::by_pixel(tensors[1]), alpha(2), alpha(3)};
}

Outputs remote_tiles_cpu(at::TensorList rows, at::TensorList columns, std::string_view normalize,
                         std::string_view distance, double delta, bool rectify, bool need_grad, int64_t tile) {
  const Relation relation = parse_relation(normalize, distance, delta, 0, rectify, false);
  const cpu::Pixels i = pixels_of("rows", rows, normalize), j = pixels_of("columns", columns, normalize);
  TORCH_CHECK_VALUE(i.student.scalar_type() == j.student.scalar_type() && i.student.size(0) == j.student.size(0) &&
                        i.student.size(2) == j.student.size(2) && i.teacher.size(2) == j.teacher.size(2),
                    "expected rows and columns that differ in their pixels only, received student ", rows[0].sizes(),
                    " and ", j.student.sizes(), ", teacher ", rows[1].sizes(), " and ", j.teacher.sizes());
  auto [loss, U, h] = zero_outputs(i.student, normalize, need_grad);
  if (i.student.numel() == 0 || i.teacher.numel() == 0 || j.student.numel() == 0) return {loss, U, h};
  const Tensor every_column = at::arange(j.student.size(1)).expand({i.student.size(0), 1, -1}).contiguous();
  cpu::indexed_tiles(i, j, every_column, relation, false, tile, loss, if_nonempty(U), if_nonempty(h));
  return {loss, U, h};
}

LossAndGradient sampled_loss_cpu(const Tensor& student, const Tensor& teacher, const Tensor& columns,
                                 std::string_view normalize, std::string_view distance, double delta, double eps,
                                 bool rectify, bool detach_norms, bool need_grad, int64_t tile) {
  const Relation relation = parse_relation(normalize, distance, delta, eps, rectify, detach_norms);
  check_features(student, teacher);
  TORCH_CHECK_VALUE(columns.dim() == 3 && columns.scalar_type() == at::kLong && columns.size(0) == student.size(0) &&
                        columns.size(1) > 0 && columns.size(2) > 0,
                    "expected columns (B, sets, m) of int64 with B = ", student.size(0), ", received ", columns.sizes(),
                    " of ", columns.scalar_type());
  return cpu::sampled_loss(student, teacher, columns.contiguous(), relation, need_grad, tile);
}

LossAndGradient relation_loss_forward_meta(const Tensor& student, const Tensor& teacher, std::string_view,
                                           std::string_view, double, double, bool, bool, std::string_view reduction,
                                           std::string_view, bool need_grad) {
  check_features(student, teacher);
  return empty_loss_and_gradient(student, parse_reduction(reduction), need_grad);
}

LossAndGradient relation_loss_forward_cpu(const Tensor& student, const Tensor& teacher, std::string_view normalize,
                                          std::string_view distance, double delta, double eps, bool rectify,
                                          bool detach_norms, std::string_view reduction, std::string_view method,
                                          bool need_grad) {
  const Relation relation = parse_relation(normalize, distance, delta, eps, rectify, detach_norms);
  TORCH_CHECK_NOT_IMPLEMENTED(parse_method(method, relation) == Method::tiles,
                              "method=\"closed_form\" is not implemented for the CPU: use method=\"tiles\", or "
                              "backend='closed_form'");
  check_features(student, teacher);
  return cpu::relation_loss(student, teacher, relation, parse_reduction(reduction), need_grad);
}

// Returns the CUDA kernel of the relation tiles, "sm80" or "sm90", that is the fastest for a loss on a GPU.
const char* fastest_cuda_kernel(std::string_view dtype, std::string_view precision, std::string_view normalize,
                                std::string_view distance, double delta, bool rectify, bool detach_norms,
                                bool need_grad, int pixels, int student_channels, int teacher_channels, int images,
                                int major, int multiprocessors, int shared_of_block, std::string_view architectures) {
  using cuda::Precision;
  const Relation relation = parse_relation(normalize, distance, delta, 0, rectify, detach_norms);
  const bool wide = dtype == "float32";
  const Precision chosen = dtype == "float16"                                         ? Precision::fp16
                           : !wide || (precision != "highest" && precision != "high") ? Precision::bf16
                           : precision == "high"                                      ? Precision::tf32
                                                                                      : Precision::tf32x3;
  const cuda::sm90::Problem problem{images,
                                    pixels,
                                    student_channels,
                                    teacher_channels,
                                    chosen,
                                    need_grad,
                                    relation.normalize,
                                    relation.distance,
                                    static_cast<float>(delta),
                                    rectify,
                                    relation.differentiates_norms()};
  const cuda::Device device{multiprocessors, shared_of_block, 0, 0, major};
  const cuda::Kernel kernel = cuda::fastest_kernel(problem, wide ? 4 : 2, device, architectures);
  return kernel == cuda::Kernel::sm90 ? "sm90" : "sm80";
}

}  // namespace

// operator.cpp and backward.cpp in csrc/cuda register the implementations for CUDA, csrc/autograd.cpp those of
// relation_loss.
TORCH_LIBRARY_FRAGMENT(srpkd, m) {
  m.def(
      "relation_tiles(Tensor student, Tensor teacher, Tensor? alpha_student, Tensor? alpha_teacher, str normalize, "
      "str distance, float delta, bool rectify, bool need_grad, int tile=0) -> (Tensor loss, Tensor U, Tensor h)");
  m.def(
      "remote_tiles(Tensor[] rows, Tensor[] columns, str normalize, str distance, float delta, bool rectify, "
      "bool need_grad, int tile=0) -> (Tensor loss, Tensor U, Tensor h)");
  m.def(
      "sampled_loss(Tensor student, Tensor teacher, Tensor columns, str normalize, str distance, float delta, "
      "float eps, bool rectify, bool detach_norms, bool need_grad, int tile=0) -> (Tensor loss, Tensor gradient)");
  m.def(
      "relation_loss(Tensor student, Tensor teacher, str normalize, str distance, float delta, float eps, "
      "bool rectify, bool detach_norms, str reduction, str layout, str scope, str method) -> Tensor");
  m.def(
      "relation_loss_forward(Tensor student, Tensor teacher, str normalize, str distance, float delta, float eps, "
      "bool rectify, bool detach_norms, str reduction, str method, bool need_grad) -> (Tensor loss, Tensor gradient)");
  m.def("relation_loss_backward(Tensor gradient, Tensor grad_loss, ScalarType dtype) -> Tensor");
}
TORCH_LIBRARY_IMPL(srpkd, CPU, m) {
  m.impl("relation_tiles", relation_tiles_cpu);
  m.impl("remote_tiles", remote_tiles_cpu);
  m.impl("sampled_loss", sampled_loss_cpu);
  m.impl("relation_loss_forward", relation_loss_forward_cpu);
}
TORCH_LIBRARY_IMPL(srpkd, Meta, m) { m.impl("relation_loss_forward", relation_loss_forward_meta); }
TORCH_LIBRARY_IMPL(srpkd, CompositeExplicitAutograd, m) { m.impl("relation_loss_backward", multiply); }

}  // namespace srpkd

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  namespace py = pybind11;
  using namespace pybind11::literals;
  m.doc() = "The compiled extension of srpkd: registers the operators srpkd::relation_*.";
  m.attr("torch_version") = SRPKD_TORCH_VERSION;
  m.attr("cuda_architectures") = SRPKD_CUDA_ARCHITECTURES;
  m.def("cpu_capability", [] {
    return py::dict("instructions"_a = at::get_cpu_capability(), "cache_bytes"_a = srpkd::cpu::cache_bytes());
  });
  m.def("fastest_cuda_kernel", srpkd::fastest_cuda_kernel, "dtype"_a, "precision"_a, "normalize"_a, "distance"_a,
        "delta"_a, "rectify"_a, "detach_norms"_a, "need_grad"_a, "pixels"_a, "student"_a, "teacher"_a, "batch"_a,
        "major"_a, "multiprocessors"_a, "shared_of_block"_a, "architectures"_a);
  m.def("tile_size", srpkd::cpu::tile_size, "images"_a, "pixels"_a, "element_bytes"_a, "threads"_a);

  // the index arithmetic of common/index.h, for tests
  m.def("tile_count", srpkd::tile_count<int64_t>, "blocks"_a);
  m.def(
      "tile_at",
      [](int64_t index, int64_t blocks) {
        const srpkd::Tile tile = srpkd::tile_at(index, blocks);
        return std::tuple(tile.row, tile.column, tile.round, tile.mirrored());
      },
      "index"_a, "blocks"_a, "Return (row, column, round, mirrored).");
  m.def(
      "block_at",
      [](int64_t block, int64_t block_size, int64_t pixels) {
        const srpkd::Block range = srpkd::block_at(block, block_size, pixels);
        return std::tuple(range.begin, range.size);
      },
      "block"_a, "block_size"_a, "pixels"_a, "Return (begin, size).");
}
