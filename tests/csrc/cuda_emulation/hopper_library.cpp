// The kernels of hopper_kernels.cuh on the host. tests/csrc/test_hopper_emulation.py calls them.
#include <string>

#include "hopper_kernels.cuh"

namespace {

using namespace srpkd::cuda;
using namespace srpkd::cuda::sm90::hopper_tests;
using emulation::Content;
using emulation::Machine;

std::string message;

const char* run(Machine& local, int blocks, int threads, int bytes, emulation::Schedule schedule,
                std::function<void()> kernel) {
  emulation::machine = &local;
  local.run(blocks, 1, threads, bytes, schedule, std::move(kernel));
  emulation::machine = nullptr;
  message = local.error;
  return message.c_str();
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Multiplies with wgmma and returns an error message, or "" on success. operands: see Operand.
const char* product(bool half, const uint16_t* a, const uint16_t* b, float* sum, const int* operands, int k, int n,
                    bool tma, uint64_t seed) {
  Product p = product_of(a, b, sum, operands, k, n, tma);
  p.maps[0] = p.shape(0), p.maps[1] = p.shape(1);
  Machine local;
  local.allow(a, 128 * k, Content::input), local.allow(b, 2 * n * k, Content::input);
  local.allow(sum, 4 * 64 * n, Content::none);
  return run(local, 1, WARPGROUP, PRODUCT_BYTES, {seed, 1}, [&] { half ? multiply<Half>(p) : multiply<BFloat16>(p); });
}

// Runs the pipeline with a fault, and `resident` blocks at the same time.
const char* pipeline(const uint16_t* features, int64_t bytes, float* rows, float* columns, uint32_t* additions,
                     float* trace, int tiles, int pixels, int channels, int resident, int fault, uint64_t seed) {
  const PipelineArguments p{
      shape_of_features(features, channels, pixels), rows, columns, additions, trace, tiles, static_cast<Fault>(fault)};
  Machine local;
  local.allow(features, bytes, Content::input), local.allow(rows, tiles * 8192 * 4, Content::none);
  local.allow(columns, tiles * 8192 * 4, Content::given), local.allow(additions, tiles * 4, Content::given);
  local.allow(trace, tiles * 4, Content::given);
  return run(local, tiles, Pipeline::THREADS, Pipeline::BYTES, {seed, resident}, [&] { Pipeline(p).run(); });
}
}
#pragma GCC visibility pop
