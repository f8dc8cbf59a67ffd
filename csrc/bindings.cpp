// The operator srpkd::relation_tiles with its CPU and meta implementations, and a Python module with the versions it
// was built for, the CPU's capabilities and the index arithmetic.
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "common/arguments.h"
#include "common/index.h"
#include "cpu/relation_tiles.h"

// kernels/build.py reads this from the binary before loading it.
extern "C" __attribute__((used, visibility("default"))) const char srpkd_built_for[] =
    "srpkd-built-for-torch:" SRPKD_TORCH_VERSION ";srpkd-built-from-sources:" SRPKD_SOURCES ";";

namespace srpkd {
namespace {

using at::Tensor;

Outputs relation_tiles_meta(const Tensor& student, const Tensor&, const std::optional<Tensor>&,
                            const std::optional<Tensor>&, const std::string& normalize, const std::string&, double,
                            bool need_grad, int64_t) {
  return zero_outputs(student, normalize, need_grad);
}

Outputs relation_tiles_cpu(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& alpha_s,
                           const std::optional<Tensor>& alpha_t, const std::string& normalize,
                           const std::string& distance, double delta, bool need_grad, int64_t tile) {
  const cpu::Options options{parse_normalize(normalize), parse_distance(distance), delta, tile};
  check_tensors(student, teacher, alpha_s, alpha_t, normalize);
  auto [loss, U, h] = zero_outputs(student, normalize, need_grad);
  const auto if_nonempty = [](const Tensor& tensor) { return tensor.numel() ? tensor : Tensor(); };
  cpu::relation_tiles(student, teacher, alpha_s.value_or(Tensor()), alpha_t.value_or(Tensor()), options, loss,
                      if_nonempty(U), if_nonempty(h));
  return {loss, U, h};
}

}  // namespace

// csrc/cuda/operator.cpp registers the implementation for CUDA.
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
  m.doc() = "The compiled extension of srpkd: registers the operator srpkd::relation_tiles.";
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
