// Mistakes made on purpose, next to the kernels and compiled like them: a run that does not report these proves nothing.
#include <cstdint>

#define EPMOE_PROBE extern "C" __attribute__((visibility("default")))

extern "C" int32_t torch_parallel_for(
    int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

// The element after the last.
EPMOE_PROBE int64_t epmoe_probe_bounds(const int64_t* values, int64_t count) { return values[count]; }

EPMOE_PROBE int64_t epmoe_probe_overflow(int64_t value) { return value + 1; }

// Every thread adds to the same sum.
EPMOE_PROBE int64_t epmoe_probe_race(int64_t count) {
  int64_t sum = 0;
  const auto add = [](int64_t begin, int64_t end, void* sum) {
    for (int64_t i = begin; i < end; ++i) {
      *static_cast<int64_t*>(sum) += i;
    }
  };
  torch_parallel_for(0, count, 1, add, &sum);
  return sum;
}
