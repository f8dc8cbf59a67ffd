// The operator srpkd::relation_tiles, and what is not an operator: versions, capabilities, the index mathematics.
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "common/index.h"
#include "cpu/relation_tiles.h"

// Found by kernels/build.py in the file, before anything of it is loaded.
extern "C" __attribute__((used, visibility("default"))) const char srpkd_built_for[] =
    "srpkd-built-for-torch:" SRPKD_TORCH_VERSION ";srpkd-built-from-sources:" SRPKD_SOURCES ";";

namespace srpkd {
namespace {

using at::Tensor;

Normalize normalize_of(const std::string& name) {
  TORCH_CHECK_VALUE(name == "row" || name == "cosine" || name == "none", "normalize=\"", name, "\" is not known");
  return name == "row" ? Normalize::row : name == "cosine" ? Normalize::cosine : Normalize::none;
}

Distance distance_of(const std::string& name) {
  TORCH_CHECK_VALUE(name == "l1" || name == "l2" || name == "huber", "distance=\"", name, "\" is not known");
  return name == "l1" ? Distance::l1 : name == "l2" ? Distance::l2 : Distance::huber;
}

using Outputs = std::tuple<Tensor, Tensor, Tensor>;

// loss (B,), U (B, N, C_s) and h (B, N), zero; U and h have no elements where they are not asked for.
Outputs outputs(const Tensor& student, const std::string& normalize, bool need_grad) {
  const auto sums = student.options().dtype(student.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  const bool need_h = need_grad && normalize != "none";
  return {at::zeros_symint({student.sym_size(0)}, student.options().dtype(at::kDouble)),
          need_grad ? at::zeros_like(student, sums) : at::empty({0}, sums),
          need_h ? at::zeros_symint({student.sym_size(0), student.sym_size(1)}, sums) : at::empty({0}, sums)};
}

Outputs relation_tiles_meta(const Tensor& student, const Tensor&, const std::optional<Tensor>&,
                            const std::optional<Tensor>&, const std::string& normalize, const std::string&, double,
                            bool need_grad, int64_t) {
  return outputs(student, normalize, need_grad);
}

Outputs relation_tiles_cpu(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& alpha_s,
                           const std::optional<Tensor>& alpha_t, const std::string& normalize,
                           const std::string& distance, double delta, bool need_grad, int64_t tile) {
  TORCH_CHECK_VALUE(student.dim() == 3 && teacher.dim() == 3 && student.size(0) == teacher.size(0) &&
                        student.size(1) == teacher.size(1),
                    "expected student (B, N, C_s) and teacher (B, N, C_t), received ", student.sizes(), " and ",
                    teacher.sizes());
  TORCH_CHECK_TYPE(student.scalar_type() == teacher.scalar_type() && at::isFloatingType(student.scalar_type()),
                   "expected floating features of one dtype, received ", student.scalar_type(), " and ",
                   teacher.scalar_type());
  const cpu::Options options{normalize_of(normalize), distance_of(distance), delta, tile};
  for (const auto& alpha : {alpha_s, alpha_t}) {
    TORCH_CHECK_VALUE(alpha.has_value() == (options.normalize != Normalize::none),
                      "both alphas are needed unless normalize=\"none\", and neither then");
    TORCH_CHECK_VALUE(!alpha || alpha->sizes() == student.sizes().slice(0, 2), "expected alpha (B, N)");
  }
  auto [loss, U, h] = outputs(student, normalize, need_grad);
  const auto wanted = [](const Tensor& tensor) { return tensor.numel() ? tensor : Tensor(); };
  cpu::relation_tiles(student, teacher, alpha_s.value_or(Tensor()), alpha_t.value_or(Tensor()), options, loss,
                      wanted(U), wanted(h));
  return {loss, U, h};
}

}  // namespace

// csrc/cuda adds its own implementation for the CUDA key.
TORCH_LIBRARY_FRAGMENT(srpkd, m) {
  m.def(
      "relation_tiles(Tensor student, Tensor teacher, Tensor? alpha_student, Tensor? alpha_teacher, str normalize, "
      "str distance, float delta, bool need_grad, int tile=0) -> (Tensor loss, Tensor U, Tensor h)");
}
TORCH_LIBRARY_IMPL(srpkd, CPU, m) { m.impl("relation_tiles", relation_tiles_cpu); }
TORCH_LIBRARY_IMPL(srpkd, Meta, m) { m.impl("relation_tiles", relation_tiles_meta); }

}  // namespace srpkd

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  namespace py = pybind11;
  using namespace pybind11::literals;
  m.doc() = "The compiled part of srpkd: the operator srpkd::relation_tiles, and what it was built with.";
  m.attr("torch_version") = SRPKD_TORCH_VERSION;
  m.attr("cuda_architectures") = SRPKD_CUDA_ARCHITECTURES;
  m.def("cpu_capability", [] {
    return py::dict("instructions"_a = at::get_cpu_capability(), "cache_bytes"_a = srpkd::cpu::cache_bytes());
  });
  m.def("tile_size", srpkd::cpu::tile_size, "images"_a, "pixels"_a, "element_bytes"_a, "threads"_a);

  // the mathematics of common/index.h, for tests
  m.def("tile_count", srpkd::tile_count, "blocks"_a);
  m.def(
      "tile_at",
      [](int64_t index, int64_t blocks) {
        const srpkd::Tile tile = srpkd::tile_at(index, blocks);
        return std::tuple(tile.row, tile.column, tile.round, tile.mirrored());
      },
      "index"_a, "blocks"_a, "row, column, round, mirrored");
  m.def(
      "block_at",
      [](int64_t block, int64_t block_size, int64_t pixels) {
        const srpkd::Block range = srpkd::block_at(block, block_size, pixels);
        return std::tuple(range.begin, range.size);
      },
      "block"_a, "block_size"_a, "pixels"_a, "begin, size");
}
