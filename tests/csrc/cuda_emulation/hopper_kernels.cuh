// Small kernels for sm_90a that use every instruction of csrc/cuda/sm90/primitives.cuh: on the host, with and without
// mistakes (hopper_library.cpp), and on a GPU (hopper_gpu.cu). tests/csrc/test_hopper_emulation.py calls both.
#pragma once

#if defined(__CUDACC__)
#include "../../../csrc/cuda/sm90/primitives.cuh"
#else
#include "sm90_primitives.h"
#endif

namespace srpkd::cuda::sm90::hopper_tests {

constexpr int CHUNK = 2 * PANEL;  // bytes: 64 lines for 128 elements, or 128 lines
constexpr int WARPGROUP = 128;

struct alignas(16) Piece {
  uint16_t elements[8];
};
struct alignas(16) Four {
  float value[4];
};

// --- one product
// -------------------------------------------------------------------------------------------------------

// How an operand is stored, and the fields of its descriptor.
struct Operand {
  int major;                       // of Major; -1: in registers
  uint32_t leading, stride, step;  // bytes; step: between 16 values of k, if the panel of 64 ends a step later
};

struct Product {
  const uint16_t* a;  // (64, k), or (k, 64) if its major is mn
  const uint16_t* b;  // (n, k), or (k, n), in row-major order
  float* sum;         // (64, n)
  Operand operands[2];
  int k, n;
  bool tma;           // the operands are loaded by TMA, or by ordinary stores
  TensorMap maps[2];  // of the operands

  SRPKD_HOST_DEVICE bool transposed(int i) const { return operands[i].major == static_cast<int>(Major::mn); }
  SRPKD_HOST_DEVICE int lines(int i) const { return transposed(i) ? k : i ? n : 64; }
  SRPKD_HOST_DEVICE int columns(int i) const { return transposed(i) ? i ? n : 64 : k; }
  TensorMapShape shape(int i) const {
    const int64_t width = columns(i), height = lines(i);
    return {i ? b : a, {width, height, 1}, {2 * width, 2 * width * height}, {64, lines(i), 1}};
  }
};
constexpr int PRODUCT_BYTES = 8 * PANEL + 8;

inline Product product_of(const uint16_t* a, const uint16_t* b, float* sum, const int* operands, int k, int n,
                          bool tma) {
  Product p{a, b, sum, {}, k, n, tma, {}};
  for (int i = 0; i < 2; ++i)
    p.operands[i] = {operands[4 * i], uint32_t(operands[4 * i + 1]), uint32_t(operands[4 * i + 2]),
                     uint32_t(operands[4 * i + 3])};
  return p;
}

// Writes a row-major matrix as panels of 64 columns, which follow each other after `lines` lines.
SRPKD_DEVICE void store_matrix(Address to, const uint16_t* from, int lines, int columns) {
  for (int i = thread_index(); i < lines * columns / 8; i += WARPGROUP) {
    const int line = i / (columns / 8), column = i % (columns / 8) * 8;
    Piece piece;
    for (int j = 0; j < 8; ++j) piece.elements[j] = load_global(from + line * columns + column + j);
    store_shared(swizzle(to + column / 64 * lines * LINE + line * LINE + column % 64 * 2), piece);
  }
}

// The descriptor of values [16 step, 16 step + 16) of k.
SRPKD_DEVICE uint64_t step_of(const Operand& operand, Address address, int step, int panel) {
  if (operand.major == static_cast<int>(Major::k))
    return descriptor(address + step / 4 * panel + step % 4 * operand.step, operand.leading, operand.stride);
  return descriptor(address + step * operand.step, operand.leading, operand.stride);
}

// A: of Major, or -1.
template <typename T, int A, Major B, int REGISTERS, int STEPS>
SRPKD_DEVICE void multiply(const Product& p, Address a, Address b) {
  const int thread = thread_index(), warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
  float sum[REGISTERS];
  uint32_t left[STEPS][4] = {};
  if constexpr (A < 0) {
#pragma unroll
    for (int i = 0; i < STEPS * 8; ++i) {
      const int row = warp * 16 + g + i / 2 % 2 * 8, k = i / 8 * 16 + i / 4 % 2 * 8 + 2 * t + i % 2;
      left[i / 8][i / 2 % 4] |= uint32_t{load_global(p.a + row * p.k + k)} << 16 * (i % 2);
    }
    hold(left);
  }
  fence_registers();
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    const uint64_t right = step_of(p.operands[1], b, step, p.n * LINE);
    if constexpr (A < 0)
      multiply_add_async<T, B>(sum, left[step], right, step > 0);
    else
      multiply_add_async<T, static_cast<Major>(A), B>(sum, step_of(p.operands[0], a, step, PANEL), right, step > 0);
  }
  commit_products();
  wait_for_products<0>();
  hold(sum);
#pragma unroll
  for (int i = 0; i < REGISTERS; ++i)
    store_global(p.sum + (warp * 16 + g + i % 4 / 2 * 8) * p.n + i / 4 * 8 + 2 * t + i % 2, sum[i]);
}

template <typename T, int A, Major B>
SRPKD_DEVICE void multiply(const Product& p, Address a, Address b) {
  if (p.n == 64)
    p.k == 64 ? multiply<T, A, B, 32, 4>(p, a, b) : multiply<T, A, B, 32, 8>(p, a, b);
  else
    p.k == 64 ? multiply<T, A, B, 64, 4>(p, a, b) : multiply<T, A, B, 64, 8>(p, a, b);
}

template <typename T>
SRPKD_DEVICE void multiply(const Product& p) {
  const Address a = shared_memory(), b = a + 4 * PANEL, barrier = b + 4 * PANEL;
  if (p.tma) {
    if (thread_index() == 0) {
      initialize_barrier(barrier, 1);
      fence_barrier_initialization();
      uint32_t bytes = 0;
      for (int i = 0; i < 2; ++i)
        if (p.operands[i].major >= 0) bytes += 2 * p.lines(i) * p.columns(i);
      arrive_expecting(barrier, bytes);
      for (int i = 0; i < 2; ++i)
        for (int panel = 0; p.operands[i].major >= 0 && panel < p.columns(i) / 64; ++panel)
          load_box((i ? b : a) + panel * p.lines(i) * LINE, &p.maps[i], panel * 64, 0, 0, barrier);
    }
    sync_block();
    wait(barrier, 0);
  } else {
    if (p.operands[0].major >= 0) store_matrix(a, p.a, p.lines(0), p.columns(0));
    store_matrix(b, p.b, p.lines(1), p.columns(1));
    fence_async_proxy();
    sync_block();
  }
  const bool transposed = p.transposed(1);
  if (p.operands[0].major < 0)
    transposed ? multiply<T, -1, Major::mn>(p, a, b) : multiply<T, -1, Major::k>(p, a, b);
  else if (p.transposed(0))
    transposed ? multiply<T, 1, Major::mn>(p, a, b) : multiply<T, 1, Major::k>(p, a, b);
  else
    transposed ? multiply<T, 0, Major::mn>(p, a, b) : multiply<T, 0, Major::k>(p, a, b);
}

// --- a pipeline
// --------------------------------------------------------------------------------------------------------

enum Fault : int {
  none,
  no_proxy_fence,         // between stmatrix and the products that read what it wrote
  no_full_wait,           // for TMA
  early_release,          // a slot is released before its products were waited for
  too_many_bytes,         // expected
  too_few_bytes,          // expected
  wrong_parity,           // of the wait for a slot to be full
  early_turn,             // given to the other warpgroup
  no_barrier_fence,       // after the initialisation of the barriers
  no_wait_for_products,   // before their sums are read
  no_hold,                // of their sums after the wait
  no_register_fence,      // before products
  operand_overwritten,    // registers of an operand of products in flight
  no_warp_sync,           // between the stores of a warp and the arrival of one of its threads
  no_wait_for_K,          // which the other products still read
  staging_overwritten,    // while a bulk addition reads it
  no_staging_barrier,     // between the stores and the bulk addition
  no_staging_fence,       // between the stores and the bulk addition
  early_order,            // the next block may add although the bulk additions have not happened
  no_order,               // the bulk additions of blocks happen in any order
  waits_for_later_block,  // which may not be resident
  no_acquire_fence,       // between the wait for the turn to add, and the bulk addition
  register_deadlock,      // more registers than there are
  missing_arrival,        // of one warp at a named barrier
};

struct PipelineArguments {
  TensorMap map;        // (64 channels, 128 * tiles pixels)
  float* rows;          // (tiles, 128, 64)
  float* columns;       // (tiles, 2, 8, 128, 4): halves, registers of four, threads
  uint32_t* additions;  // (tiles): the number of blocks that have added to columns
  float* trace;         // (tiles): the order in which two warpgroups took turns
  int tiles;
  Fault fault;  // not on a GPU
};

inline TensorMapShape shape_of_features(const uint16_t* features, int channels, int pixels) {
  return {features, {pixels, channels, 1}, {int64_t{2} * pixels, int64_t{2} * pixels * channels}, {64, 64, 1}};
}

// For blocks I of 128 pixels: K = q_I^T q_J in bfloat16, rows += K q_J^T in registers, columns[J] += q_I K in global
// memory, in the order of I. A producer, two warpgroups for K and one for the columns, as in a kernel for relations.
struct Pipeline {
  static constexpr int SLOTS = 2, THREADS = 4 * WARPGROUP;
  // offsets in shared memory
  static constexpr Address I = 0, RING = CHUNK, K = RING + SLOTS * CHUNK, STAGING = K + 2 * CHUNK,
                           TRACE = STAGING + CHUNK, LOADED = TRACE + 16, FULL = LOADED + 8, EMPTY = FULL + 8 * SLOTS,
                           TURN = EMPTY + 8 * SLOTS, K_FULL = TURN + 16, K_EMPTY = K_FULL + 8, BYTES = K_EMPTY + 8;

  const PipelineArguments& p;
  const Address shared = shared_memory();

  SRPKD_DEVICE explicit Pipeline(const PipelineArguments& arguments) : p(arguments) {}

#if defined(__CUDACC__)
  static SRPKD_DEVICE constexpr bool is(Fault) { return false; }
#else
  bool is(Fault fault) const { return p.fault == fault; }
#endif

  SRPKD_DEVICE void load(Address to, int tile, Address barrier) const {
    for (int half = 0; half < 2; ++half) load_box(to + half * PANEL, &p.map, tile * 128 + half * 64, 0, 0, barrier);
  }

  SRPKD_DEVICE void produce() const {
    decrease_registers<24>();
    if (thread_index()) return;
    prefetch(&p.map);
    arrive_expecting(shared + LOADED, CHUNK);
    load(shared + I, block_index(0), shared + LOADED);
    for (int j = 0; j < p.tiles; ++j) {
      const int slot = j % SLOTS;
      wait(shared + EMPTY + 8 * slot, j / SLOTS % 2 ^ 1);
      arrive_expecting(shared + FULL + 8 * slot, CHUNK + (is(too_many_bytes) ? 16 : is(too_few_bytes) ? -PANEL : 0));
      load(shared + RING + slot * CHUNK, j, shared + FULL + 8 * slot);
    }
  }

  SRPKD_DEVICE void multiply_rows(int group) const {
    increase_registers<208>();
    const int thread = thread_index() % WARPGROUP, warp = thread / 32, lane = thread % 32;
    float u[32] = {};
    wait(shared + LOADED, 0);
    for (int j = 0; j < p.tiles; ++j) {
      const int slot = j % SLOTS;
      const Address chunk = shared + RING + slot * CHUNK;
      if (!is(no_full_wait)) wait(shared + FULL + 8 * slot, is(wrong_parity) ? j / SLOTS % 2 ^ 1 : j / SLOTS % 2);
      wait(shared + TURN + 8 * group, group == 0 ? j % 2 ^ 1 : j % 2);
      if (is(early_turn) && lane == 0) arrive(shared + TURN + 8 * (group ^ 1));
      float g[64];
      if (!is(no_register_fence)) fence_registers();
#pragma unroll
      for (int k = 0; k < 4; ++k)
        multiply_add_async<BFloat16, Major::mn, Major::mn>(g, mn_major(shared + I + group * PANEL, k),
                                                           mn_major(chunk, k), k > 0);
      commit_products();
      if (thread == 0) store_shared(shared + TRACE, load_shared<float>(shared + TRACE) * 3 + group + 1);
      sync_warp();
      if (!is(early_turn) && lane == 0) arrive(shared + TURN + 8 * (group ^ 1));
      if (is(early_release) && lane == 0) arrive(shared + EMPTY + 8 * slot);
      if (!is(no_wait_for_products)) wait_for_products<0>();
      if (!is(no_hold)) hold(g);
      uint32_t k[8][4];
#pragma unroll
      for (int i = 0; i < 32; ++i) k[i / 4][i % 4] = pack<BFloat16>(g[2 * i], g[2 * i + 1]);

      if (!is(no_wait_for_K)) wait(shared + K_EMPTY, j % 2 ^ 1);
#pragma unroll
      for (int i = 0; i < 8; ++i)  // 16 columns at a time
        store_matrices<false>(swizzle(shared + K + i / 4 * CHUNK + (group * 64 + warp * 16 + lane % 16) * LINE +
                                      i % 4 * 32 + lane / 16 * 16),
                              k[i]);
      if (!is(no_proxy_fence)) fence_async_proxy();
      if (!is(no_warp_sync)) sync_warp();
      if (lane == 0) arrive(shared + K_FULL);

      hold(k), hold(u);
      fence_registers();
#pragma unroll
      for (int i = 0; i < 8; ++i)
        multiply_add_async<BFloat16, Major::k>(u, k[i], k_major(chunk + i / 4 * PANEL, i % 4), true);
      commit_products();
      if (is(operand_overwritten)) k[3][2] ^= 1;
      wait_for_products<0>();
      hold(u);
      if (!is(early_release) && lane == 0) arrive(shared + EMPTY + 8 * slot);
    }
#pragma unroll
    for (int i = 0; i < 32; ++i)
      store_global(p.rows + (block_index(0) * 128 + group * 64 + warp * 16 + lane / 4 + i % 4 / 2 * 8) * 64 +
                       i / 4 * 8 + lane % 4 * 2 + i % 2,
                   u[i]);
  }

  SRPKD_DEVICE void add_columns() const {
    decrease_registers<72>();
    const int thread = thread_index() % WARPGROUP, lane = thread % 32;
    wait(shared + LOADED, 0);
    for (int j = 0; j < p.tiles; ++j) {
      wait(shared + K_FULL, j % 2);
      for (int half = 0; half < 2; ++half) {
        float u[32];
        fence_registers();
#pragma unroll
        for (int k = 0; k < 8; ++k)
          multiply_add_async<BFloat16, Major::k, Major::mn>(u, k_major(shared + I + k / 4 * PANEL, k % 4),
                                                            mn_major(shared + K + half * CHUNK, k, CHUNK), k > 0);
        commit_products();
        wait_for_products<0>();
        hold(u);
        if (half == 1 && lane == 0) arrive(shared + K_EMPTY);
        if (thread == 0 && !is(staging_overwritten)) wait_for_bulk_reads<0>();
        sync_threads<WARPGROUP>(1);
#pragma unroll
        for (int i = 0; i < 8; ++i)
          store_shared(shared + STAGING + i * 2048 + thread * 16,
                       Four{{u[4 * i], u[4 * i + 1], u[4 * i + 2], u[4 * i + 3]}});
        if (!is(no_staging_fence)) fence_async_proxy();
        if (!is(no_staging_barrier) && !(is(missing_arrival) && thread >= 96)) sync_threads<WARPGROUP>(1);
        if (thread == 0) add(j, half);
        sync_warp();
      }
    }
    if (thread == 0) wait_for_bulk<0>();
  }

  SRPKD_DEVICE void add(int j, int half) const {
    const uint32_t before = is(waits_for_later_block) ? p.tiles - 1 - block_index(0) : block_index(0);
    if (half == 0 && !is(no_order)) {
      wait_until_at_least(p.additions + j, before);
      if (!is(no_acquire_fence)) fence_async_proxy_global();
    }
    add_bulk(p.columns + j * 8192 + half * 4096, shared + STAGING, CHUNK);
    commit_bulk();
    if (half == 1) {
      if (!is(early_order)) wait_for_bulk<0>();
      fence_async_proxy_global();
      fence_gpu();
      add_release(p.additions + j, 1);
    }
  }

  SRPKD_DEVICE void run() const {
    const int group = uniform(thread_index() / WARPGROUP);
    if (thread_index() == 0) {
      initialize_barrier(shared + LOADED, 1);
#pragma unroll
      for (int i = 0; i < SLOTS; ++i)
        initialize_barrier(shared + FULL + 8 * i, 1), initialize_barrier(shared + EMPTY + 8 * i, 8);
#pragma unroll
      for (int i = 0; i < 2; ++i) initialize_barrier(shared + TURN + 8 * i, 4);
      initialize_barrier(shared + K_FULL, 8), initialize_barrier(shared + K_EMPTY, 4);
      if (!is(no_barrier_fence)) fence_barrier_initialization();
      store_shared(shared + TRACE, 0.f);
    }
    sync_block();
    if (group == 0)
      produce();
    else if (group == 3)
      add_columns();
    else
      multiply_rows(group - 1);
    if (is(register_deadlock) && group == 3) increase_registers<256>();
    if (group == 2 && thread_index() % WARPGROUP == 0)
      store_global(p.trace + block_index(0), load_shared<float>(shared + TRACE));
  }
};

}  // namespace srpkd::cuda::sm90::hopper_tests
