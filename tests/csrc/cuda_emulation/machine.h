// A GPU on the host that executes thread blocks: their threads are fibers, which a scheduler interleaves.
//
// A fiber runs until it has to wait: at a collective instruction, whose last thread executes it for all, or for a
// barrier, a counter in global memory, or registers. The scheduler then chooses a warp that can continue. Several
// blocks may be resident; the others start when these have ended. Asynchronous operations happen at any time between
// their start and the wait for them. Seed 0 schedules in the order of the warps and does asynchronous work as late as
// possible; every other seed chooses at random, in one of several ways.
//
// The emulation reports errors that often remain unnoticed on a GPU:
//   - accesses to shared memory that no barrier orders, see shared_memory.h, and to global memory, see global_memory.h
//   - misaligned addresses, global memory outside the ranges registered for the kernel, or read before it was written
//   - reads of results as if they were inputs of the call, and everything else that csrc/cuda/overlap.cuh excludes
//     (with an early start, a kernel runs until it waits for earlier kernels before these have done anything)
//   - threads that arrive at different collective instructions, or wait for what never happens
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <list>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "global_memory.h"
#include "shared_memory.h"

namespace srpkd::cuda::emulation {

using Address = uint32_t;

constexpr int STACK = 1 << 16;  // bytes
constexpr int WARPGROUP = WARP * WARPGROUP_WARPS;
constexpr int REGISTERS = 65536;         // of a multiprocessor
constexpr int64_t MAX_STEPS = 50000000;  // of the scheduler, after which a kernel is taken to spin forever

struct Schedule {
  uint64_t seed = 0;
  int resident = 1;       // blocks at the same time
  bool overlaps = false;  // whether the launch may start early
};

struct Copy {
  Address to;
  const char* from;
  int bytes, valid;
};

// What a thread waits for: functions of objects on its stack, which stay there until it continues. `ready` is null if
// another thread wakes it.
struct Wait {
  bool (*ready)(const void*) = nullptr;
  std::string (*what)(const void*) = nullptr;
  const void *condition = nullptr, *description = nullptr;
};

// A thread's bulk additions and stores.
struct Bulk {
  bool used = false;
  uint64_t committed = 0;  // groups
  Time last_start = 0;
  std::vector<Time> starts;  // the last of each committed group
};

struct Thread {
  std::unique_ptr<char[]> stack{new char[STACK]};
  jmp_buf place;
  bool started = false, waiting = false, done = false;
  Wait wait;
  Clock clock;
  std::vector<Copy> copies;              // cp.async, not yet committed
  std::deque<std::vector<Copy>> groups;  // committed, oldest first
  Bulk bulk;
  bool waited = false;    // for earlier kernels
  bool acquired = false;  // what other blocks wrote, since the last fence_async_proxy_global
};

// A collective instruction: the number of threads that have arrived, and the operands of each.
struct Collective {
  int arrived = 0;
  void (*execute)(void**) = nullptr;
  void* operands[WARPGROUP];
};

struct NamedBarrier {
  int threads = 0, arrived = 0;
  Clock clock;
  std::vector<int> waiting;
};

// An mbarrier in shared memory.
struct Barrier {
  Address address = 0;
  uint32_t arrivals = 0, pending = 0;
  int64_t bytes = 0;   // still expected in this phase
  uint32_t phase = 0;  // the number of phases that have ended
  int initializer = NOBODY;
  Time initialized = 0;
  bool visible_to_tma = false;
  Clock clock, last_clock;  // of this phase and of the last
};

// Asynchronous work in steps. Operations of the same ordered stream happen one after the other.
struct Operation {
  int stream;  // the participant that accesses shared memory
  bool ordered;
  uint64_t group;
  int steps;  // left
  std::function<void(int)> step;
};

struct TensorCore;

struct Block {
  int index = 0, x = 0, y = 0;
  Participants participants{};
  SharedMemory memory;
  std::vector<Thread> threads;
  std::vector<Collective> warp_collectives, warpgroup_collectives;
  NamedBarrier named[16];
  std::vector<Barrier> barriers;
  std::list<Operation> operations;
  int64_t grid_barriers = 0;   // that this block has arrived at
  std::vector<int> registers;  // of each thread, by warp; 0: unknown
  int free_registers = 0;
  std::shared_ptr<std::vector<TensorCore>> tensor_cores;  // of each warpgroup, see tensor_cores.h

  bool done() const {
    return std::all_of(threads.begin(), threads.end(), [](const Thread& thread) { return thread.done; });
  }
};

// Of global memory: what kernels only read, what they may overwrite, or nothing before they write it.
enum class Content { input, given, none };

class Machine {
 public:
  std::string error;  // the first error, or empty

  // Registers global memory that the kernels may access.
  void allow(const void* data, int64_t bytes, Content content) {
    if (data) allowed_.push_back({static_cast<const char*>(data), static_cast<const char*>(data) + bytes, content});
  }

  // Runs x * y blocks of `threads` threads.
  void run(int x, int y, int threads, int shared_bytes, Schedule schedule, std::function<void()> kernel);

  // Records the first error and ends the kernel.
  [[noreturn]] void fail(const std::string& what) {
    if (error.empty()) {
      error = what + " (block " + std::to_string(block_->x) + ", " + std::to_string(block_->y);
      error += in_fiber_ ? ", thread " + std::to_string(thread_) + ")" : ")";
    }
    if (in_fiber_) _longjmp(home_, 1);
    throw Failure{};
  }
  void check(bool right) {
    if (!right) fail(block_->memory.error);
  }

  int thread() const { return thread_; }
  int warp() const { return thread_ / WARP; }
  int block(int axis) const { return axis ? block_->y : block_->x; }
  Block& block() { return *block_; }
  Thread& current() { return block_->threads[thread_]; }
  Clock& clock() { return current().clock; }
  Time now() const { return now_; }
  Time tick() { return ++now_; }
  // Marks the accesses of the current thread so far as done before what it now signals, and returns its clock.
  const Clock& publish() {
    clock().seen(thread_) = now_++;
    return clock();
  }

  // --- waiting -------------------------------------------------------------------------------------------------------

  // Continues when `ready` returns true.
  template <class Ready, class What>
  void wait(const Ready& ready, const What& what) {
    if (ready()) return;
    current().wait.ready = [](const void* condition) { return (*static_cast<const Ready*>(condition))(); };
    current().wait.condition = &ready;
    wait_until_woken(what);
    current().wait.ready = nullptr;
  }
  // Continues when another thread sets `waiting` to false.
  template <class What>
  void wait_until_woken(const What& what) {
    Thread& thread = current();
    thread.waiting = true, thread.wait.description = &what;
    thread.wait.what = [](const void* description) { return (*static_cast<const What*>(description))(); };
    leave(thread);
  }
  // Lets the scheduler choose another warp: always, or sometimes.
  void pause() { leave(current()); }
  void yield() {
    if (seed_ && random(8) == 0) pause();
  }

  // Executes `execute` with the operands of all threads of the warp, once the last thread has arrived.
  void collective(void (*execute)(void**), void* operands) {
    arrive_at(block_->warp_collectives[warp()], WARP, execute, operands);
  }
  void warpgroup_collective(void (*execute)(void**), void* operands) {
    if (block_->threads.size() % WARPGROUP) fail("an instruction of a warpgroup in a block of incomplete warpgroups");
    arrive_at(block_->warpgroup_collectives[thread_ / WARPGROUP], WARPGROUP, execute, operands);
  }

  // Barrier 0 of all threads of the block, or another of some.
  void barrier() { sync_named(0, static_cast<int>(block_->threads.size())); }
  void sync_named(int index, int threads);

  // All threads of the grid, of which all blocks must be resident.
  void grid_barrier();

  // Programmatic dependent launches.
  void wait_for_earlier_kernels() { current().waited = true; }
  void let_next_kernel_start() {
    if (!current().waited) fail("a thread lets the next kernel start before it has waited for earlier ones");
  }

  // --- memory --------------------------------------------------------------------------------------------------------

  // Checks an access to global memory. `as_input`: by an instruction for memory that no kernel of this call writes.
  void access_global(Kind kind, const void* data, int64_t bytes, int alignment, const char* what,
                     bool as_input = false) {
    access_global(kind, data, bytes, alignment, what, thread_, now_, as_input);
  }
  // The same by an asynchronous participant, which the current thread starts.
  void access_global(Kind kind, const void* data, int64_t bytes, int alignment, const char* what, int participant,
                     Time now, bool as_input = false) {
    const char* at = static_cast<const char*>(data);
    if (reinterpret_cast<uintptr_t>(at) % alignment) fail(std::string(what) + ": misaligned global address");
    if (!bytes) return;
    for (const Range& range : allowed_)
      if (at >= range.first && at + bytes <= range.end) {
        const bool input = range.content == Content::input;
        if (as_input && !input) fail(std::string(what) + ": of an input, but kernels of this call may write it");
        if (overlaps_ && !input && !current().waited)
          fail(std::string(what) + ": of a result, before the thread has waited for earlier kernels");
        if (!input && !global_.access(kind, data, bytes, range.content == Content::given, block_->index, participant,
                                      clock(), now))
          fail(std::string(what) + ": " + global_.error);
        return;
      }
    fail(std::string(what) + ": global memory out of bounds");
  }

  // What atomic instructions of type release and acquire order.
  void release(const void* counter) {
    publish();
    clock().release(released_[counter], block_->index);
  }
  void acquire(const void* counter) { clock().acquire(released_[counter], block_->index); }

  void read(Address from, void* to, int bytes, int thread) {
    SharedMemory& memory = block_->memory;
    check(memory.in_range(from, bytes, bytes));
    check(memory.read(from, bytes, thread, block_->threads[thread].clock, now_));
    std::memcpy(to, memory.at(from), bytes);
  }
  void write(Address to, const void* from, int bytes, int thread) {
    SharedMemory& memory = block_->memory;
    check(memory.in_range(to, bytes, bytes));
    check(memory.write(to, bytes, thread, block_->threads[thread].clock, now_));
    std::memcpy(memory.at(to), from, bytes);
  }

  // cp.async, which completes when its thread waits for it.
  void copy(const Copy& copy) {
    access_global(Kind::read, copy.from, copy.valid, copy.bytes, "asynchronous copy");
    if (copy.valid < 0 || copy.valid > copy.bytes) fail("asynchronous copy with an invalid number of bytes");
    check(block_->memory.in_range(copy.to, copy.bytes, copy.bytes));
    check(block_->memory.begin_write(copy.to, copy.bytes, thread_, thread_, clock()));
    current().copies.push_back(copy);
  }
  void commit() {
    current().groups.push_back(std::move(current().copies));
    current().copies.clear();
  }
  void wait_for_copies(size_t left) {
    for (auto& groups = current().groups; groups.size() > left; groups.pop_front())
      for (const Copy& copy : groups.front()) {
        std::memset(block_->memory.at(copy.to), 0, copy.bytes);
        std::memcpy(block_->memory.at(copy.to), copy.from, copy.valid);
        block_->memory.finish_write(copy.to, copy.bytes, thread_, now_);
      }
  }

  // --- asynchronous operations ---------------------------------------------------------------------------------------

  // Executes the operations of a stream whose group is below a limit, until each has at most `steps_left` steps left.
  void complete(int stream, uint64_t below_group, int steps_left) {
    auto& operations = block_->operations;
    for (auto i = operations.begin(); i != operations.end();) {
      if (i->stream != stream || i->group >= below_group) {
        ++i;
        continue;
      }
      while (i->steps > steps_left) i->step(--i->steps);
      i = i->steps ? std::next(i) : operations.erase(i);
    }
  }

  uint32_t random(uint32_t below) {
    state_ ^= state_ << 13, state_ ^= state_ >> 7, state_ ^= state_ << 17;
    return static_cast<uint32_t>((state_ >> 32) * below >> 32);
  }

 private:
  struct Failure {};
  struct Range {
    const char *first, *end;
    Content content;
  };
  enum class Order { in_order, random, priorities, sticky };

  static void start();

  // --- fibers --------------------------------------------------------------------------------------------------------

  // Returns to the scheduler, which later continues here.
  void leave(Thread& thread) {
    if (!_setjmp(thread.place)) _longjmp(home_, 1);
  }

  // Runs a thread until it leaves.
  void enter(int thread) {
    thread_ = thread;
    in_fiber_ = true;
    if (!_setjmp(home_)) resume();
    in_fiber_ = false;
  }
  [[noreturn]] void resume() {
    Thread& thread = current();
    if (thread.started) _longjmp(thread.place, 1);
    thread.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = thread.stack.get(), context.uc_stack.ss_size = STACK, context.uc_link = nullptr;
    makecontext(&context, &Machine::start, 0);
    setcontext(&context);
    __builtin_unreachable();
  }

  void arrive_at(Collective& collective, int size, void (*execute)(void**), void* operands) {
    if (collective.arrived && collective.execute != execute)
      fail("the threads of a warp or warpgroup execute different instructions");
    collective.execute = execute, collective.operands[thread_ % size] = operands;
    if (++collective.arrived < size)
      return wait_until_woken([size] { return std::string(size == WARP ? "its warp" : "its warpgroup"); });
    execute(collective.operands);
    collective.arrived = 0;
    const int first = thread_ / size * size;
    for (int i = first; i < first + size; ++i) block_->threads[i].waiting = false;
  }

  // --- the scheduler -------------------------------------------------------------------------------------------------

  struct Candidate {
    int slot, warp;
  };

  static bool runnable(Thread& thread) {
    return !thread.done && (!thread.waiting || (thread.wait.ready && thread.wait.ready(thread.wait.condition)));
  }
  bool runnable(int slot, int warp) {
    block_ = &slots_[slot];
    const int end = std::min<int>(block_->threads.size(), (warp + 1) * WARP);
    for (int i = warp * WARP; i < end; ++i)
      if (runnable(block_->threads[i])) return true;
    return false;
  }

  void start_block(Block& block, int index, int threads, int shared_bytes);
  void end_block(Block& block);
  bool step();
  bool step_asynchronously();
  void run_warp(int slot, int warp);
  void find_candidates();
  Candidate choose();
  std::string report() const;

  std::function<void()> kernel_;
  std::deque<Block> slots_;  // the resident blocks
  std::vector<bool> occupied_;
  std::vector<Candidate> candidates_;
  std::vector<uint32_t> priorities_;
  Block* block_ = nullptr;
  int thread_ = 0, x_ = 0, blocks_ = 0, next_block_ = 0, threads_per_block_ = 0, shared_bytes_ = 0;
  bool in_fiber_ = false, overlaps_ = false;
  Time now_ = 1;
  uint64_t seed_ = 0, state_ = 1;
  Order order_ = Order::in_order;
  uint32_t asynchronous_percent_ = 0;
  Candidate last_{0, 0};
  int64_t grid_arrivals_ = 0;
  std::vector<Time> grid_times_;  // when the last block arrived at each barrier of the grid
  GlobalMemory global_;
  std::unordered_map<const void*, Clock> released_;  // by counters
  std::vector<Range> allowed_;
  jmp_buf home_;
};

inline Machine* machine = nullptr;

}  // namespace srpkd::cuda::emulation

#include "scheduler.h"
