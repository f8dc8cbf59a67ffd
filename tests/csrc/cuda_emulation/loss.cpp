// The whole relation loss of csrc/cuda on the host. tests/csrc/test_cuda_loss.py calls it through ctypes.
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "../../../csrc/cuda/closed_form/launch.h"
#include "../../../csrc/cuda/launch_loss.h"
#include "emulation.h"
#include "execution.h"

namespace {

using namespace srpkd;
using namespace srpkd::cuda;
using namespace srpkd::cuda::algebra;
using emulation::Content;
using emulation::Execution;
using emulation::Machine;

std::string message;

// Hands out parts with gaps between them, each of which the kernels may access.
struct SeparateParts : Workspace {
  Machine& machine_of_test;

  SeparateParts(char* base, Machine& machine) : Workspace(base), machine_of_test(machine) {}

  char* reserve(int64_t size) override {
    char* const part = Workspace::reserve(size);
    Workspace::reserve(4096);
    machine_of_test.allow(part, size, Content::none);
    return part;
  }
};

// Calls f with a value of the features' element type.
template <class F>
cudaError_t with_element(int element, F f) {
  return element == 0 ? f(BFloat16{}) : element == 1 ? f(Half{}) : f(0.f);
}

// Adds the terms of a matrix: (images, channels, channels).
void add_terms(const uint16_t* terms, int images, int channels, float* to) {
  const int blocks = blocks_of(channels);
  for (int image = 0; image < images; ++image)
    for (int row = 0; row < channels; ++row)
      for (int column = 0; column < channels; ++column) {
        const uint16_t* const from = terms + image * elements_of_terms(channels) +
                                     panel_of_terms(row / BLOCK, column / BLOCK, blocks) + row % BLOCK * BLOCK +
                                     column % BLOCK;
        float sum = 0;
        for (int term = MATRIX_TERMS - 1; term >= 0; --term)
          sum += as_float(uint32_t{from[term * BLOCK * BLOCK]} << 16);
        *to++ = sum;
      }
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

struct FeaturesOfTest {
  const void *data, *tile_data;               // as the scales and the gradient read them, and as the tiles do
  int64_t image_stride, line_stride, extent;  // in elements
  int channels;
};

// Results between the kernels; null if not wanted.
struct Intermediate {
  float* alpha[2];           // (images, pixels)
  float *moment, *weighted;  // (images, channels, channels), of the student, divided by size^2; weighted: times size^2
  float* size;               // (images, 2)
};

// The kernels of the method.
enum { SM80, SM90, CLOSED_FORM };

// Computes the relation loss and returns an error message, or "" on success. element: 0 bfloat16, 1 float16, 2 float32.
// together: in few launches, see SRPKD_CUDA_TOGETHER. kernel_launches receives their number.
const char* relation_loss(int kernels, int element, int precision, bool pixels_adjacent, const FeaturesOfTest* features,
                          int images, int pixels, int normalize, int distance, double delta, double eps, bool rectify,
                          bool detach_norms, int reduction, bool need_grad, const int* device, bool together,
                          uint64_t seed, float* loss, void* gradient, const int64_t* gradient_strides,
                          const Intermediate* intermediate, int* kernel_launches) {
  LossArguments a{};
  Execution gpu({{device[0], device[1], device[2], device[3], 9, 1}}, 0, seed);
  a.precision = static_cast<Precision>(precision), a.pixels_adjacent = pixels_adjacent;
  a.element_bytes = element == 2 ? 4 : 2;
  const int tile_bytes = a.precision == Precision::bf16 ? 2 : a.element_bytes;
  for (int i = 0; i < 2; ++i) {
    const FeaturesOfTest& f = features[i];
    const auto features_of = [&](const void* data, int bytes) {
      gpu.machine.allow(data, f.extent * bytes, Content::input);
      return sm80::Features{data,          nullptr,    f.image_stride,
                            f.line_stride, f.channels, sm80::copy_bytes(data, f.image_stride, f.line_stride, bytes)};
    };
    a.features[i] = features_of(f.data, a.element_bytes);
    a.tile_features[i] = features_of(f.tile_data, tile_bytes);
  }
  a.images = images, a.pixels = pixels;
  a.relation = {static_cast<Normalize>(normalize), static_cast<Distance>(distance), delta, eps, rectify, detach_norms};
  a.reduction = static_cast<Reduction>(reduction), a.need_grad = need_grad, a.loss = loss, a.gradient = gradient;
  if (need_grad) std::copy(gradient_strides, gradient_strides + 3, a.gradient_strides);
  const int channels = features[STUDENT].channels;
  gpu.machine.allow(loss, a.reduction == Reduction::none ? images * 4 : 4, Content::none);
  gpu.machine.allow(gradient, int64_t{images} * pixels * channels * (element == 0 ? 2 : 4), Content::none);

  const Device properties{device[0], device[1], device[2], device[3]};
  std::vector<char> memory;
  const auto planned = [&](auto make_plan) {
    SeparateParts size(nullptr, gpu.machine);
    make_plan(size);
    memory.assign(size.bytes + 256, static_cast<char>(0xff));  // NaN, and -1 in counters
    SeparateParts workspace(reinterpret_cast<char*>(round_up(reinterpret_cast<int64_t>(memory.data()), 256)),
                            gpu.machine);
    return make_plan(workspace);
  };
  Launches launches{nullptr, true, together ? device[0] : 0, true};  // all kernels start early that can
  const auto end = [&](int64_t largest_grid, cudaError_t error) {
    *kernel_launches = static_cast<int>(recorded::launches.size());
    message = cudaGetErrorString(error);
    for (const recorded::Launch& launch : recorded::launches)
      if (launch.config.gridDim.x > largest_grid) message = "a kernel has more thread blocks than planned";
    return message.c_str();
  };
  if (kernels == CLOSED_FORM) {
    const auto plan = planned([&](Workspace& w) { return cuda::closed_form::make_plan(a, device[0], w); });
    return end(plan.largest_grid, with_element(element, [&](auto type) {
                 return cuda::closed_form::loss<decltype(type)>(plan, pixels_adjacent, launches);
               }));
  }
  const auto run = [&](auto plan) {
    const cudaError_t error =
        with_element(element, [&](auto type) { return launch_loss<decltype(type)>(plan, a, launches); });
    if (error != cudaSuccess) return end(plan.largest_grid, error);

    if (a.relation.normalize != Normalize::none)
      for (int i = 0; i < 2; ++i)
        std::copy_n(plan.scales.norms.alpha[i], int64_t{images} * pixels, intermediate->alpha[i]);
    if (a.relation.normalize == Normalize::row) {
      std::copy_n(plan.scales.moments.results.size, 2 * images, intermediate->size);
      add_terms(plan.scales.moments.results.whole, images, channels, intermediate->moment);
      if (plan.gradient.weighted.weighted)
        add_terms(plan.gradient.weighted.weighted, images, channels, intermediate->weighted);
    }
    return end(plan.largest_grid, error);
  };
  return kernels == SM90 ? run(planned([&](Workspace& w) { return make_sm90_plan(a, properties, w); }))
                         : run(planned([&](Workspace& w) { return make_plan(a, properties, w); }));
}
}
#pragma GCC visibility pop
