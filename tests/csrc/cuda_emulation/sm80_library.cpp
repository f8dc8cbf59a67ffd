// The kernels of csrc/cuda/sm80 on the host. tests/csrc/test_cuda_emulation.py calls them through ctypes.
#include <algorithm>
#include <string>

#include "../../../csrc/cuda/sm80/launch.h"
#include "emulation.h"
#include "execution.h"

namespace {

using namespace srpkd::cuda;
using namespace srpkd::cuda::sm80;
using emulation::Content;
using emulation::Execution;
using emulation::Machine;
using srpkd::Distance;

std::string message;

// A kernel that contains one of several mistakes, which the emulation must report.
void copy_and_read(const float* data, bool commit, bool wait, bool barrier, int shift) {
  copy_async<16>(thread_index() * 16, data + thread_index() * 4 + shift, 16);
  if (commit) commit_copies();
  if (wait) wait_for_copies<0>();
  if (barrier) sync_block();
  load_shared<float>(thread_index() / 2 * 32);
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

struct FeaturesOfTest {
  const void* data;
  const float* alpha;
  int64_t image_stride, line_stride;
  int channels;
};

// Runs the kernel for these arguments and returns an error message, or "" on success. extents: bytes that the features
// span; strides: of U, see Params; splits: of the columns; shared_limit: maximum bytes of shared memory of a block.
const char* relation_tiles(int precision, bool pixels_adjacent, bool grad, const FeaturesOfTest* features,
                           const int64_t* extents, int images, int pixels, int splits, int shared_limit, int distance,
                           bool row, bool zero_diagonal, bool rectify, float delta, double* loss, float* U,
                           const int64_t* strides, float* h, uint64_t seed) {
  Params p{};
  p.images = images, p.pixels = pixels;
  p.distance = static_cast<Distance>(distance), p.delta = delta;
  p.row = row, p.zero_diagonal = zero_diagonal, p.rectify = rectify;
  p.loss = loss, p.U = U, p.h = h;
  std::copy(strides, strides + 4, p.U_strides);
  Execution gpu({{1, shared_limit, shared_limit, 0, 8, 1}}, 0, seed);
  Machine& machine = gpu.machine;
  for (int i = 0; i < 2; ++i) {
    const FeaturesOfTest& f = features[i];
    p.features[i] = {f.data,         f.alpha,
                     f.image_stride, f.line_stride,
                     f.channels,     copy_bytes(f.data, f.image_stride, f.line_stride, precision < 2 ? 2 : 4)};
    machine.allow(f.data, extents[i], Content::input);
    machine.allow(f.alpha, int64_t{images} * pixels * 4, Content::given);
  }
  const int u_channels = plan(p, static_cast<Precision>(precision), grad, {1, shared_limit, shared_limit, 0});
  p.splits = splits;
  machine.allow(loss, int64_t{images} * splits * p.blocks * 8, Content::none);
  machine.allow(U, int64_t{splits} * images * pixels * features[1].channels * 4, Content::none);
  machine.allow(h, int64_t{splits} * images * pixels * 4, Content::none);
  Launches launches{nullptr};
  message = cudaGetErrorString(launch(p, static_cast<Precision>(precision), pixels_adjacent, u_channels, launches));
  return message.c_str();
}

// Runs a kernel with the named mistake and returns the error message of the emulation.
const char* mistake(const char* name) {
  alignas(16) static float data[1024] = {};
  const std::string is = name;
  Machine machine;
  machine.allow(data, is == "out of bounds" ? 64 : sizeof data, Content::given);
  emulation::machine = &machine;
  machine.run(1, 1, 64, 64 * 16, {}, [&] {
    if (is == "none" || is == "out of bounds") copy_and_read(data, true, true, true, 0);
    if (is == "no commit") copy_and_read(data, false, true, true, 0);
    if (is == "no wait") copy_and_read(data, true, false, true, 0);
    if (is == "no barrier") copy_and_read(data, true, true, false, 0);
    if (is == "misaligned") copy_and_read(data, true, true, true, 1);
    if (is == "overwritten") {
      store_shared(thread_index() * 4, 1.f);
      sync_block();
      if (thread_index() % 2)
        store_shared(thread_index() * 4 - 4, 2.f);
      else
        load_shared<float>(thread_index() * 4);
    }
    if (is == "unwritten") load_shared<float>(0);
    if (is == "diverged" && thread_index() < 40) sync_block();
    if (is == "different") thread_index() % 2 ? shuffle_xor(1., 1) : shuffle_xor(1.f, 1);
  });
  emulation::machine = nullptr;
  message = machine.error;
  return message.c_str();
}

// Runs a kernel of two blocks that share global memory, and returns the error message of the emulation.
const char* share(const char* how, uint64_t seed) {
  alignas(16) static float data[128];
  static int counter;
  counter = 0;
  const std::string is = how;
  Machine machine;
  machine.allow(data, sizeof data, is == "unwritten" ? Content::none : Content::given);
  machine.allow(&counter, sizeof counter, Content::given);
  emulation::machine = &machine;
  machine.run(2, 1, 64, 64 * 16, {seed, 2}, [&] {
    const int thread = thread_index(), block = block_index(0), own = 64 * block + thread, other = 127 - own;
    const auto count = [](bool barriers) {  // returns whether this block is the last
      if (barriers) sync_block();
      if (thread_index() == 0) store_shared(0, increment(&counter));
      sync_block();
      return load_shared<int>(0) == 1;
    };
    if (is == "unwritten") load_global(data + own);
    if (is == "written by both") store_global(data + thread, 1.f);
    if (is == "read after it was written" || is == "ordered by the grid") {
      store_global(data + own, 1.f);
      if (is == "ordered by the grid") sync_grid();
      load_global(data + other);
    }
    if (is == "written after it was read") {
      load_global(data + other);
      store_global(data + own, 1.f);
    }
    if (is == "ordered by a counter" || is == "counted without a barrier") {
      store_global(data + own, 1.f);
      if (count(is == "ordered by a counter")) load_global(data + other);
    }
    if (is == "overwritten by the last") {
      load_global(data + other);
      if (count(true)) store_global(data + other, 1.f);
    }
    if (is == "read by another thread") {
      store_global(data + own, 1.f);
      load_global(data + (own ^ 1));
    }
    if (is == "ordered in the block") {
      store_global(data + own, 1.f);
      sync_block();
      load_global(data + (own ^ 1));
    }
    if (is == "counter that is read") {
      if (thread == 0) increment(&counter);
      load_global(&counter);
    }
  });
  emulation::machine = nullptr;
  message = machine.error;
  return message.c_str();
}

// Adds to visits[blocks * blocks] how often each row block visits each column block.
void walk(int blocks, bool grad, int splits, int* visits) {
  for (int row = 0; row < blocks; ++row)
    for (int split = 0; split < splits; ++split) {
      const Walk walk = walk_of(row, blocks, grad, split, splits);
      for (int step = 0; step < walk.steps; ++step) ++visits[row * blocks + (walk.first + step) % blocks];
    }
}

// Plans a launch for a GPU. The results are the bytes of shared memory of a block, the resident panels, the channels of
// U of a block, the splits of these channels and the splits of the columns.
void plan_of(int precision, bool grad, int images, int pixels, int student_channels, int teacher_channels,
             const Device* device, int* result) {
  Params p{};
  p.images = images, p.pixels = pixels;
  p.features[0].channels = teacher_channels, p.features[1].channels = student_channels;
  result[2] = plan(p, static_cast<Precision>(precision), grad, *device);
  result[1] = p.resident, result[3] = p.channel_splits, result[4] = p.splits;
  with_precision(static_cast<Precision>(precision), [&](auto chosen) {
    with_config(chosen, false, result[2], [&](auto config) { result[0] = shared_bytes<decltype(config)>(p); });
  });
}
}
#pragma GCC visibility pop
