// Threads that claim the tiles of all images in order, each with a workspace of its own.
#pragma once

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <thread>
#include <vector>

#include "parallel_for.h"

namespace srpkd::cpu {

// Computes as another thread does while it exists, which decides whether numbers below the normal range become 0:
// torch.set_flush_denormal() applies to the thread that calls it.
class FloatingPointScope {
 public:
  explicit FloatingPointScope(const std::fenv_t& of_other) {
    std::fegetenv(&own_);
    std::fesetenv(&of_other);
  }
  ~FloatingPointScope() { std::fesetenv(&own_); }
  FloatingPointScope(const FloatingPointScope&) = delete;
  FloatingPointScope& operator=(const FloatingPointScope&) = delete;

 private:
  std::fenv_t own_;
};

class TileWorkers {
 public:
  TileWorkers(int64_t images, int64_t tiles_of_image) : images_(images), tiles_(tiles_of_image) {}

  // Calls process(workspace, image, tile of the image) for every tile, and adds what it returns to the losses (images,)
  // in the order of the tiles. Rethrows an exception of a thread after all have ended.
  template <class MakeWorkspace, class Process>
  void run(MakeWorkspace make_workspace, Process process, double* loss) {
    std::vector<double> losses(images_ * tiles_);
    std::atomic<int64_t> claimed{0};
    const int64_t workers = std::min<int64_t>(at::get_num_threads(), images_ * tiles_);
    std::vector<decltype(make_workspace())> workspaces;
    for (int64_t worker = 0; worker < workers; ++worker) workspaces.push_back(make_workspace());
    std::fenv_t environment;
    std::fegetenv(&environment);
    parallel_for(0, workers, 1, [&](int64_t worker, int64_t) {
      const FloatingPointScope as_caller(environment);  // or results depend on which thread claims a tile
      try {
        for (int64_t claim; !failed_ && (claim = claimed++) < images_ * tiles_;) {
          const int64_t image = claim % images_, tile = claim / images_;  // alternates between images: fewer waits
          losses[image * tiles_ + tile] = process(workspaces[worker], image, tile);
        }
      } catch (...) {
        failed_ = true;  // or other threads would wait forever for this thread's tile
        throw;
      }
    });
    for (int64_t image = 0; image < images_; ++image)
      for (int64_t tile = 0; tile < tiles_; ++tile) loss[image] += losses[image * tiles_ + tile];
  }

  // Waits until a counter has reached a value. Returns false if another thread has failed: then it may never do so.
  bool wait_for(const std::atomic<int64_t>& counter, int64_t value) const {
    while (counter.load(std::memory_order_acquire) != value && !failed_) std::this_thread::yield();
    return !failed_;
  }

 private:
  const int64_t images_, tiles_;
  std::atomic<bool> failed_{false};
};

}  // namespace srpkd::cpu
