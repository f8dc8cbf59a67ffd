// What torch and csrc/cpu call of an OpenMP runtime, with threads of the C++ library: ThreadSanitizer knows in which
// order those start and end, but not those of GCC's runtime, which is not compiled with it. tests/sanitize.py loads it
// before that runtime. Nested parallel regions have one thread.
#include <thread>
#include <vector>

namespace {

thread_local int number = 0, count = 1;  // of this thread, and of the threads of its parallel region
thread_local int most = 4;               // threads of a region that this thread starts

}  // namespace

extern "C" {

void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned) {
  const int number_before = number, count_before = count, all = count > 1 ? 1 : threads ? int(threads) : most;
  std::vector<std::thread> others;
  for (int i = 1; i < all; ++i)
    others.emplace_back([=, limit = most] {
      number = i, count = all, most = limit;
      function(data);
    });
  number = 0, count = all;
  function(data);
  for (std::thread& other : others) other.join();
  number = number_before, count = count_before;
}
int omp_get_thread_num() { return number; }
int omp_get_num_threads() { return count; }
int omp_get_max_threads() { return most; }
int omp_in_parallel() { return count > 1; }
void omp_set_num_threads(int threads) { most = threads; }
}
