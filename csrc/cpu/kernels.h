// The choice of the elementwise kernels for this processor.
#pragma once

#include <ATen/Version.h>

#include <string>

#include "epilogue.h"

namespace srpkd::cpu {

template <typename T>
const Kernels<T>& select_kernels() {
#if defined(SRPKD_HAS_AVX512)
  static const std::string capability = at::get_cpu_capability();  // respects ATEN_CPU_CAPABILITY
  if (capability.starts_with("AVX512")) return avx512::kernels<T>;
  if (capability.starts_with("AVX2")) return avx2::kernels<T>;
#endif
  return baseline::kernels<T>;
}

}  // namespace srpkd::cpu
