// The kernels of csrc/cuda/sm90 on the host. tests/emulated_tiles.py calls them through ctypes.
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "sm90_primitives.h"
// after the primitives
#include "../../../csrc/cuda/sm90/launch.h"
#include "../../../csrc/cuda/sm90/sums.cuh"
#include "../../../csrc/cuda/sm90/tile_plan.h"
#include "execution.h"

namespace {

using namespace srpkd;
using namespace srpkd::cuda;
using namespace srpkd::cuda::sm90;
using emulation::Content;
using emulation::Execution;
using emulation::Machine;

std::string message;
int copied_networks;

// Memory that the kernel may access, filled with NaN.
struct Workspace {
  Machine* machine;
  std::vector<std::unique_ptr<char[]>> parts;

  template <class T>
  T* take(int64_t count) {
    const size_t bytes = count * sizeof(T) + 128;
    parts.emplace_back(new char[bytes]);
    std::memset(parts.back().get(), 0xff, bytes);
    auto* const begin = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(parts.back().get()) + 127) / 128 * 128);
    machine->allow(begin, count * sizeof(T), Content::none);
    return begin;
  }
};

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

struct ProblemOfTest {
  int images, pixels, student_channels, teacher_channels, precision, grad, normalize, distance;
  float delta;
};

static Problem problem_of(const ProblemOfTest& of_test) {
  return {of_test.images,
          of_test.pixels,
          of_test.student_channels,
          of_test.teacher_channels,
          static_cast<Precision>(of_test.precision),
          of_test.grad != 0,
          static_cast<Normalize>(of_test.normalize),
          static_cast<Distance>(of_test.distance),
          of_test.delta,
          false,
          static_cast<Normalize>(of_test.normalize) != Normalize::none};
}

// Returns why the kernel does not cover a problem, or "".
const char* uncovered(const ProblemOfTest* of_test, int multiprocessors) {
  const char* const reason = uncovered_reason(problem_of(*of_test), {multiprocessors, SHARED_LIMIT});
  return reason ? reason : "";
}

struct FeaturesOfTest {
  const void* data;
  const float* alpha;
  int64_t strides[3], bytes;
  int element_bytes;
};

// Walks over the work as the thread blocks do. sizes: of Work, blocks, groups, grid and parts. If `visits` is not null,
// counts the visits to each pair of blocks (images, blocks, blocks) and the segments of each row (images, blocks,
// parts). order (images, blocks, blocks): the place of each addition to a column block, by its rank.
void walk(int images, int pixels, int multiprocessors, int* sizes, int* visits, int* segments, int* order) {
  const Work work = divide(images, pixels, TILE, multiprocessors);
  sizes[0] = work.blocks, sizes[1] = work.groups, sizes[2] = work.grid, sizes[3] = work.parts;
  if (!visits) return;
  for (int block = 0; block < work.grid; ++block) {
    Segments walked(work, block);
    Segment segment{};
    int place = 0;
    for (int group = -1; walked.next(segment);) {
      if (group != walked.group) place = 0, group = walked.group;
      const int row = segment.image * work.blocks + segment.row;
      ++segments[row * work.parts + block - owners_of(work, segment.image, segment.row).first];
      for (int step = segment.first; step < segment.end; ++step, ++place) {
        const int column = column_of(work.blocks, segment.row, step);
        ++visits[row * work.blocks + column];
        int rank = 0;
        for (int lane = 0; lane < 32; ++lane)
          rank += earlier_items(work, segment.image, segment.row, step, 1 + lane, 32);
        if (step > 0) order[(segment.image * work.blocks + column) * work.blocks + rank] = place * work.grid + block;
      }
    }
  }
}

// Runs the kernel with one thread block on each of `multiprocessors`, and returns an error message, or "" on success.
// loss: (images,); U: (images, pixels, channels); h: (images, pixels).
const char* relation_tiles(const ProblemOfTest* of_test, const FeaturesOfTest* student, const FeaturesOfTest* teacher,
                           int multiprocessors, uint64_t seed, double* loss, float* U, float* h) {
  const Problem problem = problem_of(*of_test);
  if (const char* reason = uncovered_reason(problem, {multiprocessors, SHARED_LIMIT})) return reason;
  Execution gpu({{multiprocessors, SHARED_LIMIT, SHARED_LIMIT, 0, 9, 1}}, 0, seed);
  Workspace workspace{&gpu.machine, {}};
  const auto features = [&](const FeaturesOfTest& x, int channels) {
    gpu.machine.allow(x.data, x.bytes, Content::input);
    if (x.alpha) gpu.machine.allow(x.alpha, 4 * int64_t{problem.images} * problem.pixels, Content::given);
    return Features{x.data, {x.strides[0], x.strides[1], x.strides[2]}, channels, x.element_bytes};
  };
  TilePlan plan = plan_tiles(problem, features(*student, problem.student_channels),
                             features(*teacher, problem.teacher_channels), multiprocessors, workspace);
  Params& p = plan.params;
  p.alpha_student = student->alpha, p.alpha_teacher = teacher->alpha;
  copied_networks = (p.sources[0].terms != nullptr) + (p.sources[1].terms != nullptr);

  Launches launches{nullptr};
  message = cudaGetErrorString(launch(plan, launches));
  if (!message.empty()) return message.c_str();

  const SumsOfSegments sums = sums_of(p, plan.variant.symmetric);
  for (int image = 0; image < problem.images; ++image) {
    loss[image] = 0;
    for (int i = 0; i < sums.loss_parts; ++i) loss[image] += sums.losses[int64_t{image} * sums.loss_parts + i];
    if (!problem.grad) continue;
    for (int pixel = 0; pixel < problem.pixels; ++pixel) {
      const int block = pixel / TILE, at = pixel % TILE;
      const int64_t pixel_of_batch = int64_t{image} * problem.pixels + pixel;
      const float unit = sums.sum_factor *
                         unit_of_U(sums.symmetric, sums.powers[image], sums.units ? sums.units[pixel_of_batch] : 1.f);
      if (sums.h)
        h[pixel_of_batch] = static_cast<float>(
            static_cast<double>(sums.h[(int64_t{image} * p.work.blocks + block) * TILE + at]) / p.h_scale);
      for (int channel = 0; channel < problem.student_channels; ++channel) {
        float sum = 0;
        for_each_part(sums, image * p.channel_splits + channel / GROUP, block,
                      [&](const float* part) { sum += part[position_in_U(channel % GROUP, at)]; });
        U[pixel_of_batch * problem.student_channels + channel] = sum * unit;
      }
    }
  }
  return "";
}

// Returns how many of student and teacher the last call of relation_tiles copied.
int copied() { return copied_networks; }
}
#pragma GCC visibility pop
