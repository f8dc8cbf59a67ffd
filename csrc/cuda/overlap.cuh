// How a kernel of a call starts while the one before it ends: programmatic dependent launches, on GPUs since Hopper and
// with SRPKD_CUDA_OVERLAP=1, see launches.h. Free of torch.
//
// All threads wait for the kernels before theirs, before they do anything else, and only then let the next kernel
// start. A launch without the attribute has nothing to wait for.
//
// Why that is enough. Let A, B and C be three kernels of a call, one after the other.
//   - griddepcontrol.wait returns when the kernel before has completed and its writes are visible. B completes only
//     after all its threads have waited for A. So C waits for A, too: it may read the results of both, and overwrite
//     what they read, such as counters. A thread of B that skips the wait would break that.
//   - C is scheduled when each block of B has executed launch_dependents or has ended, hence after A has completed. So
//     at most two kernels of a call are on the GPU at a time. All blocks of B have started by then: those of C, which
//     wait, cannot take their place.
//   - A launch without the attribute starts when everything before it has completed. The first kernel of a call is one:
//     kernels of others may have written what it reads, or may still use the memory that the workspace and the results
//     get. Others are cooperative launches, whose thread blocks are all on the GPU at once: the tiles of sm_90a, and
//     phases.cuh. They let the next kernel start by ending, and that kernel waits for them.
//   - ld.global.nc reads memory that does not change while the kernel runs, and a kernel that waits runs already. It is
//     for the inputs of a call, see load_input: the features and, in backward, the gradient and grad_loss.
//   - No kernel waits for a later one, so it does not matter whether the GPU really starts a kernel early.
#pragma once

#if defined(SRPKD_EMULATION)
#include "emulation.h"  // tests/csrc/cuda_emulation
#else
#include "primitives.cuh"
#endif

namespace srpkd::cuda {

// Work: the work of a thread block, whose members may read global memory when they are constructed.
template <class Work, class... Arguments>
SRPKD_DEVICE void run_in_order(const Arguments&... arguments) {
  wait_for_earlier_kernels();
  let_next_kernel_start();
  Work(arguments...).run();
}

}  // namespace srpkd::cuda
