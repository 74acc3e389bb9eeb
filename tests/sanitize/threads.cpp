// torch_parallel_for with threads that ThreadSanitizer can see. torch's own come from OpenMP, whose barriers are in
// code that is not instrumented: there every access after a barrier looks like a race.
#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

extern "C" int32_t torch_parallel_for(
    int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
  constexpr int64_t kThreads = 4;
  const int64_t share = (end - begin + kThreads - 1) / kThreads;
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += share) {
    threads.emplace_back(body, first, std::min(first + share, end), context);
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  return 0;
}
