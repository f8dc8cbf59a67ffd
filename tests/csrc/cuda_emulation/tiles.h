// The tiles of csrc/cuda on the host. sm80_tiles.cpp and sm90_tiles.cpp compile them once, for the libraries of the
// tiles and for that of the whole loss.
#pragma once

#include <functional>

#include "../../../csrc/cuda/sm80/plan.h"
#include "../../../csrc/cuda/sm90/plan.h"

namespace srpkd::cuda {

// A kernel for the parameters that it was chosen for, which must outlive it.
struct TilesKernel {
  int threads, bytes;         // of a block: threads, and bytes of shared memory
  std::function<void()> run;  // what a thread runs
};

TilesKernel sm80_tiles(const sm80::Params& p, Precision precision, bool pixels_adjacent, int u_channels);
TilesKernel sm90_tiles(const sm90::Params& p, Precision precision, const sm90::Variant& variant);

}  // namespace srpkd::cuda
