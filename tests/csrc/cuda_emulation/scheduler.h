// The scheduler of machine.h: which warp or asynchronous operation continues, and which blocks are resident.
#pragma once

#include "machine.h"

namespace srpkd::cuda::emulation {

inline void Machine::start() {
  machine->kernel_();
  machine->current().done = true;
  _longjmp(machine->home_, 1);
}

inline void Machine::start_block(Block& block, int index, int threads, int shared_bytes) {
  block.index = index, block.x = index % x_, block.y = index / x_;
  block.participants = {threads};
  block.memory.reset(block.participants, shared_bytes);
  block.threads.resize(threads);
  for (Thread& thread : block.threads) {
    thread.started = thread.waiting = thread.done = thread.acquired = thread.waited = false;
    thread.clock.reset(block.participants.count());
    thread.copies.clear(), thread.groups.clear(), thread.bulk = {}, thread.wait = {};
  }
  block.warp_collectives.assign(block.participants.warps(), Collective{});
  block.warpgroup_collectives.assign(threads / WARPGROUP, Collective{});
  for (NamedBarrier& named : block.named) named = {};
  block.barriers.clear();
  block.barriers.reserve(MAX_BARRIERS);  // others hold references
  block.operations.clear();
  block.registers.assign(block.participants.warps(), REGISTERS / threads / 8 * 8);
  block.free_registers = 0, block.grid_barriers = 0;
  block.tensor_cores.reset();
}

inline void Machine::end_block(Block& block) {
  block_ = &block;
  for (Thread& thread : block.threads) {
    for (const auto& group : thread.groups)
      if (!group.empty()) fail("a block ended with copies in flight");
    if (!thread.copies.empty()) fail("a block ended with copies that were never committed");
    if (overlaps_ && !thread.waited) fail("a block ended before all its threads have waited for earlier kernels");
  }
  for (Operation& operation : block.operations) {
    // bulk additions that have read shared memory may write global memory later
    if (operation.steps > 1 || operation.stream < block.participants.bulk(0) ||
        operation.stream >= block.participants.barrier(0))
      fail("a block ended while asynchronous work accessed its shared memory: " +
           block.participants.name(operation.stream));
    operation.step(operation.steps = 0);
  }
  block.operations.clear();
}

inline void Machine::run(int x, int y, int threads, int shared_bytes, Schedule schedule, std::function<void()> kernel) {
  kernel_ = std::move(kernel);
  x_ = x, blocks_ = x * y, next_block_ = 0, grid_arrivals_ = 0;
  global_.start_kernel({threads}), released_.clear(), grid_times_.clear();
  seed_ = schedule.seed, overlaps_ = schedule.overlaps;
  state_ = 0x9e3779b97f4a7c15u * (seed_ + 1);
  last_ = {0, -1};
  for (int i = 0; i < 8; ++i) random(1);
  constexpr Order ORDERS[] = {Order::random, Order::priorities, Order::sticky};
  constexpr uint32_t PERCENTS[] = {50, 3, 0};
  order_ = seed_ ? ORDERS[seed_ % 3] : Order::in_order;
  asynchronous_percent_ = seed_ ? PERCENTS[seed_ / 3 % 3] : 0;
  const int resident = std::min(schedule.resident, blocks_);
  slots_.resize(std::max<int>(slots_.size(), resident));
  occupied_.assign(slots_.size(), false);
  priorities_.assign(slots_.size() * ((threads + WARP - 1) / WARP), 0);
  for (uint32_t& priority : priorities_) priority = random(1u << 30);
  threads_per_block_ = threads, shared_bytes_ = shared_bytes;
  try {
    for (int64_t steps = 0; error.empty(); ++steps) {
      for (int slot = 0; slot < resident; ++slot)
        if (!occupied_[slot] && next_block_ < blocks_) {
          block_ = &slots_[slot];
          start_block(*block_, next_block_++, threads, shared_bytes);
          occupied_[slot] = true;
        }
      if (!step()) break;
      if (steps > MAX_STEPS) fail("the kernel does not end:" + report());
    }
  } catch (const Failure&) {
  }
  kernel_ = nullptr;
}

// Lets one warp run, or asynchronous work happen. Returns false when all blocks have ended.
inline bool Machine::step() {
  if (asynchronous_percent_ && random(100) < asynchronous_percent_ && step_asynchronously()) return true;
  if (std::find(occupied_.begin(), occupied_.end(), true) == occupied_.end()) return false;
  find_candidates();
  if (candidates_.empty()) {
    if (!step_asynchronously()) fail("threads wait for threads that never arrive:" + report());
    return true;
  }
  const Candidate chosen = choose();
  last_ = chosen;
  run_warp(chosen.slot, chosen.warp);
  Block& block = slots_[chosen.slot];
  if (error.empty() && block.done()) {
    end_block(block);
    occupied_[chosen.slot] = false;
  }
  return true;
}

inline bool Machine::step_asynchronously() {
  // in seed 0, the first operation; otherwise one at random, but of an ordered stream the first
  int count = 0;
  Block* chosen_block = nullptr;
  std::list<Operation>::iterator chosen;
  for (size_t slot = 0; slot < slots_.size(); ++slot) {
    if (!occupied_[slot]) continue;
    auto& operations = slots_[slot].operations;
    for (auto i = operations.begin(); i != operations.end(); ++i) {
      const bool first =
          !i->ordered || std::none_of(operations.begin(), i, [&](const Operation& o) { return o.stream == i->stream; });
      if (first && random(++count) == 0 && (seed_ || count == 1)) chosen_block = &slots_[slot], chosen = i;
    }
  }
  if (!count) return false;
  block_ = chosen_block;
  chosen->step(--chosen->steps);
  if (!chosen->steps) block_->operations.erase(chosen);
  return true;
}

// Finds the warps that can continue; in order only the next one, because with many resident blocks the search takes
// most of the time.
inline void Machine::find_candidates() {
  candidates_.clear();
  const int warps = (threads_per_block_ + WARP - 1) / WARP, all = static_cast<int>(slots_.size()) * warps;
  const int first = order_ == Order::in_order ? last_.slot * warps + last_.warp + 1 : 0;
  for (int i = first; i < first + all; ++i) {
    const Candidate candidate{i % all / warps, i % warps};
    if (!occupied_[candidate.slot] || !runnable(candidate.slot, candidate.warp)) continue;
    candidates_.push_back(candidate);
    if (order_ == Order::in_order) return;
  }
}

inline Machine::Candidate Machine::choose() {
  const auto index = [&](const Candidate& c) { return c.slot * slots_[c.slot].participants.warps() + c.warp; };
  const auto same = [&](const Candidate& c) { return c.slot == last_.slot && c.warp == last_.warp; };
  switch (order_) {
    case Order::in_order:
      return candidates_.front();
    case Order::priorities:
      if (random(64) == 0) priorities_[random(priorities_.size())] = random(1u << 30);
      return *std::max_element(candidates_.begin(), candidates_.end(), [&](const Candidate& a, const Candidate& b) {
        return priorities_[index(a)] < priorities_[index(b)];
      });
    case Order::sticky:
      if (random(16))
        for (const Candidate& candidate : candidates_)
          if (same(candidate)) return candidate;
      [[fallthrough]];
    case Order::random:
      break;
  }
  return candidates_[random(candidates_.size())];
}

inline void Machine::run_warp(int slot, int warp) {
  block_ = &slots_[slot];
  const int first = warp * WARP, count = std::min<int>(block_->threads.size() - first, WARP);
  const bool backwards = seed_ && random(2);
  for (int i = 0; i < count && error.empty(); ++i) {
    const int thread = first + (backwards ? count - 1 - i : i);
    if (!runnable(block_->threads[thread])) continue;
    block_->threads[thread].waiting = false;
    enter(thread);
  }
}

// The threads that wait, those of a warp with the same reason together.
inline std::string Machine::report() const {
  std::string text;
  int lines = 0;
  for (size_t slot = 0; slot < slots_.size(); ++slot) {
    if (!occupied_[slot]) continue;
    const Block& block = slots_[slot];
    for (int begin = 0, end; begin < static_cast<int>(block.threads.size()); begin = end) {
      const auto reason = [&](int i) {
        const Thread& thread = block.threads[i];
        return thread.done || !thread.waiting ? std::string() : thread.wait.what(thread.wait.description);
      };
      const std::string first = reason(begin);
      for (end = begin + 1; end < static_cast<int>(block.threads.size()) && reason(end) == first; ++end) {
      }
      if (first.empty() || ++lines > 24) continue;
      text += "\n  block " + std::to_string(block.index) + ", threads " + std::to_string(begin) + " to " +
              std::to_string(end - 1) + " wait for " + first;
    }
  }
  if (next_block_ < blocks_)
    text += "\n  blocks " + std::to_string(next_block_) + " to " + std::to_string(blocks_ - 1) + " have not started";
  return text;
}

inline void Machine::sync_named(int index, int threads) {
  if (index < 0 || index > 15 || threads % WARP) fail("invalid named barrier " + std::to_string(index));
  NamedBarrier& named = block_->named[index];
  if (!named.arrived) named.threads = threads, named.clock.reset(block_->participants.count());
  if (named.threads != threads)
    fail("named barrier " + std::to_string(index) + " with " + std::to_string(threads) + " threads, others have " +
         std::to_string(named.threads));
  named.clock.join(publish());
  named.waiting.push_back(thread_);
  const bool last = ++named.arrived == threads;
  if (last) {
    for (const int waiting : named.waiting)
      block_->threads[waiting].clock.join(named.clock), block_->threads[waiting].waiting = false;
    named.waiting.clear(), named.arrived = 0;
  } else {
    wait_until_woken([&named, index] {
      return "named barrier " + std::to_string(index) + ", at which " + std::to_string(named.arrived) + " of " +
             std::to_string(named.threads) + " threads have arrived";
    });
  }
}

inline void Machine::grid_barrier() {
  barrier();
  if (thread_ == 0) {
    publish();
    if (++grid_arrivals_ % blocks_ == 0) grid_times_.push_back(tick());
    const int64_t last = ++block_->grid_barriers * blocks_;
    wait([this, last] { return grid_arrivals_ >= last; },
         [this, last] {
           return "the grid, of which " + std::to_string(last - grid_arrivals_) + " blocks have not arrived";
         });
    clock().order_all(grid_times_[block_->grid_barriers - 1]);
  }
  barrier();
  current().acquired = true;
}

}  // namespace srpkd::cuda::emulation
