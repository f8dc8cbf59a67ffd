// The whole relation loss of csrc/cuda on the host. tests/csrc/test_cuda_loss.py calls it through ctypes.
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "emulation.h"
// after the primitives
#include "../../../csrc/cuda/algebra/sequence.cuh"
#include "../../../csrc/cuda/closed_form/sequence.cuh"
#include "../../../csrc/cuda/sm90/algebra_sums.cuh"
#include "../../../csrc/cuda/sm90_loss_plan.h"
#include "tiles.h"

namespace {

using namespace srpkd;
using namespace srpkd::cuda;
using namespace srpkd::cuda::algebra;
using emulation::Machine;
using emulation::machine;
using emulation::Schedule;

std::string message;

// Hands out parts with gaps between them, each of which the kernels may access.
struct SeparateParts : Workspace {
  Machine& machine_of_test;

  SeparateParts(char* base, Machine& machine) : Workspace(base), machine_of_test(machine) {}

  char* reserve(int64_t size) override {
    char* const part = Workspace::reserve(size);
    Workspace::reserve(4096);
    machine_of_test.allow(part, size);
    return part;
  }
};

// Runs kernels one after the other, until the first error.
struct Launch {
  Machine& machine_of_test;
  uint64_t seed;
  int shared_limit, launches = 0;
  int64_t largest_grid = 0;  // as planned

  template <class F>
  void run(int x, int y, int threads, int bytes, F kernel, bool overlaps = true, int resident = 0) {
    if (!machine_of_test.error.empty()) return;
    ++launches;
    if (bytes > shared_limit)
      machine_of_test.error = "a kernel needs " + std::to_string(bytes) + " bytes of shared memory";
    if (x > largest_grid) machine_of_test.error = "a kernel has more thread blocks than planned";
    if (!machine_of_test.error.empty()) return;
    machine = &machine_of_test;
    const Schedule schedule{seed, resident ? resident : seed ? 3 : 1, overlaps};
    machine_of_test.run(x, y, threads, (bytes + 15) / 16 * 16, schedule, kernel);
    machine = nullptr;
  }
  template <class Kernel>
  void operator()(KernelType<Kernel>, const typename Kernel::Arguments& arguments, int x, int y, int bytes) {
    run(x, y, Kernel::THREADS, bytes, [&] { run_in_order<Kernel>(arguments); });
  }
};

void launch_tiles(LossPlan& plan, Precision precision, bool pixels_adjacent, Launch& launch) {
  const sm80::Params& p = plan.tiles;
  const TilesKernel kernel = sm80_tiles(p, precision, pixels_adjacent, plan.u_channels);
  launch.run(p.images * p.blocks * p.channel_splits, p.splits, kernel.threads, kernel.bytes, kernel.run);
}

// A cooperative launch: all thread blocks are resident, and it does not start early.
void launch_tiles(Sm90LossPlan& plan, Precision, bool, Launch& launch) {
  sm90::Params& p = plan.tiles.params;
  p.student = plan.tiles.student, p.teacher = plan.tiles.teacher;
  const TilesKernel kernel = sm90_tiles(p, plan.tiles.precision, plan.tiles.variant);
  launch.run(p.work.grid, 1, kernel.threads, kernel.bytes, kernel.run, false, p.work.grid);
}

// Calls f with the element type and the layout of the features.
template <class F>
void with_features(int element, bool pixels_adjacent, F f) {
  const auto with_layout = [&](auto type) { pixels_adjacent ? f(type, std::true_type{}) : f(type, std::false_type{}); };
  if (element == 0) with_layout(BFloat16{});
  if (element == 1) with_layout(Half{});
  if (element == 2) with_layout(0.f);
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
// launches receives the number of kernels.
const char* relation_loss(int kernels, int element, int precision, bool pixels_adjacent, const FeaturesOfTest* features,
                          int images, int pixels, int normalize, int distance, double delta, double eps, bool rectify,
                          bool detach_norms, int reduction, bool need_grad, const int* device, uint64_t seed,
                          float* loss, void* gradient, const int64_t* gradient_strides,
                          const Intermediate* intermediate, int* launches) {
  LossArguments a{};
  Machine local;
  a.precision = static_cast<Precision>(precision), a.pixels_adjacent = pixels_adjacent;
  a.element_bytes = element == 2 ? 4 : 2;
  const int tile_bytes = a.precision == Precision::bf16 ? 2 : a.element_bytes;
  for (int i = 0; i < 2; ++i) {
    const FeaturesOfTest& f = features[i];
    const auto features_of = [&](const void* data, int bytes) {
      local.allow(data, f.extent * bytes, true);
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
  local.allow(loss, a.reduction == Reduction::none ? images * 4 : 4);
  local.allow(gradient, int64_t{images} * pixels * channels * (element == 0 ? 2 : 4));

  const Device properties{device[0], device[1], device[2], device[3]};
  std::vector<char> memory;
  const auto planned = [&](auto make_plan) {
    SeparateParts size(nullptr, local);
    make_plan(size);
    memory.assign(size.bytes + 256, static_cast<char>(0xff));  // NaN, and -1 in counters
    SeparateParts workspace(reinterpret_cast<char*>(round_up(reinterpret_cast<int64_t>(memory.data()), 256)), local);
    return make_plan(workspace);
  };
  Launch launch{local, seed, properties.shared_of_block};
  if (kernels == CLOSED_FORM) {
    const auto plan = planned([&](Workspace& w) { return cuda::closed_form::make_plan(a, device[0], w); });
    launch.largest_grid = plan.largest_grid;
    with_features(element, pixels_adjacent, [&](auto type, auto adjacent) {
      cuda::closed_form::launch_loss<decltype(type), decltype(adjacent)::value>(plan, launch);
    });
    *launches = launch.launches;
    message = local.error;
    return message.c_str();
  }
  const auto run = [&](auto plan) {
    launch.largest_grid = plan.largest_grid;
    with_features(element, pixels_adjacent, [&](auto type, auto adjacent) {
      launch_scales<decltype(type), decltype(adjacent)::value>(plan.scales, launch);
    });
    launch_tiles(plan, a.precision, pixels_adjacent, launch);
    with_features(element, pixels_adjacent, [&](auto type, auto adjacent) {
      launch_gradient<decltype(type), decltype(adjacent)::value>(plan.gradient, launch);
    });
    *launches = launch.launches;

    if (a.relation.normalize != Normalize::none)
      for (int i = 0; i < 2; ++i)
        std::copy_n(plan.scales.norms.alpha[i], int64_t{images} * pixels, intermediate->alpha[i]);
    if (a.relation.normalize == Normalize::row) {
      std::copy_n(plan.scales.moments.results.size, 2 * images, intermediate->size);
      add_terms(plan.scales.moments.results.whole, images, channels, intermediate->moment);
      if (plan.gradient.weighted.weighted)
        add_terms(plan.gradient.weighted.weighted, images, channels, intermediate->weighted);
    }
  };
  if (kernels == SM90)
    run(planned([&](Workspace& w) { return make_sm90_plan(a, properties, w); }));
  else
    run(planned([&](Workspace& w) { return make_plan(a, properties, w); }));
  message = local.error;
  return message.c_str();
}
}
