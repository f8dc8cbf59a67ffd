// The choice of the elementwise kernels for this processor.
#pragma once

#include "epilogue.h"
#include "instructions.h"

namespace srpkd::cpu {

template <typename T>
const Kernels<T>& select_kernels() {
#if defined(__x86_64__)
  static const bool has_avx512 = has_instructions("AVX512"), has_avx2 = has_instructions("AVX2");
  if (has_avx512) return avx512::kernels<T>;
  if (has_avx2) return avx2::kernels<T>;
#endif
  return baseline::kernels<T>;
}

}  // namespace srpkd::cpu
