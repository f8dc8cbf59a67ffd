// Loops on torch's threads, for any compiler.
//
// at::parallel_for() uses several threads only in code that is compiled for OpenMP. The code of clang then needs the
// runtime library of LLVM, a second one beside that of torch. Here the threads are those of the function that GCC's
// code calls. Every OpenMP runtime exports it on Linux. Weak: elsewhere, one thread computes the loop.
#pragma once

#include <ATen/Parallel.h>
#include <c10/util/ParallelGuard.h>

#include <algorithm>
#include <atomic>
#include <exception>

#include "../common/index.h"

extern "C" {
__attribute__((weak)) void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags);
#if !defined(_OPENMP)  // else omp.h declares them
__attribute__((weak)) int omp_get_num_threads();
__attribute__((weak)) int omp_get_thread_num();
#endif
}

namespace srpkd::cpu {

// Calls f(first, last) for parts of [begin, end) of `grain` elements or more, as at::parallel_for() does. Rethrows an
// exception of a thread after all have ended.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (begin >= end) return;
  const int64_t most = ceil_div(end - begin, std::max<int64_t>(grain, 1));
  at::internal::lazy_init_num_threads();
  if (most == 1 || GOMP_parallel == nullptr || at::in_parallel_region() || at::get_num_threads() == 1) {
    const c10::ParallelGuard guard(true);
    return f(begin, end);
  }
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  std::exception_ptr error;
  auto work = [&] {
    const int64_t part = ceil_div(end - begin, std::min<int64_t>(omp_get_num_threads(), most));
    const int64_t first = begin + omp_get_thread_num() * part;
    if (first >= end) return;
    try {
      const c10::ParallelGuard guard(true);
      f(first, std::min(first + part, end));
    } catch (...) {
      if (!failed.test_and_set()) error = std::current_exception();
    }
  };
  // all threads: GCC's runtime ends and starts threads where their number changes
  GOMP_parallel([](void* data) { (*static_cast<decltype(work)*>(data))(); }, &work, 0, 0);
  if (error) std::rethrow_exception(error);
}

}  // namespace srpkd::cpu
