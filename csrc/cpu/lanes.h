// Sums in a fixed number of partial ones: they vectorise, and give the same bits whatever the width of the vectors. And
// how many rows are worth a thread.
#pragma once

#include <cstdint>

// Compiles a function for several x86-64 generations; the loader picks one. The default must run anywhere. Flags that
// name a processor are taken at their word. Sanitizers, who would have to be there before the loader, see one version.
//
// EPMOE_VECTOR_WIDTHS does so for functions that want to know the width: DEFINE(attribute, bytes, ...) defines the one
// for vector registers of so many bytes.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__AVX__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define EPMOE_VECTOR_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#define EPMOE_VECTOR_WIDTHS(DEFINE, ...)                                           \
  DEFINE(__attribute__((target("default"))), 16 __VA_OPT__(, ) __VA_ARGS__)        \
  DEFINE(__attribute__((target("arch=x86-64-v3"))), 32 __VA_OPT__(, ) __VA_ARGS__) \
  DEFINE(__attribute__((target("arch=x86-64-v4"))), 64 __VA_OPT__(, ) __VA_ARGS__)
#else
#define EPMOE_VECTOR_CLONES
#if !defined(EPMOE_VECTOR_BYTES)
#if defined(__AVX512F__)
#define EPMOE_VECTOR_BYTES 64
#elif defined(__AVX__)
#define EPMOE_VECTOR_BYTES 32
#else
#define EPMOE_VECTOR_BYTES 16
#endif
#endif
#define EPMOE_VECTOR_WIDTHS(DEFINE, ...) DEFINE(, EPMOE_VECTOR_BYTES __VA_OPT__(, ) __VA_ARGS__)
#endif

namespace epmoe::cpu {

// Rows per task of parallel_for: enough work that waking a thread pays.
inline int64_t grain(int64_t elements_per_row) {
  constexpr int64_t kElementsPerTask = 16384;
  return kElementsPerTask / (elements_per_row + 1) + 1;
}

constexpr int64_t kRowLanes = 32;    // for rows of the model's width
constexpr int64_t kRouterLanes = 8;  // for one number per expert

template <class Scalar, int64_t kLanes>
struct Lanes {
  Scalar partial[kLanes] = {};

  Scalar total() {
#pragma GCC unroll 8  // else the partial sums would go through memory
    for (int64_t half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 16
      for (int64_t lane = 0; lane < half; ++lane) {
        partial[lane] += partial[lane + half];
      }
    }
    return partial[0];
  }
};

// Calls body(index, lane) for every index below count; index % kLanes == lane.
template <int64_t kLanes, class Body>
[[gnu::always_inline]] inline void for_lanes(int64_t count, const Body& body) {
  const int64_t whole = count - count % kLanes;
  for (int64_t base = 0; base < whole; base += kLanes) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      body(base + lane, lane);
    }
  }
  for (int64_t index = whole; index < count; ++index) {
    body(index, index - whole);
  }
}

// to = value, rounded. For 16-bit types by their bits: compilers do not vectorise the copy of a class.
template <class Scalar, class Wide>
[[gnu::always_inline]] inline void store(Scalar& to, Wide value) {
  if constexpr (sizeof(Scalar) == 2) {
    to.x = Scalar(value).x;
  } else {
    to = value;
  }
}

}  // namespace epmoe::cpu
