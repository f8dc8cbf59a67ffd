// The vector instructions of this processor, as torch detects them.
#pragma once

#include <ATen/Version.h>

#include <string>
#include <string_view>

namespace srpkd::cpu {

// `set`: "AVX2" or "AVX512". ATEN_CPU_CAPABILITY can exclude them.
inline bool has_instructions(std::string_view set) { return at::get_cpu_capability().compare(0, set.size(), set) == 0; }

}  // namespace srpkd::cpu
