// csrc/cuda/launches.h and shared_limit.h with a runtime that only records. tests/csrc/test_cuda_launches.py calls it
// through ctypes.
#include "../../../csrc/cuda/launches.h"

#include <algorithm>

#include "../../../csrc/cuda/shared_limit.h"

namespace {

using srpkd::cuda::allow_all_shared_memory;
using srpkd::cuda::blocks_of_multiprocessor;
using srpkd::cuda::Launches;

struct Arguments {
  int value;
};
template <int>
void kernel(const Arguments) {}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Launches three different kernels in one call on a GPU. `tiles`: after tiles that were launched in another way. Each
// bit of `early` says whether a kernel may start early. Returns 0, or the error of the runtime.
int launch(bool overlap, bool tiles, int device, int major, int ptx_version, int* early, int* queries) {
  recorded::device = device, recorded::major = major, recorded::ptx_version = ptx_version;
  recorded::launches.clear(), recorded::queries = 0;
  int stream = 0;
  Launches launches = overlap ? Launches{&stream, true} : Launches{&stream};
  launches.any = tiles;
  cudaError_t error = launches.launch<kernel<0>>(dim3(3, 2), 128, 1000, Arguments{1});
  if (error == cudaSuccess) error = launches.launch<kernel<1>>(dim3(3, 2), 128, 1000, Arguments{1});
  if (error == cudaSuccess) error = launches.launch<kernel<2>>(dim3(3, 2), 128, 1000, Arguments{1});
  *early = 0, *queries = recorded::queries;
  for (unsigned i = 0; i < recorded::launches.size(); ++i) {
    const cudaLaunchConfig_t& config = recorded::launches[i].config;
    if (config.gridDim.x != 3 || config.gridDim.y != 2 || config.blockDim.x != 128 || config.stream != &stream ||
        config.dynamicSmemBytes != 1000)
      return -1;
    *early |= int{recorded::launches[i].early} << i;
  }
  return error;
}

// Sets `blocks` to those of a kernel on a GPU whose multiprocessors have some bytes of shared memory; -1: the query
// fails. Returns 0, or the error of the runtime.
int resident(int device, int bytes_of_multiprocessor, int bytes, int* blocks, int* queries) {
  recorded::attributes.assign(device + 1, {1, 0, bytes_of_multiprocessor, 0, 9, 1});
  recorded::device = device, recorded::queries = 0;
  const cudaError_t error = blocks_of_multiprocessor<kernel<0>>(128, bytes, *blocks);
  recorded::attributes.clear();
  *queries = recorded::queries;
  return error;
}

// Lets a kernel use all shared memory of a GPU whose thread blocks can have some bytes; -1: setting that fails.
// `major`: -1 if the GPU does not say how many. Returns 0, or the error of the runtime.
int allow(int device, int bytes, int major, int* queries) {
  if (major >= 0) recorded::attributes.assign(std::max(device, 0) + 1, {1, bytes, bytes, 0, major, 1});
  recorded::device = device, recorded::major = major, recorded::queries = 0;
  const cudaError_t error = allow_all_shared_memory<kernel<0>>();
  recorded::attributes.clear();
  *queries = recorded::queries;
  return error;
}
}
#pragma GCC visibility pop
