// The kernel of backward, of csrc/cuda/algebra, on the host. tests/csrc/test_cuda_backward.py calls it through ctypes.
#include <string>

#include "emulation.h"
// after the primitives
#include "../../../csrc/cuda/algebra/backward.cuh"

namespace {

using namespace srpkd::cuda;
using namespace srpkd::cuda::algebra;
using emulation::Machine;
using emulation::machine;

std::string message;

struct Launch {
  Machine& machine_of_test;

  template <class Kernel>
  void operator()(KernelType<Kernel>, const typename Kernel::Arguments& arguments, int x, int y, int bytes) {
    machine = &machine_of_test;
    machine_of_test.run(x, y, Kernel::THREADS, bytes, {0, 1, true}, [&] { run_in_order<Kernel>(arguments); });
    machine = nullptr;
  }
};

}  // namespace

extern "C" {

// Writes the product of `count` elements and returns an error message, or "" on success. result_element: 0 bfloat16,
// 1 float16, 2 float32.
const char* backward(const void* gradient, bool narrow, int result_element, void* result, const float* grad_loss,
                     int64_t count, int64_t image_elements, int64_t grad_loss_stride) {
  Machine local;
  local.allow(gradient, count * (narrow ? 2 : 4), true);
  local.allow(result, count * (result_element == 2 ? 4 : 2));
  local.allow(grad_loss, (count / image_elements - 1) * grad_loss_stride * 4 + 4, true);
  const BackwardArguments p{gradient, narrow, result, grad_loss, count, image_elements, grad_loss_stride};
  Launch launch{local};
  if (result_element == 0) launch_backward<BFloat16>(p, launch);
  if (result_element == 1) launch_backward<Half>(p, launch);
  if (result_element == 2) launch_backward<float>(p, launch);
  message = local.error;
  return message.c_str();
}
}
