// The kernels of hopper_kernels.cuh on a GPU, with the functions of hopper_library.cpp: what holds in the emulation can
// be confirmed on real hardware. tests/csrc/test_hopper_emulation.py builds and calls them.
#include <string>

#include "hopper_kernels.cuh"

namespace {

using namespace srpkd::cuda;
using namespace srpkd::cuda::sm90::hopper_tests;

template <typename T>
__global__ void __launch_bounds__(WARPGROUP) product_kernel([[maybe_unused]] const __grid_constant__ Product p) {
#if SRPKD_DEVICE_SM90A
  multiply<T>(p);
#endif
}

__global__ void __launch_bounds__(Pipeline::THREADS, 1)
    pipeline_kernel([[maybe_unused]] const __grid_constant__ PipelineArguments p) {
#if SRPKD_DEVICE_SM90A
  Pipeline(p).run();
#endif
}

std::string message;

// The first error of a series of calls.
struct Status {
  cudaError_t error = cudaSuccess;
  void operator()(cudaError_t next) {
    if (error == cudaSuccess) error = next;
  }
};

// A copy of host memory on the GPU, copied back at the end if it is not const.
template <typename T>
struct Copy {
  T* host;
  size_t bytes;
  Status& check;
  std::remove_const_t<T>* device = nullptr;

  Copy(T* from, size_t size, Status& status) : host(from), bytes(size), check(status) {
    check(cudaMalloc(&device, bytes));
    check(cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice));
  }
  ~Copy() {
    if constexpr (!std::is_const_v<T>) check(cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost));
    cudaFree(device);
  }
};

template <typename Kernel, typename Arguments>
void launch(Kernel kernel, int blocks, int threads, int bytes, const Arguments& arguments, Status& check) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  if (check.error != cudaSuccess) return;
  kernel<<<blocks, threads, bytes>>>(arguments);
  check(cudaGetLastError());
  check(cudaDeviceSynchronize());
}

const char* report(const Status& status) {
  message = status.error == cudaSuccess ? "" : cudaGetErrorString(status.error);
  return message.c_str();
}

}  // namespace

extern "C" {

const char* product(bool half, const uint16_t* a, const uint16_t* b, float* sum, const int* operands, int k, int n,
                    bool tma, uint64_t) {
  Status check;
  {
    Copy<const uint16_t> device_a(a, 128 * k, check), device_b(b, 2 * n * k, check);
    Copy<float> device_sum(sum, 4 * 64 * n, check);
    Product p = product_of(device_a.device, device_b.device, device_sum.device, operands, k, n, tma);
    check(encode(p.shape(0), p.maps[0]));
    check(encode(p.shape(1), p.maps[1]));
    launch(half ? product_kernel<Half> : product_kernel<BFloat16>, 1, WARPGROUP, PRODUCT_BYTES, p, check);
  }
  return report(check);
}

const char* pipeline(const uint16_t* features, int64_t bytes, float* rows, float* columns, uint32_t* additions,
                     float* trace, int tiles, int pixels, int channels, int, int fault, uint64_t) {
  if (fault) return "mistakes are not run on a GPU";
  Status check;
  {
    Copy<const uint16_t> device_features(features, bytes, check);
    Copy<float> device_rows(rows, tiles * 8192 * 4, check), device_columns(columns, tiles * 8192 * 4, check);
    Copy<uint32_t> device_additions(additions, tiles * 4, check);
    Copy<float> device_trace(trace, tiles * 4, check);
    PipelineArguments p{
        {}, device_rows.device, device_columns.device, device_additions.device, device_trace.device, tiles, none};
    check(encode(shape_of_features(device_features.device, channels, pixels), p.map));
    launch(pipeline_kernel, tiles, Pipeline::THREADS, Pipeline::BYTES, p, check);
  }
  return report(check);
}
}
