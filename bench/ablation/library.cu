// The wgmma tiles for bfloat16, row and l1 with gradient, as a library without torch: bench/ablation calls it through
// ctypes. It is compiled with a copy of csrc/cuda in which a part of the kernel is taken out. Compiled for the host, it
// runs in the emulation of tests/csrc/cuda_emulation.
#if defined(__CUDACC__)
#include "sm90/launch.h"
#else
#include <string>

#include "sm90_primitives.h"
// after the primitives
#include "sm90/relation_tiles.cuh"
#include "sm90/tile_plan.h"
#endif
#include "loss_plan.h"

namespace {

using namespace srpkd::cuda;
using namespace srpkd::cuda::sm90;

using Kernel = Config<BFloat16, /*PIXELS_ADJACENT=*/true, /*SYMMETRIC=*/false, /*L1=*/true, /*GRAD=*/true, 1>;

}  // namespace

extern "C" {

// Features in NCHW memory, (images, channels, pixels), with the scales of the relation matrix, (images, pixels).
struct Case {
  int images, pixels, student_channels, teacher_channels, multiprocessors;
  const void* student;
  const void* teacher;
  const float* alpha_student;
  const float* alpha_teacher;
};

// Bytes of the workspace, the place and number of its sums of the loss, with which all results begin, thread blocks,
// and their tiles together.
struct Description {
  int64_t workspace_bytes, losses_at, losses, results_bytes, grid, tiles;
};

namespace {

TilePlan plan_of(const Case& of, Workspace& workspace) {
  const Problem problem{of.images,       of.pixels, of.student_channels,   of.teacher_channels,
                        Precision::bf16, true,      srpkd::Normalize::row, srpkd::Distance::l1,
                        /*delta=*/1,     false,     /*with_h=*/true};
  const auto features = [&](const void* data, int channels) {
    return Features{data, {int64_t{channels} * of.pixels, 1, of.pixels}, channels, 2};
  };
  TilePlan plan = plan_tiles(problem, features(of.student, of.student_channels),
                             features(of.teacher, of.teacher_channels), of.multiprocessors, workspace);
  plan.params.alpha_student = of.alpha_student, plan.params.alpha_teacher = of.alpha_teacher;
  return plan;
}

}  // namespace

void describe(const Case* of, Description* result) {
  alignas(256) static char base[1];
  Workspace size{nullptr}, places{base};
  plan_of(*of, size);
  const Params p = plan_of(*of, places).params;
  const char *first = reinterpret_cast<char*>(p.loss), *end = reinterpret_cast<char*>(p.additions);
  *result = {size.bytes,  first - base, p.loss_count,
             end - first, p.work.grid,  int64_t{p.work.images} * p.work.image_items};
}

#if defined(__CUDACC__)

// Enqueues the kernel. Returns an error message, or "".
const char* launch(const Case* of, void* memory, void* stream) {
  Workspace workspace{static_cast<char*>(memory)};
  Launches launches{static_cast<cudaStream_t>(stream)};
  const cudaError_t error = launch_kernel<Kernel>(plan_of(*of, workspace), launches);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

namespace {

// Spins, and stores the clocks and nanoseconds that have passed.
__global__ void count_clocks(int64_t nanoseconds, int64_t* result) {
  const auto now = [] {
    int64_t time;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
    return time;
  };
  const int64_t start = now(), first = clock64();
  int64_t end = start;
  while (end - start < nanoseconds) end = now();
  result[0] = clock64() - first, result[1] = end - start;
}

}  // namespace

// Enqueues the measurement of the clock rate.
const char* clocks(int64_t nanoseconds, int64_t* result, void* stream) {
  count_clocks<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(nanoseconds, result);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

#else

// Runs the kernel in the emulation.
const char* launch(const Case* of, void* memory, void*) {
  static std::string message;
  emulation::Machine machine;
  Workspace workspace{static_cast<char*>(memory)};
  TilePlan plan = plan_of(*of, workspace);
  Params& p = plan.params;
  p.student = plan.student, p.teacher = plan.teacher;
  const int64_t pixels = int64_t{of->images} * of->pixels;
  machine.allow(memory, workspace.bytes);
  machine.allow(of->student, 2 * pixels * of->student_channels, true);
  machine.allow(of->teacher, 2 * pixels * of->teacher_channels, true);
  machine.allow(of->alpha_student, 4 * pixels), machine.allow(of->alpha_teacher, 4 * pixels);
  emulation::machine = &machine;
  machine.run(p.work.grid, 1, Kernel::THREADS, Kernel::bytes(p), {1, p.work.grid},
              [&] { relation_tiles_of_block<Kernel>(p); });
  emulation::machine = nullptr;
  message = machine.error;
  return message.c_str();
}

#endif
}
