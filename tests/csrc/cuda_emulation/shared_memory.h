// The shared memory of an emulated block, with a record of who accessed each word when, which detects races.
//
// An access is an error if an earlier access to the same word, one of the two a write, did not happen before (see
// clock.h). This does not depend on the order in which the emulation executes the threads. An asynchronous access must
// also be separated from an ordinary write by fence_async_proxy(), a proxy fence.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "clock.h"

namespace srpkd::cuda::emulation {

// Where the hardware puts a byte with the 128-byte swizzle: bits 7 to 9 of its address change bits 4 to 6.
inline uint32_t swizzled(uint32_t address) { return address ^ address / 128 % 8 * 16; }

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
