// Kernels that follow each other, as phases of a call: one launch for each, or one for several. Free of torch.
//
// In a launch of several phases, each thread block does the work of many, and waits for all others between two phases.
// It saves the host's time for launches. The launch is cooperative: without that, a block could wait for another that
// the GPU has no place for.
#pragma once

#include "../overlap.cuh"

namespace srpkd::cuda::algebra {

// A kernel and its launch: a grid of x * y thread blocks and their bytes of shared memory. Kernel: the work of a thread
// block, constructed from the arguments and a BlockIndex, with THREADS and MIN_BLOCKS of __launch_bounds__.
template <class Kernel_>
struct Phase {
  using Kernel = Kernel_;
  typename Kernel::Arguments arguments;
  int x, y, bytes;
};

template <class... Kernels>
struct Phases {};
template <class First, class... Others>
struct Phases<First, Others...> {
  Phase<First> first;
  Phases<Others...> others;
};

inline Phases<> phases_of() { return {}; }
template <class First, class... Others>
Phases<First, Others...> phases_of(const Phase<First>& first, const Phase<Others>&... others) {
  return {first, phases_of(others...)};
}

// The arguments of a launch of several phases. `grid`: its thread blocks.
template <class... Kernels>
struct Together {
  Phases<Kernels...> phases;
  int grid;
};

template <class... Kernels>
SRPKD_DEVICE void run_phases(const Phases<Kernels...>& phases, int grid) {
  const auto& [arguments, x, y, bytes] = phases.first;
#pragma unroll 1
  for (int block = block_index(0); block < x * y; block += grid) {
    sync_block();  // the shared memory is free
    typename decltype(phases.first)::Kernel(arguments, {block % x, block / x}).run();
  }
  if constexpr (sizeof...(Kernels) > 1) {
    sync_grid();
    run_phases(phases.others, grid);
  }
}

}  // namespace srpkd::cuda::algebra
