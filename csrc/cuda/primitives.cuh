// The hardware instructions that the kernels use, sm_80 and newer, one function each.
// tests/csrc/cuda_emulation/ has the same functions for the host, which run the kernels without a GPU.
#pragma once

#include <cooperative_groups.h>

#include <cstring>
#include <type_traits>

#include "types.h"

#define SRPKD_DEVICE __device__ __forceinline__

namespace srpkd::cuda {

using Address = uint32_t;  // of a byte in shared memory

// Volatile, so that the compiler reads them again rather than keep them in a register.
SRPKD_DEVICE int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  __builtin_assume(index >= 0 && index < 1024);
  return index;
}
SRPKD_DEVICE int block_index(int axis) {
  int index;
  if (axis == 0)
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  else
    asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(index));
  __builtin_assume(index >= 0);
  return index;
}
SRPKD_DEVICE void sync_block() { __syncthreads(); }
// Waits for all threads of the grid, and sees what they have written. Needs a cooperative launch.
SRPKD_DEVICE void sync_grid() { cooperative_groups::this_grid().sync(); }

SRPKD_DEVICE Address shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return static_cast<Address>(__cvta_generic_to_shared(memory));
}

// T has 4, 8 or 16 bytes, and the address is aligned to its size.
template <typename T>
SRPKD_DEVICE T load_shared(Address from) {
  return *static_cast<const T*>(__cvta_shared_to_generic(from));
}
template <typename T>
SRPKD_DEVICE void store_shared(Address to, T value) {
  *static_cast<T*>(__cvta_shared_to_generic(to)) = value;
}

// By volatile instructions, like all loads from global memory here: where a load stands decides how many registers hold
// what has been loaded.
template <typename T>
SRPKD_DEVICE T load_global(const T* from) {
  return __ldca(from);
}
// The same from memory that no kernel of this call writes, see overlap.cuh: by ld.global.nc.
template <typename T>
SRPKD_DEVICE T load_input(const T* from) {
  return __ldg(from);
}
template <typename T>
SRPKD_DEVICE void store_global(T* to, T value) {
  *to = value;
}

// 1, 2 or 4 words, at an address that is a multiple of their size.
template <int WORDS>
using WordsOf = std::conditional_t<WORDS == 4, uint4, std::conditional_t<WORDS == 2, uint2, uint32_t>>;
template <int WORDS>
SRPKD_DEVICE void load_words(uint32_t (&to)[WORDS], const void* from) {
  static_assert(sizeof(WordsOf<WORDS>) == WORDS * 4);
  const auto words = load_global(static_cast<const WordsOf<WORDS>*>(from));
  std::memcpy(to, &words, sizeof to);
}
template <int WORDS>
SRPKD_DEVICE void load_input_words(uint32_t (&to)[WORDS], const void* from) {
  const auto words = load_input(static_cast<const WordsOf<WORDS>*>(from));
  std::memcpy(to, &words, sizeof to);
}
template <int WORDS>
SRPKD_DEVICE void store_words(void* to, const uint32_t (&from)[WORDS]) {
  static_assert(WORDS == 1 || WORDS == 2 || WORDS == 4);
  if constexpr (WORDS == 4)
    *static_cast<uint4*>(to) = make_uint4(from[0], from[1], from[2], from[3]);
  else if constexpr (WORDS == 2)
    *static_cast<uint2*>(to) = make_uint2(from[0], from[1]);
  else
    *static_cast<uint32_t*>(to) = from[0];
}
// Read global memory that other thread blocks of this launch have written, even without sync_grid() since then.
template <typename T>
SRPKD_DEVICE T load_global_coherent(const T* from) {
  return __ldcg(from);
}
// Volatile, so that the compiler does not move a load of a batch behind the use of another.
SRPKD_DEVICE void load_words_coherent(uint32_t (&to)[4], const void* from) {
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "l"(from));
}
// Adds 1 to a counter in global memory, and returns its value before that. Acquires and releases: what the thread block
// has done before its last barrier is visible to the thread block that reads the new value, after its next barrier. No
// other thread needs a fence: the causality order of PTX's memory model includes barriers.
SRPKD_DEVICE int increment(int* counter) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

// Programmatic dependent launches, see overlap.cuh. No operations for GPUs before Hopper.
SRPKD_DEVICE void wait_for_earlier_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
SRPKD_DEVICE void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Starts to copy BYTES bytes from global memory, of which the first `valid` are read and the others become zeros.
template <int BYTES>
SRPKD_DEVICE void copy_async(Address to, const void* from, int valid) {
  if constexpr (BYTES == 16)  // .cg bypasses L1, because each thread block reads a panel once
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(BYTES), "r"(valid)
                 : "memory");
}
// Makes a group of the copies that this thread has started since the last group.
SRPKD_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most LEFT of this thread's groups are in flight. Other threads see the copies after sync_block().
template <int LEFT>
SRPKD_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// Loads four matrices of 8 rows of 16 bytes. Lane l gives the address of row l % 8 of matrix l / 8. Register m receives
// four bytes of matrix m: of row lane / 4, from byte 4 * (lane % 4). TRANSPOSED (16-bit elements): of column lane / 4,
// from row 2 * (lane % 4).
template <bool TRANSPOSED>
SRPKD_DEVICE void load_matrices(uint32_t (&r)[4], Address row) {
  if constexpr (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row));
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row));
}

// sum (16 x 8) += a (16 x k) b (k x 8). The fragments of a lane, with g = lane / 4 and t = lane % 4:
//   sum     (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
//   16-bit  k = 16, two elements to a register: a (g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..);
//           b (2t.., g), (2t + 8.., g)
//   tf32    k = 8: a (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); b (t, g), (t + 4, g)
template <typename T>
SRPKD_DEVICE void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define SRPKD_MMA(SHAPE)                                                                           \
  asm("mma.sync.aligned." SHAPE " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                     \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (sizeof(T) == 4)
    SRPKD_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
  else if constexpr (std::is_same_v<T, Half>)
    SRPKD_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  else
    SRPKD_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
#undef SRPKD_MMA
}

template <typename T>
SRPKD_DEVICE T shuffle_xor(T value, int lanes) {
  return __shfl_xor_sync(0xffffffffu, value, lanes);
}

SRPKD_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
SRPKD_DEVICE uint32_t as_bits(float value) { return __float_as_uint(value); }

// Returns the lower (UPPER = false) or upper of the two elements in a register as a float, which is also an exact tf32.
template <typename T, bool UPPER>
SRPKD_DEVICE uint32_t widen(uint32_t pair) {
  if constexpr (std::is_same_v<T, Half>) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(UPPER ? pair >> 16 : pair)));
    return as_bits(value);
  } else {
    return UPPER ? pair & 0xffff0000u : pair << 16;
  }
}

// Returns two floats rounded to the nearest T, BFloat16 or Half, `lower` in the lower 16 bits. NaN stays NaN.
template <typename T>
SRPKD_DEVICE uint32_t pack(float lower, float upper) {
  uint32_t pair;
  if constexpr (std::is_same_v<T, Half>)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(upper), "f"(lower));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(upper), "f"(lower));
  return pair;
}

// A product that is rounded, not contracted into a fused multiply-add: x a - y b is exactly 0 if both are equal.
SRPKD_DEVICE float product(float a, float b) { return __fmul_rn(a, b); }

}  // namespace srpkd::cuda
