// Which kernel computes the relation tiles, with SRPKD_CUDA_KERNEL.
#pragma once

#include <c10/util/Exception.h>

#include <cstdlib>
#include <string_view>

#include "fastest_kernel.h"
#include "sm90_loss_plan.h"

namespace srpkd::cuda {

// Returns the kernel that SRPKD_CUDA_KERNEL asks for, or by default the fastest that is verified on a GPU.
inline Kernel choose_kernel(const LossArguments& arguments, const Device& device) {
  const char* value = std::getenv("SRPKD_CUDA_KERNEL");
  const std::string_view setting = value ? value : "auto";
  TORCH_CHECK_VALUE(setting == "auto" || setting == "sm80" || setting == "sm90", "SRPKD_CUDA_KERNEL=\"", setting,
                    "\": expected sm80 (mma.sync, any GPU since compute capability 8.0), sm90 (wgmma, Hopper) or auto");
  if (setting == "sm80") return Kernel::sm80;
  const sm90::Problem problem = problem_of(arguments);
  if (setting == "auto") return fastest_kernel(problem, arguments.element_bytes, device, SRPKD_CUDA_ARCHITECTURES);
  const char* reason = sm90_unavailable_reason(problem, device, SRPKD_CUDA_ARCHITECTURES);
  TORCH_CHECK_NOT_IMPLEMENTED(!reason, "SRPKD_CUDA_KERNEL=\"sm90\" does not cover ", reason, ": use sm80 or auto");
  return Kernel::sm90;
}

}  // namespace srpkd::cuda
