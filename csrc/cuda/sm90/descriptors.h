// Layouts of matrices in shared memory, and their descriptors for wgmma. Compiles without nvcc.
//
// All matrices have 16-bit elements in lines of 128 bytes, which span all banks, with the 128-byte swizzle. TMA writes
// this layout, and stmatrix can. Buffers start at multiples of 1024 bytes.
#pragma once

#include <cstdint>

#include "../../common/index.h"

namespace srpkd::cuda::sm90 {

constexpr int LINE = 128;                  // bytes: 64 elements
constexpr int PANEL_LINES = 64;            // lines of a panel, which is what one TMA load of a full box writes
constexpr int PANEL = PANEL_LINES * LINE;  // bytes
constexpr int ALIGNMENT = 1024;            // bytes: the swizzle repeats after eight lines

// The dimension of an operand whose elements are adjacent in memory: k, over which the product sums, or the other.
enum class Major : int { k, mn };

// The offset of a byte in a buffer: the 16-byte chunks of a line are permuted by the number of the line.
SRPKD_HOST_DEVICE constexpr uint32_t swizzle(uint32_t offset) { return offset ^ (offset >> 7 & 7) << 4; }

// The descriptor of an operand. All arguments are bytes below 2^18 and multiples of 16.
//   Major::k   An eight-line group (8 rows, or columns for b) is `stride` bytes behind the one before. `leading` is not
//              used with this swizzle.
//   Major::mn  Lines are values of k: an eight-line group (8 values of k) is `stride` bytes behind the one before.
//              After 64 rows (or columns) the next ones are `leading` bytes further.
SRPKD_HOST_DEVICE constexpr uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  constexpr uint64_t SWIZZLE_128 = uint64_t{1} << 62;
  return SWIZZLE_128 | uint64_t{stride >> 4} << 32 | uint64_t{leading >> 4} << 16 | (address & 0x3ffff) >> 4;
}

// The descriptor of an operand that starts `bytes` further. Only its lower half changes, by a constant that the
// compiler knows: a product needs one addition for each operand.
SRPKD_HOST_DEVICE constexpr uint64_t advanced(uint64_t descriptor, uint32_t bytes) {
  return (descriptor & 0xffffffff00000000) | (static_cast<uint32_t>(descriptor) + (bytes >> 4));
}

// The descriptor of elements [16 k, 16 k + 16) of the 64 in each line: MAJOR k. The eight-line groups are adjacent. The
// next 64 elements of k are a panel further.
SRPKD_HOST_DEVICE constexpr uint64_t k_major(uint32_t address, int k) {
  return advanced(descriptor(address, 16, 8 * LINE), k / 4 * PANEL + 32 * (k % 4));
}

// The descriptor of lines [16 k, 16 k + 16): MAJOR mn. The operand's elements [64 n, 64 n + 64) are in the buffer that
// starts at address + n * leading.
SRPKD_HOST_DEVICE constexpr uint64_t mn_major(uint32_t address, int k, uint32_t leading = PANEL) {
  return advanced(descriptor(address, leading, 8 * LINE), 16 * LINE * k);
}

}  // namespace srpkd::cuda::sm90
