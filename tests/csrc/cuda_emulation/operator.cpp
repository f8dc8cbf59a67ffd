// csrc/cuda/operator.cpp and backward.cpp for tensors on the CPU, whose kernels run on an emulated GPU.
// tests/csrc/test_cuda_operator.py starts and stops it through ctypes.
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <map>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#define SRPKD_CUDA_ARCHITECTURES "8.0;9.0a"
// what they register for CUDA, start() registers for the CPU
#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(library, key, m) \
  [[maybe_unused]] static void C10_CONCATENATE(not_registered_, C10_UID)(torch::Library & m)
#include "../../../csrc/cuda/backward.cpp"
#include "../../../csrc/cuda/operator.cpp"
#include "execution.h"

namespace {

using at::Tensor;
using srpkd::cuda::emulation::Content;
using srpkd::cuda::emulation::Execution;

// Hands out memory that is aligned as on a GPU, and filled with NaN, or -1 in counters.
struct Allocator final : c10::Allocator {
  static constexpr size_t ALIGNMENT = 512;
  static inline std::map<void*, size_t> allocated;  // bytes, of what a call has allocated and not freed

  c10::DataPtr allocate(size_t bytes) override {
    void* const data = std::aligned_alloc(ALIGNMENT, (bytes / ALIGNMENT + 1) * ALIGNMENT);
    TORCH_CHECK(data, "out of memory");
    std::memset(data, 0xff, bytes);
    allocated[data] = bytes;
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  static void release(void* data) {
    allocated.erase(data);
    std::free(data);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

Allocator allocator;
std::vector<std::vector<int>> gpus;  // as in Execution
int gpu = 0;
bool unhandled = false;  // whether a call has left an error of the runtime to whoever asks next
uint64_t seed = 0;

bool unwritten(const void* data, size_t bytes) {
  const auto* const begin = static_cast<const unsigned char*>(data);
  return std::all_of(begin, begin + bytes, [](unsigned char byte) { return byte == 0xff; });
}

// A call of an operator with some inputs. Its kernels may access these, and what it allocates.
class Call {
 public:
  explicit Call(std::initializer_list<Tensor> inputs) : execution_(gpus, gpu, seed) {
    for (const Tensor& x : inputs) {
      if (!x.defined() || !x.numel()) continue;
      int64_t last = 0;
      for (int64_t dim = 0; dim < x.dim(); ++dim) last += (x.size(dim) - 1) * x.stride(dim);
      execution_.machine.allow(x.const_data_ptr(), (last + 1) * x.element_size(), Content::input);
    }
    Allocator::allocated.clear();
    c10::SetCPUAllocator(&allocator, PRIORITY);
    recorded::run = [this, run = std::move(recorded::run)](const recorded::Launch& launch, auto kernel) {
      if (recorded::launches.size() == 1)
        for (const auto& [data, bytes] : Allocator::allocated)  // what PyTorch has written are copies of inputs
          execution_.machine.allow(data, bytes, unwritten(data, bytes) ? Content::none : Content::input);
      return run(launch, std::move(kernel));
    };
  }
  Call(const Call&) = delete;
  ~Call() {
    c10::SetCPUAllocator(before_, PRIORITY);
    unhandled |= cudaGetLastError() != cudaSuccess;
  }

 private:
  static constexpr uint8_t PRIORITY = 255;
  c10::Allocator* const before_ = c10::GetCPUAllocator();
  Execution execution_;
};

srpkd::LossAndGradient relation_loss_forward(const Tensor& student, const Tensor& teacher, std::string_view normalize,
                                             std::string_view distance, double delta, double eps, bool rectify,
                                             bool detach_norms, std::string_view reduction, std::string_view method,
                                             bool need_grad) {
  const Call call{student, teacher};
  return srpkd::cuda::relation_loss_forward(student, teacher, normalize, distance, delta, eps, rectify, detach_norms,
                                            reduction, method, need_grad);
}

srpkd::Outputs relation_tiles(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& alpha_s,
                              const std::optional<Tensor>& alpha_t, std::string_view normalize,
                              std::string_view distance, double delta, bool rectify, bool need_grad, int64_t tile) {
  const Call call{student, teacher, alpha_s.value_or(Tensor()), alpha_t.value_or(Tensor())};
  return srpkd::cuda::relation_tiles(student, teacher, alpha_s, alpha_t, normalize, distance, delta, rectify, need_grad,
                                     tile);
}

Tensor relation_loss_backward(const Tensor& gradient, const Tensor& grad_loss, at::ScalarType dtype) {
  const Call call{gradient, grad_loss};
  return srpkd::cuda::relation_loss_backward(gradient, grad_loss, dtype);
}

std::optional<torch::Library> library;

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Computes the operators for the CPU on a GPU, until stop(). attributes: (count, 7), of each GPU as in Execution; the
// same at each start, because csrc/cuda asks once.
void start(const int* attributes, int count, int chosen, uint64_t of_schedules) {
  gpus.clear();
  for (int i = 0; i < count; ++i) gpus.emplace_back(attributes + 7 * i, attributes + 7 * (i + 1));
  gpu = chosen, seed = of_schedules;
  library.emplace(torch::Library::IMPL, "srpkd", c10::DispatchKey::CPU, __FILE__, __LINE__);
  library->impl("relation_loss_forward", relation_loss_forward);
  library->impl("relation_tiles", relation_tiles);
  library->impl("relation_loss_backward", relation_loss_backward);
}

void stop() { library.reset(); }

bool has_left_an_error() { return std::exchange(unhandled, false); }

// Returns the number of launches of the last call. Each bit says whether one started early, or was cooperative.
int launches(int* early, int* cooperative) {
  *early = *cooperative = 0;
  const int count = static_cast<int>(recorded::launches.size());
  for (int i = 0; i < count; ++i) {
    *early |= int{recorded::launches[i].early} << i;
    *cooperative |= int{recorded::launches[i].cooperative} << i;
  }
  return count;
}
}
#pragma GCC visibility pop
