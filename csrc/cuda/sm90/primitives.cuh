// The instructions of sm_90a that the kernels use besides those in ../primitives.cuh, one function each.
// tests/csrc/cuda_emulation/sm90_primitives.h has the same functions for the host, which run the kernels without a GPU.
//
// A kernel that calls them must be empty for other architectures: test SRPKD_DEVICE_SM90A.
#pragma once

#include "../primitives.cuh"
#include "descriptors.h"
#include "tensor_map.h"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SRPKD_DEVICE_SM90A 1
#else
#define SRPKD_DEVICE_SM90A 0
#endif

namespace srpkd::cuda::sm90 {

// --- barriers in shared memory (mbarrier) ----------------------------------------------------------------------------
// A phase ends when `arrivals` threads have arrived and all expected bytes have been written. Threads tell phases apart
// by their parity only, so none may be more than one phase late.

SRPKD_DEVICE void initialize_barrier(Address barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After the initialisation, by the same thread, before the others may use the barriers: visible to TMA.
SRPKD_DEVICE void fence_barrier_initialization() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
SRPKD_DEVICE void arrive(Address barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and adds to the bytes that TMA has to write in this phase.
SRPKD_DEVICE void arrive_expecting(Address barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits for the end of a phase of this parity: 0 for the first. A wait for parity 1 returns at once in the first phase.
// It contains no trap: with one, ptxas limits the registers of the kernel and serialises its wgmmas.
SRPKD_DEVICE void wait(Address barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  } while (!done);
}

// Barrier 1 to 15 of a block: waits until THREADS threads (a multiple of 32) have arrived or wait.
template <int THREADS>
SRPKD_DEVICE void sync_threads(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(THREADS) : "memory");
}

// --- the asynchronous proxy: TMA, bulk copies and the operands of wgmma ----------------------------------------------

// Orders the calling thread's accesses to shared memory before asynchronous ones that follow. Then a barrier must tell
// the thread that starts those.
SRPKD_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// The same for global memory.
SRPKD_DEVICE void fence_async_proxy_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

SRPKD_DEVICE void prefetch(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// Starts to load the box whose first element is (x, y, z), and reports its bytes to a barrier, zeros outside the tensor
// included. `to` is a multiple of 1024.
SRPKD_DEVICE void load_box(Address to, const TensorMap* map, int x, int y, int z, Address barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}
// Starts to copy adjacent bytes, and reports them to a barrier. Addresses and size are multiples of 16.
SRPKD_DEVICE void load_bulk(Address to, const void* from, uint32_t bytes, Address barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

// Starts to add adjacent floats of shared memory to global memory. Addresses and size are multiples of 16.
SRPKD_DEVICE void add_bulk(float* to, Address from, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from),
               "r"(bytes)
               : "memory");
}
// Starts to copy adjacent bytes of shared memory to global memory.
SRPKD_DEVICE void store_bulk(void* to, Address from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
               : "memory");
}
// Makes a group of the bulk additions and stores that this thread has started since the last group.
SRPKD_DEVICE void commit_bulk() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until all but LEFT of this thread's groups have read shared memory, which may then be overwritten.
template <int LEFT>
SRPKD_DEVICE void wait_for_bulk_reads() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(LEFT) : "memory");
}
// Waits until all but LEFT of this thread's groups have written global memory.
template <int LEFT>
SRPKD_DEVICE void wait_for_bulk() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(LEFT) : "memory");
}

// --- global memory that several blocks update ------------------------------------------------------------------------

SRPKD_DEVICE void add_global(int64_t* to, int64_t a) {
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(to), "l"(a) : "memory");
}
// Adds to a counter; whoever waits for it sees what this thread has done and seen before.
SRPKD_DEVICE void add_release(uint32_t* counter, uint32_t a) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(a) : "memory");
}
SRPKD_DEVICE uint32_t load_acquire(const uint32_t* counter) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}
SRPKD_DEVICE void wait_until_at_least(const uint32_t* counter, uint32_t value) {
  while (load_acquire(counter) < value) {
  }
}
SRPKD_DEVICE void fence_gpu() { __threadfence(); }

// --- threads and registers -------------------------------------------------------------------------------------------

// The registers of each thread of a warpgroup from now on: a multiple of 8. All its warps call it.
template <int REGISTERS>
SRPKD_DEVICE void decrease_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
SRPKD_DEVICE void increase_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

SRPKD_DEVICE void sync_warp() { __syncwarp(); }
// True in one thread of the warp.
SRPKD_DEVICE bool elect_one() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}\n" : "=r"(elected));
  return elected;
}
// The value of lane 0, which tells the compiler that the result is the same in the whole warp.
template <typename T>
SRPKD_DEVICE T uniform(T value) {
  return __shfl_sync(0xffffffffu, value, 0);
}
// The same value, of which the compiler knows nothing: it computes what depends on it again in every iteration, rather
// than keep it in registers.
SRPKD_DEVICE Address opaque(Address value) {
  asm volatile("" : "+r"(value));
  return value;
}

SRPKD_DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
SRPKD_DEVICE float saturate(float value) { return __saturatef(value); }  // to [0, 1]; NaN becomes 0
// To [-limit, limit]; NaN stays.
SRPKD_DEVICE float clamp(float value, float limit) {
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(value) : "f"(-limit));
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(value) : "f"(limit));
  return value;
}
SRPKD_DEVICE int64_t round_to_integer(float value) { return __float2ll_rn(value); }

// Stores four matrices of 8 rows of 16 bytes: the inverse of load_matrices.
template <bool TRANSPOSED>
SRPKD_DEVICE void store_matrices(Address row, const uint32_t (&r)[4]) {
  if constexpr (TRANSPOSED)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
  else
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3])
                 : "memory");
}

// --- wgmma -----------------------------------------------------------------------------------------------------------
// A warpgroup multiplies asynchronously. Until wait_for_products it may neither read nor write the registers of sums
// and of a, and shared memory with operands must not change.

// Before the first product of a group: orders accesses to its registers before it.
SRPKD_DEVICE void fence_registers() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
SRPKD_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most LEFT of this warpgroup's groups are in flight. Then hold() their registers.
template <int LEFT>
SRPKD_DEVICE void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
// Keeps the compiler from moving accesses to these registers across this point: before fence_registers, after
// wait_for_products.
template <typename T, int COUNT>
SRPKD_DEVICE void hold(T (&registers)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i)
    if constexpr (std::is_same_v<T, float>)
      asm volatile("" : "+f"(registers[i])::"memory");
    else
      asm volatile("" : "+r"(registers[i])::"memory");
}
template <typename T, int ROWS, int COUNT>
SRPKD_DEVICE void hold(T (&registers)[ROWS][COUNT]) {
#pragma unroll
  for (int i = 0; i < ROWS; ++i) hold(registers[i]);
}

// The registers of a sum, as operands in the text of an instruction and as its arguments.
#define SRPKD_OPERANDS_32                                                  \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SRPKD_OPERANDS_64                                                              \
  SRPKD_OPERANDS_32                                                                    \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SRPKD_SUMS_8(i)                                                                                   \
  "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3]), "+f"(sum[i + 4]), "+f"(sum[i + 5]), \
      "+f"(sum[i + 6]), "+f"(sum[i + 7])
#define SRPKD_SUMS_32(i) SRPKD_SUMS_8(i), SRPKD_SUMS_8(i + 8), SRPKD_SUMS_8(i + 16), SRPKD_SUMS_8(i + 24)
#define SRPKD_SUMS_64 SRPKD_SUMS_32(0), SRPKD_SUMS_32(32)
// OPERANDS: those of the sum, of a and of b; the last operand in the text decides whether the sum counts; then the
// majors of the operands in shared memory.
#define SRPKD_WGMMA(SHAPE_AND_TYPES, OPERANDS, ACCUMULATE, MAJORS)                                                  \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " ACCUMULATE ", 0;\nwgmma.mma_async.sync.aligned." SHAPE_AND_TYPES " " OPERANDS \
  ", p, 1, 1, " MAJORS ";\n}\n"

// sum (64 x n) = (accumulate ? sum : 0) + a (64 x 16) b (16 x n), n = 2 * REGISTERS. Warp w of the warpgroup has the
// rows [16 w, 16 w + 16) of sum; a lane has the elements of mma.sync, with g = lane / 4 and t = lane % 4:
//   sum[4 i ..]  (g, 8 i + 2t), (g, 8 i + 2t + 1), (g + 8, 8 i + 2t), (g + 8, 8 i + 2t + 1)
// Both operands in shared memory, from their descriptors.
template <typename T, Major A, Major B, int REGISTERS>
SRPKD_DEVICE void multiply_add_async(float (&sum)[REGISTERS], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(REGISTERS == 32 || REGISTERS == 64, "n is 64 or 128");
#define SRPKD_WGMMA_64(TYPES)                                                                              \
  asm volatile(SRPKD_WGMMA("m64n64k16.f32." TYPES, "{" SRPKD_OPERANDS_32 "}, %32, %33", "%34", "%35, %36") \
               : SRPKD_SUMS_32(0)                                                                          \
               : "l"(a), "l"(b), "r"(int{accumulate}), "n"(static_cast<int>(A)), "n"(static_cast<int>(B)))
#define SRPKD_WGMMA_128(TYPES)                                                                              \
  asm volatile(SRPKD_WGMMA("m64n128k16.f32." TYPES, "{" SRPKD_OPERANDS_64 "}, %64, %65", "%66", "%67, %68") \
               : SRPKD_SUMS_64                                                                              \
               : "l"(a), "l"(b), "r"(int{accumulate}), "n"(static_cast<int>(A)), "n"(static_cast<int>(B)))
  if constexpr (REGISTERS == 32 && std::is_same_v<T, Half>)
    SRPKD_WGMMA_64("f16.f16");
  else if constexpr (REGISTERS == 32)
    SRPKD_WGMMA_64("bf16.bf16");
  else if constexpr (std::is_same_v<T, Half>)
    SRPKD_WGMMA_128("f16.f16");
  else
    SRPKD_WGMMA_128("bf16.bf16");
#undef SRPKD_WGMMA_64
#undef SRPKD_WGMMA_128
}

// The same with a in registers, two elements in each: (g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..). These
// are the elements of columns [16 i, 16 i + 16) of a sum in its registers [8 i, 8 i + 8), packed in their order.
template <typename T, Major B, int REGISTERS>
SRPKD_DEVICE void multiply_add_async(float (&sum)[REGISTERS], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(REGISTERS == 32 || REGISTERS == 64, "n is 64 or 128");
#define SRPKD_WGMMA_64(TYPES)                                                                                          \
  asm volatile(SRPKD_WGMMA("m64n64k16.f32." TYPES, "{" SRPKD_OPERANDS_32 "}, {%32, %33, %34, %35}, %36", "%37", "%38") \
               : SRPKD_SUMS_32(0)                                                                                      \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{accumulate}), "n"(static_cast<int>(B)))
#define SRPKD_WGMMA_128(TYPES)                                                                                 \
  asm volatile(                                                                                                \
      SRPKD_WGMMA("m64n128k16.f32." TYPES, "{" SRPKD_OPERANDS_64 "}, {%64, %65, %66, %67}, %68", "%69", "%70") \
      : SRPKD_SUMS_64                                                                                          \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{accumulate}), "n"(static_cast<int>(B)))
  if constexpr (REGISTERS == 32 && std::is_same_v<T, Half>)
    SRPKD_WGMMA_64("f16.f16");
  else if constexpr (REGISTERS == 32)
    SRPKD_WGMMA_64("bf16.bf16");
  else if constexpr (std::is_same_v<T, Half>)
    SRPKD_WGMMA_128("f16.f16");
  else
    SRPKD_WGMMA_128("bf16.bf16");
#undef SRPKD_WGMMA_64
#undef SRPKD_WGMMA_128
}

#undef SRPKD_WGMMA
#undef SRPKD_SUMS_64
#undef SRPKD_SUMS_32
#undef SRPKD_SUMS_8
#undef SRPKD_OPERANDS_64
#undef SRPKD_OPERANDS_32

}  // namespace srpkd::cuda::sm90
