// The choice of the elementwise kernels for this processor.
#pragma once

#include <ATen/Version.h>

#include <string>

#include "epilogue.h"

namespace srpkd::cpu {

template <typename T>
const Kernels<T>& select_kernels() {
#if defined(SRPKD_HAS_AVX2)
  static const bool has_avx2 = [] {
    const std::string capability = at::get_cpu_capability();  // respects ATEN_CPU_CAPABILITY
    return capability.rfind("AVX2", 0) == 0 || capability.rfind("AVX512", 0) == 0;
  }();
  if (has_avx2) return avx2::kernels<T>;
#endif
  return baseline::kernels<T>;
}

}  // namespace srpkd::cpu
