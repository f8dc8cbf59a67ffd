// What happened before what, in an emulated kernel: who accesses memory, and what each of them has seen.
//
// Every participant of a block has a clock that says which accesses of the others happened before, because a barrier
// ordered them. Participants are the threads and the units that access memory asynchronously:
//   thread t                 its ordinary loads and stores
//   products of a warp       the operands that a warp's part of wgmma reads, until the warp has waited for them
//   bulk copies of a warp    what its bulk additions and stores read, until their thread has waited for that
//   bulk writes of a warp    what these write to global memory, likewise
//   barrier b                what TMA writes and reports to this barrier; who waited for its phase has seen it
// Blocks see one another's accesses through barriers of the grid, and through counters in global memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace srpkd::cuda::emulation {

using Time = uint32_t;

constexpr int WARP = 32, WARPGROUP_WARPS = 4;
constexpr int MAX_BARRIERS = 64;
constexpr int NOBODY = -1;

struct Participants {
  int threads;

  int warps() const { return (threads + WARP - 1) / WARP; }
  int products(int warp) const { return threads + warp; }
  int bulk(int warp) const { return threads + warps() + warp; }
  int bulk_writes(int warp) const { return threads + 2 * warps() + warp; }
  int barrier(int index) const { return threads + 3 * warps() + index; }
  int count() const { return barrier(MAX_BARRIERS); }

  std::string name(int participant) const {
    if (participant < products(0)) return "thread " + std::to_string(participant);
    if (participant < bulk(0)) return "wgmma of warp " + std::to_string(participant - products(0));
    if (participant < bulk_writes(0)) return "bulk copy of warp " + std::to_string(participant - bulk(0));
    if (participant < barrier(0)) return "bulk write of warp " + std::to_string(participant - bulk_writes(0));
    return "TMA for barrier " + std::to_string(participant - barrier(0));
  }
};

// For each participant, the time of its last access that happened before, and of the last that a proxy fence follows;
// and what happened before in other blocks.
class Clock {
 public:
  void reset(int participants) {
    count_ = participants, times_.assign(2 * participants, 0);
    all_before_ = 0, others_.clear();
  }
  int participants() const { return count_; }
  Time& seen(int participant) { return times_[participant]; }
  Time seen(int participant) const { return times_[participant]; }
  Time fenced(int participant) const { return times_[count_ + participant]; }
  void join(const Clock& other) {
    Time* own = times_.data();
    const Time* others = other.times_.data();
    for (size_t i = 0; i < times_.size(); ++i) own[i] = std::max(own[i], others[i]);
    learn(other);
  }
  // Everything that happened before is now ordered before asynchronous accesses.
  void fence() {
    for (int i = 0; i < count_; ++i) times_[count_ + i] = std::max(times_[count_ + i], times_[i]);
  }

  // --- other blocks --------------------------------------------------------------------------------------------------

  Time seen(int block, int participant) const {
    for (const Others& others : others_)
      if (others.block == block) return std::max(all_before_, (*others.times)[participant]);
    return all_before_;
  }
  // All accesses up to a time happened before, by whatever block.
  void order_all(Time time) { all_before_ = std::max(all_before_, time); }
  // Adds what this clock of a thread of `block` has seen to what whoever acquires `to` has.
  void release(Clock& to, int block) const {
    to.learn(*this);
    to.learn({block, std::make_shared<const std::vector<Time>>(times_.begin(), times_.begin() + count_)});
  }
  // The same in the other direction, by a thread of `block`.
  void acquire(const Clock& from, int block) {
    learn(from);
    for (const Others& others : from.others_)
      if (others.block == block)
        for (int i = 0; i < count_; ++i) times_[i] = std::max(times_[i], (*others.times)[i]);
  }

 private:
  struct Others {
    int block;
    std::shared_ptr<const std::vector<Time>> times;  // of its participants
  };

  void learn(const Clock& other) {
    all_before_ = std::max(all_before_, other.all_before_);
    for (const Others& others : other.others_) learn(others);
  }
  void learn(const Others& news) {
    for (Others& known : others_) {
      if (known.block != news.block) continue;
      if (known.times == news.times) return;
      auto times = std::make_shared<std::vector<Time>>(*known.times);
      for (size_t i = 0; i < times->size(); ++i) (*times)[i] = std::max((*times)[i], (*news.times)[i]);
      known.times = std::move(times);
      return;
    }
    others_.push_back(news);
  }

  int count_ = 0;
  std::vector<Time> times_;
  Time all_before_ = 0;
  std::vector<Others> others_;
};

}  // namespace srpkd::cuda::emulation
