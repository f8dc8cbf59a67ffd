// csrc/cuda/primitives.cuh on the host: the same functions, for a thread block whose threads are fibers.
//
// A fiber runs until a collective instruction: of its warp (mma, ldmatrix, shuffles) or of its block (barriers). The
// last thread to arrive executes it for all. Blocks run one after the other. The emulation reports errors that often
// remain unnoticed on a GPU:
//   - shared memory read before it was written, or read by another thread than the writer without a barrier between
//   - shared memory written by one thread, and read or written by another without a barrier between
//   - an asynchronous copy that is read or overwritten before its thread has waited for it; it completes only then
//   - misaligned addresses, and global memory outside the ranges registered for the kernel
//   - threads that arrive at different collective instructions, or at none
// Tensor cores multiply exactly, ignore the last 13 bits of a tf32, and round sums towards zero.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "../../../csrc/cuda/types.h"

#define SRPKD_DEVICE inline

namespace srpkd::cuda {

using Address = uint32_t;

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

constexpr int WARP = 32;
constexpr int STACK = 1 << 16;  // bytes
constexpr int NO_THREAD = -1, SEVERAL_THREADS = -2;

// The last accesses to a word of shared memory. An epoch is the interval between two barriers.
struct Shadow {
  int writer = NO_THREAD, write_epoch = -1, reader = NO_THREAD, read_epoch = -1;
  bool in_flight = false;
};

struct Copy {
  Address to;
  const char* from;
  int bytes, valid;
};

struct Thread {
  std::unique_ptr<char[]> stack{new char[STACK]};
  jmp_buf place;
  bool started = false, waiting = false, done = false;
  std::vector<Copy> copies;              // not yet committed
  std::deque<std::vector<Copy>> groups;  // committed, oldest first
};

// A collective instruction of a warp: the number of threads that have arrived, and the operands of each.
struct Collective {
  int arrived = 0;
  void (*execute)(void**) = nullptr;
  void* operands[WARP];
};

class Machine {
 public:
  std::string error;  // the first error, or empty

  // Registers global memory that the kernel may access.
  void allow(const void* data, int64_t bytes) {
    if (data) allowed_.push_back({static_cast<const char*>(data), static_cast<const char*>(data) + bytes});
  }

  // Runs x * y blocks of `threads` threads, in reverse order of blocks and threads if `backwards`.
  void run(int x, int y, int threads, int shared_bytes, bool backwards, std::function<void()> kernel) {
    kernel_ = std::move(kernel), backwards_ = backwards;
    for (int i = 0; i < x * y && error.empty(); ++i) {
      const int block = backwards ? x * y - 1 - i : i;
      block_[0] = block % x, block_[1] = block / x;
      memory_.assign(shared_bytes, static_cast<char>(0xff));  // NaN in every format
      shadow_.assign(shared_bytes / 4, Shadow{});
      threads_.resize(threads), collectives_.assign(threads / WARP, Collective{});
      epoch_ = arrived_ = 0;
      for (Thread& thread : threads_) thread.started = thread.waiting = thread.done = false;
      current_ = backwards ? threads - 1 : 0;
      running_ = true;
      if (!_setjmp(home_)) resume();
      running_ = false;
      for (Thread& thread : threads_) {
        for (const auto& group : thread.groups)
          if (!group.empty()) fail("a block ended with copies in flight");
        if (!thread.copies.empty()) fail("a block ended with copies that were never committed");
        thread.groups.clear(), thread.copies.clear();
      }
    }
  }

  // Records the first error and ends the block.
  void fail(const std::string& what) {
    if (error.empty())
      error = what + " (block " + std::to_string(block_[0]) + ", " + std::to_string(block_[1]) + ", thread " +
              std::to_string(current_) + ")";
    if (running_) _longjmp(home_, 1);
  }

  int thread() const { return current_; }
  int block(int axis) const { return block_[axis]; }

  // --- collective instructions ---------------------------------------------------------------------------------------

  void barrier() {
    if (++arrived_ == static_cast<int>(threads_.size())) {
      arrived_ = 0, ++epoch_;
      for (Thread& thread : threads_) thread.waiting = false;
    } else {
      wait();
    }
  }

  // Executes `execute` with the operands of all threads of the warp, once the last thread has arrived.
  void collective(void (*execute)(void**), void* operands) {
    const int warp = current_ / WARP;
    Collective& collective = collectives_[warp];
    if (collective.arrived && collective.execute != execute)
      fail("the threads of a warp execute different instructions");
    collective.execute = execute, collective.operands[current_ % WARP] = operands;
    if (++collective.arrived == WARP) {
      execute(collective.operands);
      collective.arrived = 0;
      for (int lane = 0; lane < WARP; ++lane) threads_[warp * WARP + lane].waiting = false;
    } else {
      wait();
    }
  }

  // --- memory --------------------------------------------------------------------------------------------------------

  void check_global(const void* data, int bytes, int alignment, const char* what) {
    const char* at = static_cast<const char*>(data);
    if (reinterpret_cast<uintptr_t>(at) % alignment) fail(std::string(what) + ": misaligned global address");
    if (!bytes) return;
    for (const auto& range : allowed_)
      if (at >= range.first && at + bytes <= range.second) return;
    fail(std::string(what) + ": global memory out of bounds");
  }

  void read(Address from, void* to, int bytes, int thread) {
    check_shared(from, bytes);
    for (Address word = from / 4; word * 4 < from + bytes; ++word) {
      Shadow& shadow = shadow_[word];
      if (shadow.in_flight) fail("shared memory read before its thread waited for the copy to it");
      if (shadow.writer == NO_THREAD) fail("shared memory read before it was written");
      if (shadow.write_epoch == epoch_ && shadow.writer != thread)
        fail("shared memory read without a barrier after it was written");
      shadow.reader = shadow.read_epoch == epoch_ && shadow.reader != thread ? SEVERAL_THREADS : thread;
      shadow.read_epoch = epoch_;
    }
    std::memcpy(to, &memory_[from], bytes);
  }

  void write(Address to, const void* from, int bytes) {
    claim(to, bytes);
    std::memcpy(&memory_[to], from, bytes);
  }

  void copy(const Copy& copy) {
    check_global(copy.from, copy.valid, copy.bytes, "asynchronous copy");
    if (copy.valid < 0 || copy.valid > copy.bytes) fail("asynchronous copy with an invalid number of bytes");
    claim(copy.to, copy.bytes);
    for (Address word = copy.to / 4; word * 4 < copy.to + copy.bytes; ++word) shadow_[word].in_flight = true;
    threads_[current_].copies.push_back(copy);
  }
  void commit() {
    threads_[current_].groups.push_back(std::move(threads_[current_].copies));
    threads_[current_].copies.clear();
  }
  void wait_for_copies(size_t left) {
    for (auto& groups = threads_[current_].groups; groups.size() > left; groups.pop_front())
      for (const Copy& copy : groups.front()) {
        std::memset(&memory_[copy.to], 0, copy.bytes);
        std::memcpy(&memory_[copy.to], copy.from, copy.valid);
        for (Address word = copy.to / 4; word * 4 < copy.to + copy.bytes; ++word) {
          shadow_[word].in_flight = false;
          shadow_[word].writer = current_, shadow_[word].write_epoch = epoch_;
        }
      }
  }

 private:
  void check_shared(Address at, int bytes) {
    if (at % bytes) fail("misaligned shared address");
    if (at + bytes > memory_.size()) fail("shared memory out of bounds");
  }

  // Marks shared memory that this thread overwrites.
  void claim(Address to, int bytes) {
    check_shared(to, bytes);
    for (Address word = to / 4; word * 4 < to + bytes; ++word) {
      Shadow& shadow = shadow_[word];
      if (shadow.in_flight) fail("shared memory written while a copy to it is in flight");
      if (shadow.read_epoch == epoch_ && shadow.reader != current_)
        fail("shared memory written without a barrier after it was read");
      if (shadow.write_epoch == epoch_ && shadow.writer != current_)
        fail("shared memory written by two threads without a barrier between");
      shadow.writer = current_, shadow.write_epoch = epoch_;
    }
  }

  static void start();

  void wait() {
    threads_[current_].waiting = true;
    if (!_setjmp(threads_[current_].place)) next();
  }

  // Resumes the next thread that can run, or ends the block if there is none.
  void next() {
    const int count = static_cast<int>(threads_.size());
    bool all_done = true;
    for (int i = 1; i <= count; ++i) {
      const int candidate = (current_ + (backwards_ ? count - i : i)) % count;
      all_done &= threads_[candidate].done;
      if (threads_[candidate].done || threads_[candidate].waiting) continue;
      current_ = candidate;
      resume();
    }
    if (!all_done) fail("threads wait for threads that never arrive");
    _longjmp(home_, 1);
  }

  [[noreturn]] void resume() {
    Thread& thread = threads_[current_];
    if (thread.started) _longjmp(thread.place, 1);
    thread.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = thread.stack.get(), context.uc_stack.ss_size = STACK, context.uc_link = nullptr;
    makecontext(&context, &Machine::start, 0);
    setcontext(&context);
    __builtin_unreachable();
  }

  std::function<void()> kernel_;
  bool backwards_ = false, running_ = false;
  int block_[2] = {}, current_ = 0, epoch_ = 0, arrived_ = 0;
  std::vector<char> memory_;
  std::vector<Shadow> shadow_;
  std::vector<Thread> threads_;
  std::vector<Collective> collectives_;
  std::vector<std::pair<const char*, const char*>> allowed_;
  jmp_buf home_;
};

inline Machine* machine = nullptr;

inline void Machine::start() {
  machine->kernel_();
  machine->threads_[machine->current_].done = true;
  machine->next();
}

inline float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                          : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

template <typename T>
float element(uint16_t bits) {
  return std::is_same_v<T, Half> ? half_to_float(bits) : as_float(uint32_t{bits} << 16);
}

inline float towards_zero(double value) {
  const float nearest = static_cast<float>(value);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(value) ? std::nextafter(nearest, 0.f) : nearest;
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
  double a[16][K], b[K][8];
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
  for (int lane = 0; lane < WARP; ++lane)
    for (int i = 0; i < 4; ++i) {
      float& sum = static_cast<Product*>(operands[lane])->sum[i];
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      double exact = sum;
      for (int k = 0; k < K; ++k) exact += a[row][k] * b[k][column];
      sum = towards_zero(exact);
    }
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

inline int thread_index() { return emulation::machine->thread(); }
inline int block_index(int axis) { return emulation::machine->block(axis); }
inline void sync_block() { emulation::machine->barrier(); }
inline Address shared_memory() { return 0; }

template <typename T>
T load_shared(Address from) {
  T value{};
  emulation::machine->read(from, &value, sizeof(T), thread_index());
  return value;
}
template <typename T>
void store_shared(Address to, T value) {
  emulation::machine->write(to, &value, sizeof(T));
}
template <typename T>
T load_global(const T* from) {
  emulation::machine->check_global(from, sizeof(T), alignof(T), "read");
  return *from;
}
template <typename T>
void store_global(T* to, T value) {
  emulation::machine->check_global(to, sizeof(T), alignof(T), "write");
  *to = value;
}

template <int WORDS>
void load_words(uint32_t (&to)[WORDS], const void* from) {
  emulation::machine->check_global(from, sizeof to, sizeof to, "read");
  std::memcpy(to, from, sizeof to);
}
template <int WORDS>
void store_words(void* to, const uint32_t (&from)[WORDS]) {
  emulation::machine->check_global(to, sizeof from, sizeof from, "write");
  std::memcpy(to, from, sizeof from);
}
template <typename T>
T load_global_coherent(const T* from) {
  return load_global(from);
}
inline void fence_device() {}
inline int increment(int* counter) {
  emulation::machine->check_global(counter, sizeof(int), alignof(int), "atomic addition");
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

inline uint32_t pack_bfloat16(float lower, float upper) {
  const auto rounded = [](float value) {
    const uint32_t bits = as_bits(value);
    return value == value ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fffu;
  };
  return rounded(lower) | rounded(upper) << 16;
}

template <typename T, bool UPPER>
uint32_t widen(uint32_t pair) {
  return as_bits(emulation::element<T>(static_cast<uint16_t>(UPPER ? pair >> 16 : pair)));
}

}  // namespace srpkd::cuda
