// Which kernel computes the relation tiles fastest. Free of torch, nvcc and the headers of CUDA: the build without CUDA
// answers too, for tests.
#pragma once

#include <string_view>

#include "sm90/coverage.h"
#include "verified.h"

namespace srpkd::cuda {

enum class Kernel { sm80, sm90 };

// Returns why the wgmma kernel cannot compute a loss on a GPU with an extension that is built for `architectures`, or
// null if it can.
inline const char* sm90_unavailable_reason(const sm90::Problem& problem, const Device& device,
                                           std::string_view architectures) {
  if (device.major != 9) return "a GPU without compute capability 9.0";
  if (architectures.find("9.0a") == std::string_view::npos)
    return "an extension that is built without architecture 9.0a";
  return sm90::uncovered_reason(problem, device);
}

// Returns the fastest kernel that can compute a loss and is verified on real hardware: what SRPKD_CUDA_KERNEL=auto
// selects. kernels/native.py calls it to compare `native` with other backends.
inline Kernel fastest_kernel(const sm90::Problem& problem, int element_bytes, const Device& device,
                             std::string_view architectures) {
  const bool verified = sm90_verified(problem.precision, element_bytes, problem.normalize, problem.distance,
                                      problem.grad, problem.student_channels, problem.teacher_channels);
  return verified && !sm90_unavailable_reason(problem, device, architectures) ? Kernel::sm90 : Kernel::sm80;
}

}  // namespace srpkd::cuda
