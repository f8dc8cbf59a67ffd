// Which kernel computes the relation tiles.
#pragma once

#include <c10/util/Exception.h>

#include <cstdlib>
#include <string_view>

#include "sm90_loss_plan.h"
#include "verified.h"

namespace srpkd::cuda {

enum class Kernel { sm80, sm90 };

// Returns why the wgmma kernel cannot compute a loss on this GPU, or null if it can.
inline const char* sm90_unavailable_reason(const LossArguments& arguments, const sm80::Device& device) {
  if (device.major != 9) return "a GPU without compute capability 9.0";
  if (std::string_view(SRPKD_CUDA_ARCHITECTURES).find("9.0a") == std::string_view::npos)
    return "an extension that is built without architecture 9.0a";
  return sm90::uncovered_reason(problem_of(arguments), {device.multiprocessors, device.shared_of_block});
}

// Returns whether the wgmma kernel passed on real hardware for such a loss.
inline bool sm90_verified(const LossArguments& a) {
  return sm90_verified(a.precision, a.element_bytes, a.relation.normalize, a.relation.distance, a.need_grad,
                       a.features[1].channels, a.features[0].channels);
}

// Returns the kernel that SRPKD_CUDA_KERNEL asks for, or by default the fastest that is verified on a GPU.
inline Kernel choose_kernel(const LossArguments& arguments, const sm80::Device& device) {
  const char* value = std::getenv("SRPKD_CUDA_KERNEL");
  const std::string_view setting = value ? value : "auto";
  TORCH_CHECK_VALUE(setting == "auto" || setting == "sm80" || setting == "sm90", "SRPKD_CUDA_KERNEL=\"", setting,
                    "\": expected sm80 (mma.sync, any GPU since compute capability 8.0), sm90 (wgmma, Hopper) or auto");
  if (setting == "sm80" || (setting == "auto" && !sm90_verified(arguments))) return Kernel::sm80;
  const char* reason = sm90_unavailable_reason(arguments, device);
  if (setting == "auto") return reason ? Kernel::sm80 : Kernel::sm90;
  TORCH_CHECK_NOT_IMPLEMENTED(!reason, "SRPKD_CUDA_KERNEL=\"sm90\" does not cover ", reason, ": use sm80 or auto");
  return Kernel::sm90;
}

}  // namespace srpkd::cuda
