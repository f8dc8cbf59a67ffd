// csrc/cuda/sm90/primitives.cuh on the host: the same functions. Compile with -DSRPKD_EMULATION.
#pragma once

#include "asynchronous.h"
#include "emulation.h"
#include "tensor_cores.h"

#define SRPKD_DEVICE_SM90A 1

namespace srpkd::cuda::sm90 {

using emulation::machine;

// --- barriers in shared memory ---------------------------------------------------------------------------------------

inline void initialize_barrier(Address barrier, uint32_t arrivals) {
  emulation::initialize_barrier(*machine, barrier, arrivals);
}
inline void fence_barrier_initialization() {
  for (emulation::Barrier& barrier : machine->block().barriers)
    barrier.visible_to_tma |= barrier.initializer == machine->thread();
}
inline void arrive(Address barrier) { emulation::arrive(*machine, barrier, 0); }
inline void arrive_expecting(Address barrier, uint32_t bytes) { emulation::arrive(*machine, barrier, bytes); }
inline void wait(Address barrier, uint32_t parity) { emulation::wait(*machine, barrier, parity); }

template <int THREADS>
void sync_threads(int barrier) {
  machine->sync_named(barrier, THREADS);
}

// --- the asynchronous proxy ------------------------------------------------------------------------------------------

inline void fence_async_proxy() {
  machine->publish();
  machine->clock().fence();
}
inline void fence_async_proxy_global() { machine->current().acquired = false; }
inline void prefetch(const TensorMap* map) {
  if (const char* reason = unsupported_reason(*map)) machine->fail(std::string("TMA: ") + reason);
}
inline void load_box(Address to, const TensorMap* map, int x, int y, int z, Address barrier) {
  emulation::load_box(*machine, to, *map, x, y, z, barrier);
}
inline void load_bulk(Address to, const void* from, uint32_t bytes, Address barrier) {
  emulation::load_bulk(*machine, to, from, bytes, barrier);
}
inline void add_bulk(float* to, Address from, uint32_t bytes) {
  emulation::start_bulk(*machine, to, from, bytes, true);
}
inline void store_bulk(void* to, Address from, uint32_t bytes) {
  emulation::start_bulk(*machine, to, from, bytes, false);
}
inline void commit_bulk() { emulation::commit_bulk(*machine); }
template <int LEFT>
void wait_for_bulk_reads() {
  emulation::wait_for_bulk(*machine, LEFT, false);
}
template <int LEFT>
void wait_for_bulk() {
  emulation::wait_for_bulk(*machine, LEFT, true);
}

// --- global memory that several blocks update ------------------------------------------------------------------------
// Additions happen in the order in which the threads execute them.

inline void add_global(int64_t* to, int64_t a) {
  machine->access_global(Kind::addition, to, 8, 8, "add_global");
  *to = static_cast<int64_t>(static_cast<uint64_t>(*to) + static_cast<uint64_t>(a));
  machine->yield();
}
inline void add_release(uint32_t* counter, uint32_t a) {
  machine->access_global(Kind::addition, counter, 4, 4, "add_release");
  machine->release(counter);
  *counter += a;
  machine->yield();
}
inline uint32_t load_acquire(const uint32_t* counter) {
  machine->access_global(Kind::addition, counter, 4, 4, "load_acquire");
  machine->pause();
  machine->acquire(counter);
  machine->current().acquired = true;
  return *counter;
}
inline void wait_until_at_least(const uint32_t* counter, uint32_t value) {
  machine->access_global(Kind::addition, counter, 4, 4, "wait_until_at_least");
  machine->wait([=] { return *counter >= value; },
                [=] {
                  return "a counter in global memory to reach " + std::to_string(value) + ", which is " +
                         std::to_string(*counter);
                });
  machine->acquire(counter);
  machine->current().acquired = true;
}
inline void fence_gpu() {}

// --- threads and registers -------------------------------------------------------------------------------------------

namespace emulated {

inline void nothing(void**) {}

template <bool INCREASE>
void set_registers(int registers) {
  emulation::Block& block = machine->block();
  int& own = block.registers[machine->warp()];
  if (registers % 8 || registers < 24 || registers > 256) machine->fail("setmaxnreg of " + std::to_string(registers));
  if (machine->thread() % emulation::WARP == 0) {
    if (INCREASE ? registers < own : registers > own)
      machine->fail("registers set from " + std::to_string(own) + " to " + std::to_string(registers));
    const int more = (registers - own) * emulation::WARP;
    machine->wait([=, &block] { return block.free_registers >= more; },
                  [=, &block] {
                    return std::to_string(more) + " registers, of which " + std::to_string(block.free_registers) +
                           " are free";
                  });
    block.free_registers -= more, own = registers;
  }
  machine->collective(&nothing, nullptr);
}

inline void sync_warp(void**) {
  emulation::Block& block = machine->block();
  const int first = machine->warp() * emulation::WARP;
  emulation::Clock& clock = block.threads[first].clock;
  for (int i = first + 1; i < first + emulation::WARP; ++i) clock.join(block.threads[i].clock);
  for (int i = first + 1; i < first + emulation::WARP; ++i) block.threads[i].clock = clock;
}

inline void elect_one(void**) {}  // of all threads of a warp

template <typename T>
void uniform(void** operands) {
  for (int lane = 1; lane < emulation::WARP; ++lane) *static_cast<T*>(operands[lane]) = *static_cast<T*>(operands[0]);
}

struct Matrices {
  const uint32_t* r;
  Address row;
};
template <bool TRANSPOSED>
void store_matrices(void** operands) {
  uint16_t matrix[4][8][8];
  for (int lane = 0; lane < emulation::WARP; ++lane)
    for (int m = 0; m < 4; ++m)
      for (int e = 0; e < 2; ++e) {
        const int g = lane / 4, t = lane % 4 * 2 + e;
        const auto value = static_cast<uint16_t>(static_cast<Matrices*>(operands[lane])->r[m] >> 16 * e);
        (TRANSPOSED ? matrix[m][t][g] : matrix[m][g][t]) = value;
      }
  const int first = machine->warp() * emulation::WARP;
  for (int lane = 0; lane < emulation::WARP; ++lane)
    machine->write(static_cast<Matrices*>(operands[lane])->row, matrix[lane / 8][lane % 8], 16, first + lane);
}

}  // namespace emulated

template <int COUNT>
void decrease_registers() {
  emulated::set_registers<false>(COUNT);
}
template <int COUNT>
void increase_registers() {
  emulated::set_registers<true>(COUNT);
}
inline void sync_warp() {
  machine->publish();
  machine->collective(&emulated::sync_warp, nullptr);
}
inline bool elect_one() {
  machine->collective(&emulated::elect_one, nullptr);
  return machine->thread() % emulation::WARP == 0;
}
template <typename T>
T uniform(T value) {
  machine->collective(&emulated::uniform<T>, &value);
  return value;
}
inline Address opaque(Address value) { return value; }

inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float saturate(float value) { return value > 0 ? (value < 1 ? value : 1.f) : 0.f; }
inline float clamp(float value, float limit) { return value < -limit ? -limit : value > limit ? limit : value; }
inline int64_t round_to_integer(float value) { return std::llrint(value); }

template <bool TRANSPOSED>
void store_matrices(Address row, const uint32_t (&r)[4]) {
  emulated::Matrices own{r, row};
  machine->collective(&emulated::store_matrices<TRANSPOSED>, &own);
}

// --- wgmma -----------------------------------------------------------------------------------------------------------

inline void fence_registers() { machine->warpgroup_collective(&emulation::fence_registers_of_warpgroup, nullptr); }
inline void commit_products() { machine->warpgroup_collective(&emulation::commit_products_of_warpgroup, nullptr); }
template <int LEFT>
void wait_for_products() {
  machine->warpgroup_collective(&emulation::wait_for_products_of_warpgroup<LEFT>, nullptr);
}
template <typename T, int COUNT>
void hold(T (&registers)[COUNT]) {
  if constexpr (std::is_same_v<T, float>) emulation::hold(*machine, registers);
}
template <typename T, int ROWS, int COUNT>
void hold(T (&registers)[ROWS][COUNT]) {
  for (auto& row : registers) hold(row);
}

template <typename T, Major A, Major B, int REGISTERS>
void multiply_add_async(float (&sum)[REGISTERS], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(REGISTERS == 32 || REGISTERS == 64, "n is 64 or 128");
  emulation::ProductArguments own{sum, REGISTERS, nullptr, a, b, accumulate, A, B, &emulation::element<T>};
  machine->warpgroup_collective(&emulation::start_product, &own);
}
template <typename T, Major B, int REGISTERS>
void multiply_add_async(float (&sum)[REGISTERS], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(REGISTERS == 32 || REGISTERS == 64, "n is 64 or 128");
  emulation::ProductArguments own{sum, REGISTERS, a, 0, b, accumulate, Major::k, B, &emulation::element<T>};
  machine->warpgroup_collective(&emulation::start_product, &own);
}

}  // namespace srpkd::cuda::sm90
