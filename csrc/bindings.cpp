// The operators' schemas with their CPU and meta implementations, and a Python module with the versions it was built
// for, the CPU's capabilities and the index arithmetic.
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "common/arguments.h"
#include "common/index.h"
#include "cpu/loss.h"
#include "cpu/relation_tiles.h"

// kernels/build.py reads this from the binary before loading it.
extern "C" __attribute__((used, visibility("default"))) const char srpkd_built_for[] =
    "srpkd-built-for-torch:" SRPKD_TORCH_VERSION ";srpkd-built-from-sources:" SRPKD_SOURCES ";";

namespace srpkd {
namespace {

using at::Tensor;

Outputs relation_tiles_meta(const Tensor& student, const Tensor&, const std::optional<Tensor>&,
                            const std::optional<Tensor>&, std::string_view normalize, std::string_view, double, bool,
                            bool need_grad, int64_t) {
  return zero_outputs(student, normalize, need_grad);
}

Outputs relation_tiles_cpu(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& alpha_s,
                           const std::optional<Tensor>& alpha_t, std::string_view normalize, std::string_view distance,
                           double delta, bool rectify, bool need_grad, int64_t tile) {
  const Relation relation = parse_relation(normalize, distance, delta, 0, rectify, false);
  check_tensors(student, teacher, alpha_s, alpha_t, normalize);
  auto [loss, U, h] = zero_outputs(student, normalize, need_grad);
  const auto if_nonempty = [](const Tensor& tensor) { return tensor.numel() ? tensor : Tensor(); };
  cpu::relation_tiles(student, teacher, alpha_s.value_or(Tensor()), alpha_t.value_or(Tensor()), relation, tile, loss,
                      if_nonempty(U), if_nonempty(h));
  return {loss, U, h};
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

// For any device: one elementwise launch.
Tensor relation_loss_backward(const Tensor& gradient, const Tensor& grad_loss, at::ScalarType dtype) {
  Tensor result = at::empty_like(gradient, gradient.options().dtype(dtype));
  // on a GPU, a grad_loss without dimensions would be rounded to the dtype of the gradient
  const bool view = grad_loss.dim() || gradient.is_cuda();
  at::mul_out(result, gradient, view ? grad_loss.view({-1, 1, 1}) : grad_loss);
  return result;
}

}  // namespace

// csrc/cuda/operator.cpp registers the implementations for CUDA, csrc/autograd.cpp those of relation_loss.
TORCH_LIBRARY_FRAGMENT(srpkd, m) {
  m.def(
      "relation_tiles(Tensor student, Tensor teacher, Tensor? alpha_student, Tensor? alpha_teacher, str normalize, "
      "str distance, float delta, bool rectify, bool need_grad, int tile=0) -> (Tensor loss, Tensor U, Tensor h)");
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
  m.impl("relation_loss_forward", relation_loss_forward_cpu);
}
TORCH_LIBRARY_IMPL(srpkd, Meta, m) {
  m.impl("relation_tiles", relation_tiles_meta);
  m.impl("relation_loss_forward", relation_loss_forward_meta);
}
TORCH_LIBRARY_IMPL(srpkd, CompositeExplicitAutograd, m) { m.impl("relation_loss_backward", relation_loss_backward); }

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
  m.def("tile_size", srpkd::cpu::tile_size, "images"_a, "pixels"_a, "element_bytes"_a, "threads"_a);

  // the index arithmetic of common/index.h, for tests
  m.def("tile_count", srpkd::tile_count, "blocks"_a);
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
