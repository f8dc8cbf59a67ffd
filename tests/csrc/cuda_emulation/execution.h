// A GPU that executes what csrc/cuda launches, on the machine in machine.h. Compile with -I of runtime/.
#pragma once

#include <cuda_runtime.h>

#include <functional>
#include <utility>
#include <vector>

#include "machine.h"

namespace srpkd::cuda::emulation {

// While it exists, kernels that are launched run on its machine, one after the other, until the first error.
class Execution {
 public:
  Machine machine;

  // On one of several GPUs, each with its attributes in the order of cudaDeviceAttr.
  Execution(std::vector<std::vector<int>> gpus, int gpu, uint64_t seed) {
    recorded::attributes = std::move(gpus), recorded::device = gpu, recorded::ptx_version = 90;
    recorded::launches.clear();
    recorded::run = [this, seed](const recorded::Launch& launch, std::function<void()> kernel) {
      const dim3 grid = launch.config.gridDim;
      const int resident = launch.cooperative ? static_cast<int>(grid.x * grid.y) : seed ? 3 : 1;
      emulation::machine = &machine;
      machine.run(grid.x, grid.y, launch.config.blockDim.x,
                  (static_cast<int>(launch.config.dynamicSmemBytes) + 15) / 16 * 16, {seed, resident, launch.early},
                  std::move(kernel));
      emulation::machine = nullptr;
      return machine.error;
    };
  }
  Execution(const Execution&) = delete;
  ~Execution() { recorded::attributes.clear(), recorded::run = nullptr; }
};

}  // namespace srpkd::cuda::emulation
