// A record of who accessed each 2 bytes of global memory when, in one kernel, which detects races between threads of
// all blocks. As in shared_memory.h, an access is an error if an earlier one, one of the two a write, did not happen
// before, in whatever order the emulation executes the blocks. Additions by atomic instructions do not race with each
// other. What a kernel reads must have been written by it or by one before it.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "clock.h"

namespace srpkd::cuda::emulation {

enum class Kind { read, write, addition, update };  // update: of floats, whose order changes the sum

class GlobalMemory {
 public:
  std::string error;

  // Before a kernel, which happens after those before it.
  void start_kernel(const Participants& participants) { participants_ = participants, ++kernel_; }

  // An access by a participant of a block, which happens after all that `clock` has seen. Returns whether it is right;
  // if not, `error` says why. `given`: the memory has been written before the first kernel.
  bool access(Kind kind, const void* data, int64_t bytes, bool given, int block, int participant, const Clock& clock,
              Time now) {
    const Access own{now, block, participant};
    const auto at = reinterpret_cast<uintptr_t>(data);
    for (uintptr_t i = at / 2; i * 2 < at + bytes; ++i) {
      Cell& cell = cell_at(i);
      if (kind != Kind::write && !given && !cell.written) {
        error = "global memory read before it was written";
        return false;
      }
      if (!ordered(cell.write, own, clock)) return unordered(kind, "written", cell.write, own);
      if (kind != Kind::addition)
        for (const Access& addition : cell.additions)
          if (!ordered(addition, own, clock)) return unordered(kind, "added to", addition, own);
      if (kind != Kind::read)
        for (const Access& read : cell.reads)
          if (!ordered(read, own, clock)) return unordered(kind, "read", read, own);
      if (kind == Kind::write || kind == Kind::update) {
        cell.write = own, cell.written = true;
        cell.reads.clear(), cell.additions.clear();
      } else {
        remember(kind == Kind::read ? cell.reads : cell.additions, own);
      }
    }
    return true;
  }

 private:
  static constexpr uintptr_t PAGE = 2048;  // cells

  struct Access {
    Time time = 0;
    int block = NOBODY, participant = NOBODY;
  };
  struct Cell {
    bool written = false;  // by any kernel
    int kernel = 0;        // of the accesses
    Access write;
    std::vector<Access> reads, additions;  // since the last write, the last one by each warp
  };

  Cell& cell_at(uintptr_t index) {
    const uintptr_t number = index / PAGE;
    if (!page_ || number != page_number_) {
      auto& page = pages_[number];
      if (page.empty()) page.resize(PAGE);
      page_ = page.data(), page_number_ = number;
    }
    Cell& cell = page_[index % PAGE];
    if (cell.kernel != kernel_) {
      cell.kernel = kernel_, cell.write = {};
      cell.reads.clear(), cell.additions.clear();
    }
    return cell;
  }

  static bool ordered(const Access& earlier, const Access& own, const Clock& clock) {
    if (earlier.block == NOBODY) return true;
    if (earlier.block == own.block)
      return earlier.participant == own.participant || clock.seen(earlier.participant) >= earlier.time;
    return clock.seen(earlier.block, earlier.participant) >= earlier.time;
  }

  static void remember(std::vector<Access>& accesses, const Access& own) {
    for (Access& access : accesses)
      if (access.block == own.block && access.participant / WARP == own.participant / WARP) {
        access = own;
        return;
      }
    accesses.push_back(own);
  }

  bool unordered(Kind kind, const char* earlier, const Access& other, const Access& own) {
    const char* const done = kind == Kind::read ? "read" : kind == Kind::addition ? "added to" : "written";
    const auto name = [this](const Access& access) {
      return participants_.name(access.participant) + " of block " + std::to_string(access.block);
    };
    error = std::string("global memory ") + done + " without an order after it was " + earlier + ": by " + name(own) +
            ", before by " + name(other);
    return false;
  }

  Participants participants_{};  // of each block
  std::unordered_map<uintptr_t, std::vector<Cell>> pages_;
  Cell* page_ = nullptr;
  uintptr_t page_number_ = 0;
  int kernel_ = 0;
};

}  // namespace srpkd::cuda::emulation
