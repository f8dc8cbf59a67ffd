// The current GPU is that of the emulation: the tensors are on the CPU.
#pragma once

#include <c10/core/Device.h>
#include <cuda_runtime.h>

namespace c10::cuda {

struct CUDAGuard {
  explicit CUDAGuard(Device) {}
  Device current_device() const { return {DeviceType::CUDA, static_cast<DeviceIndex>(recorded::device)}; }
};

}  // namespace c10::cuda
