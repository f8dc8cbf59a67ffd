// csrc/cuda/primitives.cuh on the host: the same functions, for the machine in machine.h.
//
// Tensor cores multiply exactly, ignore the last 13 bits of a tf32, and round sums towards zero.
#pragma once

#include <cmath>
#include <type_traits>

#include "../../../csrc/cuda/types.h"
#include "machine.h"

#define SRPKD_DEVICE inline

namespace srpkd::cuda {

using Address = emulation::Address;

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float product(float a, float b) { return a * b; }  // compiled with -ffp-contract=off

namespace emulation {

inline float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float finite = as_float(static_cast<uint32_t>(bits & 0x7fff) << 13) * 0x1p112f;  // another exponent bias
  const float magnitude = exponent < 31 ? finite : mantissa ? NAN : INFINITY;
  return bits & 0x8000 ? -magnitude : magnitude;
}

template <typename T>
float element(uint16_t bits) {
  return std::is_same_v<T, Half> ? half_to_float(bits) : as_float(uint32_t{bits} << 16);
}

// NaN is that of the GPU, whose bits overflow if rounding adds to them.
inline float towards_zero(double value) {
  if (value != value) return as_float(0x7fffffff);
  const float nearest = static_cast<float>(value);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(value) ? as_float(as_bits(nearest) - 1) : nearest;
}

struct Product {
  float* sum;
  const uint32_t* a;
  uint32_t b[2];
};

// Executes one mma of a warp, with the fragment layouts documented in primitives.cuh.
template <typename T>
void multiply_add_warp(void** operands) {
  constexpr bool NARROW = !std::is_same_v<T, float>;
  constexpr int K = NARROW ? 16 : 8;
  double a[16][K], b[K][8], exact[16][8];
  for (int lane = 0; lane < WARP; ++lane) {
    const auto& own = *static_cast<Product*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = g + i % 2 * 8, half = i / 2;
      if constexpr (NARROW)
        for (int e = 0; e < 2; ++e) {
          a[row][half * 8 + 2 * t + e] = element<T>(static_cast<uint16_t>(own.a[i] >> 16 * e));
          if (i < 2) b[i * 8 + 2 * t + e][g] = element<T>(static_cast<uint16_t>(own.b[i] >> 16 * e));
        }
      else {
        a[row][half * 4 + t] = as_float(own.a[i] & ~0x1fffu);
        if (i < 2) b[i * 4 + t][g] = as_float(own.b[i] & ~0x1fffu);
      }
    }
  }
  const auto for_each_sum = [&](auto f) {
    for (int lane = 0; lane < WARP; ++lane)
      for (int i = 0; i < 4; ++i)
        f(static_cast<Product*>(operands[lane])->sum[i], exact[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
  };
  for_each_sum([](const float& sum, double& of_sum) { of_sum = sum; });
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < K; ++k)
      for (int column = 0; column < 8; ++column) exact[row][column] += a[row][k] * b[k][column];
  for_each_sum([](float& sum, double of_sum) { sum = towards_zero(of_sum); });
}

struct Matrices {
  uint32_t* r;
  Address row;
};

template <bool TRANSPOSED>
void load_matrices_warp(void** operands) {
  uint16_t matrix[4][8][8];
  const int first = machine->thread() / WARP * WARP;
  for (int lane = 0; lane < WARP; ++lane) {
    const Address row = static_cast<Matrices*>(operands[lane])->row;
    machine->read(row, matrix[lane / 8][lane % 8], 16, first + lane);
  }
  for (int lane = 0; lane < WARP; ++lane)
    for (int m = 0; m < 4; ++m) {
      const int g = lane / 4, t = lane % 4;
      const uint16_t lower = TRANSPOSED ? matrix[m][2 * t][g] : matrix[m][g][2 * t];
      const uint16_t upper = TRANSPOSED ? matrix[m][2 * t + 1][g] : matrix[m][g][2 * t + 1];
      static_cast<Matrices*>(operands[lane])->r[m] = lower | uint32_t{upper} << 16;
    }
}

template <typename T>
struct Shuffle {
  T value, result;
  int lanes;
};

template <typename T>
void shuffle_warp(void** operands) {
  for (int lane = 0; lane < WARP; ++lane) {
    auto& own = *static_cast<Shuffle<T>*>(operands[lane]);
    own.result = static_cast<Shuffle<T>*>(operands[lane ^ own.lanes])->value;
  }
}

}  // namespace emulation

using emulation::Kind;

inline int thread_index() { return emulation::machine->thread(); }
inline int block_index(int axis) { return emulation::machine->block(axis); }
inline void sync_block() { emulation::machine->barrier(); }
inline void sync_grid() { emulation::machine->grid_barrier(); }
inline Address shared_memory() { return 0; }

template <typename T>
T load_shared(Address from) {
  T value{};
  emulation::machine->read(from, &value, sizeof(T), thread_index());
  return value;
}
template <typename T>
void store_shared(Address to, T value) {
  emulation::machine->write(to, &value, sizeof(T), thread_index());
}
template <typename T>
T load_global(const T* from) {
  emulation::machine->access_global(Kind::read, from, sizeof(T), alignof(T), "read");
  return *from;
}
template <typename T>
T load_input(const T* from) {
  emulation::machine->access_global(Kind::read, from, sizeof(T), alignof(T), "read", true);
  return *from;
}
template <typename T>
T load_global_coherent(const T* from) {
  return load_global(from);
}
template <typename T>
void store_global(T* to, T value) {
  emulation::machine->access_global(Kind::write, to, sizeof(T), alignof(T), "write");
  *to = value;
}

template <int WORDS>
void load_words(uint32_t (&to)[WORDS], const void* from) {
  emulation::machine->access_global(Kind::read, from, sizeof to, sizeof to, "read");
  std::memcpy(to, from, sizeof to);
}
template <int WORDS>
void load_input_words(uint32_t (&to)[WORDS], const void* from) {
  emulation::machine->access_global(Kind::read, from, sizeof to, sizeof to, "read", true);
  std::memcpy(to, from, sizeof to);
}
template <int WORDS>
void store_words(void* to, const uint32_t (&from)[WORDS]) {
  emulation::machine->access_global(Kind::write, to, sizeof from, sizeof from, "write");
  std::memcpy(to, from, sizeof from);
}
inline void load_words_coherent(uint32_t (&to)[4], const void* from) { load_words(to, from); }
inline void wait_for_earlier_kernels() { emulation::machine->wait_for_earlier_kernels(); }
inline void let_next_kernel_start() { emulation::machine->let_next_kernel_start(); }
inline int increment(int* counter) {
  emulation::machine->access_global(Kind::addition, counter, sizeof(int), alignof(int), "atomic addition");
  emulation::machine->yield();
  emulation::machine->release(counter);
  emulation::machine->acquire(counter);
  return (*counter)++;
}

template <int BYTES>
void copy_async(Address to, const void* from, int valid) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  emulation::machine->copy({to, static_cast<const char*>(from), BYTES, valid});
}
inline void commit_copies() { emulation::machine->commit(); }
template <int LEFT>
void wait_for_copies() {
  emulation::machine->wait_for_copies(LEFT);
}

template <bool TRANSPOSED>
void load_matrices(uint32_t (&r)[4], Address row) {
  emulation::Matrices own{r, row};
  emulation::machine->collective(&emulation::load_matrices_warp<TRANSPOSED>, &own);
}
template <typename T>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::Product own{sum, a, {b0, b1}};
  emulation::machine->collective(&emulation::multiply_add_warp<T>, &own);
}
template <typename T>
T shuffle_xor(T value, int lanes) {
  emulation::Shuffle<T> own{value, T{}, lanes};
  emulation::machine->collective(&emulation::shuffle_warp<T>, &own);
  return own.result;
}

// Rounded to nearest, ties to even; overflow becomes infinity.
inline uint16_t round_to(float value, BFloat16) {
  const uint32_t bits = as_bits(value);
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t round_to(float value, Half) {
  const uint16_t sign = as_bits(value) >> 16 & 0x8000;
  const float size = std::fabs(value);
  if (value != value) return 0x7fff;
  if (size >= 65520.f) return sign | 0x7c00;
  if (size < 0x1p-14f) return sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(size, 24)));
  const uint32_t bits = as_bits(size) - (112u << 23);
  return sign | static_cast<uint16_t>((bits + 0xfff + (bits >> 13 & 1)) >> 13);
}
template <typename T>
uint32_t pack(float lower, float upper) {
  return round_to(lower, T{}) | uint32_t{round_to(upper, T{})} << 16;
}

template <typename T, bool UPPER>
uint32_t widen(uint32_t pair) {
  return as_bits(emulation::element<T>(static_cast<uint16_t>(UPPER ? pair >> 16 : pair)));
}

}  // namespace srpkd::cuda
