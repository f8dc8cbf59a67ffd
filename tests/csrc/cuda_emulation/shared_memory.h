// The shared memory of an emulated block, with a record of who accessed each word when, which detects races.
//
// Every participant of a block has a clock that says which accesses of the others happened before, because a barrier
// ordered them. Participants are the threads and the units that access shared memory asynchronously:
//   thread t          its ordinary loads and stores
//   products of a warp    the operands that a warp's part of wgmma reads, until the warp has waited for them
//   bulk copies of a warp    what its bulk additions and stores read, until their thread has waited for that
//   bulk writes of a warp    what these write to global memory, likewise
//   barrier b         what TMA writes and reports to this barrier; who waited for its phase has seen it
// An access is an error if an earlier access to the same word, one of the two a write, did not happen before. This does
// not depend on the order in which the emulation executes the threads. An asynchronous access must also be separated
// from an ordinary write by fence_async_proxy(), a proxy fence.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace srpkd::cuda::emulation {

using Time = uint32_t;

constexpr int WARP = 32, WARPGROUP_WARPS = 4;
constexpr int MAX_BARRIERS = 64;
constexpr int NOBODY = -1;

// Where the hardware puts a byte with the 128-byte swizzle: bits 7 to 9 of its address change bits 4 to 6.
inline uint32_t swizzled(uint32_t address) { return address ^ address / 128 % 8 * 16; }

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

// Checked accesses. Each returns whether it is right; if not, `error` says why. `now` is the time of the access.
class SharedMemory {
 public:
  std::string error;

  void reset(const Participants& participants, size_t bytes) {
    participants_ = participants;
    slots_ = participants.warps() + (participants.warps() + WARPGROUP_WARPS - 1) / WARPGROUP_WARPS + 1;
    data_.assign(bytes, static_cast<char>(0xff));  // NaN in every format
    words_.assign((bytes + 3) / 4, Word{});
    reads_.assign(words_.size() * slots_, Read{});
  }

  size_t size() const { return data_.size(); }
  char* at(uint32_t address) { return data_.data() + address; }

  bool in_range(uint32_t address, uint32_t bytes, uint32_t alignment) {
    if (address % alignment) return wrong("misaligned shared address " + std::to_string(address));
    if (uint64_t{address} + bytes <= data_.size()) return true;
    return wrong("shared memory out of bounds at " + std::to_string(address));
  }

  // An ordinary read by a thread.
  bool read(uint32_t from, uint32_t bytes, int thread, const Clock& clock, Time now) {
    for (uint32_t i = from / 4; i * 4 < from + bytes; ++i) {
      const Word& word = words_[i];
      if (word.in_flight) return in_flight(i, "read");
      if (word.writer == NOBODY) return unwritten(i);
      if (word.writer != thread && clock.seen(word.writer) < word.written)
        return unordered("read", i, thread, "written", word.writer);
      reads_[i * slots_ + thread / WARP] = {now, thread};
    }
    return true;
  }

  // An ordinary write by a thread.
  bool write(uint32_t to, uint32_t bytes, int thread, const Clock& clock, Time now) {
    for (uint32_t i = to / 4; i * 4 < to + bytes; ++i) {
      if (!may_overwrite(i, thread, clock)) return false;
      words_[i] = {now, thread, false, false};
    }
    return true;
  }

  // An asynchronous read by a participant that a thread starts, which happens after all of these threads' clocks.
  bool read_async(uint32_t from, uint32_t bytes, int participant, const std::vector<const Clock*>& clocks, Time now) {
    const int slot = participant < participants_.bulk(0)
                         ? participants_.warps() + (participant - participants_.products(0)) / WARPGROUP_WARPS
                         : slots_ - 1;
    for (uint32_t i = from / 4; i * 4 < from + bytes; ++i) {
      const Word& word = words_[i];
      if (word.in_flight) return in_flight(i, "read");
      if (word.writer == NOBODY) return unwritten(i);
      if (word.writer != known_.writer || word.written > known_.written || word.async != known_.async) {
        for (const Clock* clock : clocks) {
          if (clock->seen(word.writer) < word.written) return unordered("read", i, participant, "written", word.writer);
          if (!word.async && clock->fenced(word.writer) < word.written) return unfenced("read", i, participant);
        }
        known_ = word;
      }
      reads_[i * slots_ + slot] = {now, participant};
    }
    return true;
  }
  // Before the first of several reads with the same clocks.
  void begin_read_async() { known_ = {}; }

  // An asynchronous write that a thread starts, and that ends with finish_write. `writer` is the barrier or, for
  // cp.async, the thread.
  bool begin_write(uint32_t to, uint32_t bytes, int writer, int thread, const Clock& clock) {
    for (uint32_t i = to / 4; i * 4 < to + bytes; ++i) {
      if (!may_overwrite(i, thread, clock)) return false;
      const Word& word = words_[i];
      const bool async = writer >= participants_.threads;
      if (async && word.writer != NOBODY && !word.async && clock.fenced(word.writer) < word.written)
        return unfenced("overwritten", i, writer);
    }
    for (uint32_t i = to / 4; i * 4 < to + bytes; ++i) words_[i].in_flight = true, words_[i].writer = writer;
    return true;
  }
  void finish_write(uint32_t to, uint32_t bytes, int writer, Time now) {
    for (uint32_t i = to / 4; i * 4 < to + bytes; ++i)
      words_[i] = {now, writer, false, writer >= participants_.threads};
  }

 private:
  struct Word {
    Time written = 0;
    int writer = NOBODY;
    bool in_flight = false, async = false;
  };
  struct Read {  // the last one by a warp, by a warpgroup's products, or by bulk copies
    Time time = 0;
    int reader = NOBODY;
  };

  bool may_overwrite(uint32_t i, int thread, const Clock& clock) {
    const Word& word = words_[i];
    if (word.in_flight) return in_flight(i, "written");
    if (word.writer != NOBODY && word.writer != thread && clock.seen(word.writer) < word.written)
      return unordered("written", i, thread, "written", word.writer);
    for (int slot = 0; slot < slots_; ++slot) {
      const Read& read = reads_[i * slots_ + slot];
      if (!read.time || read.reader == thread) continue;
      const bool products = read.reader >= participants_.products(0) && read.reader < participants_.bulk(0);
      for (int reader = read.reader; reader < read.reader + (products ? WARPGROUP_WARPS : 1); ++reader)
        if (clock.seen(reader) < read.time) return unordered("written", i, thread, "read", reader);
    }
    return true;
  }

  bool wrong(std::string message) {
    error = std::move(message);
    return false;
  }
  bool unwritten(uint32_t i) { return wrong("shared memory read before it was written, at " + std::to_string(i * 4)); }
  bool in_flight(uint32_t i, const char* access) {
    const bool thread = words_[i].writer < participants_.threads;
    return wrong(std::string("shared memory ") + access +
                 (thread ? " before its thread waited for the copy to it" : " while a load to it is in flight") +
                 ", at " + std::to_string(i * 4));
  }
  bool unordered(const char* access, uint32_t i, int who, const char* earlier, int other) {
    return wrong(std::string("shared memory ") + access + " without a barrier after it was " + earlier + ", at " +
                 std::to_string(i * 4) + ": by " + participants_.name(who) + ", before by " +
                 participants_.name(other));
  }
  bool unfenced(const char* access, uint32_t i, int who) {
    return wrong(std::string("shared memory ") + access + " without fence_async_proxy() after it was written, at " +
                 std::to_string(i * 4) + ": by " + participants_.name(who) + ", before by " +
                 participants_.name(words_[i].writer));
  }

  Participants participants_{};
  int slots_ = 0;
  std::vector<char> data_;
  std::vector<Word> words_;
  std::vector<Read> reads_;
  Word known_;  // the last write that was checked
};

}  // namespace srpkd::cuda::emulation
