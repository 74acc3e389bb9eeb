// Rows in vectors of 16 bytes, one per thread, and one block per row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "checks.h"
#include "launch.h"
#include "warp.cuh"

namespace epmoe::cuda {

constexpr int kMaxRowWarps = 8;
constexpr int kRowBlocks = 4;  // that share a multiprocessor: enough loads under way to fill its memory channel

template <class Scalar, int kCount>
struct alignas(sizeof(Scalar) * kCount) Pack {
  Scalar at[kCount];
};

constexpr int64_t kVectorBytes = 16;

// Whether rows of that many bytes, all from these addresses on, are made of aligned vectors.
inline bool in_vectors(int64_t row_bytes, std::initializer_list<const void*> addresses) {
  uintptr_t all = static_cast<uintptr_t>(row_bytes);
  for (const void* address : addresses) {
    all |= reinterpret_cast<uintptr_t>(address);
  }
  return all % kVectorBytes == 0;
}

// Calls body.operator()<Scalar, kCount>(vectors per row): vectors of 16 bytes when possible, else of one number.
template <class Body>
void for_vectors(ScalarType dtype, int64_t width, std::initializer_list<const void*> addresses, const Body& body) {
  for_floating(dtype, [&]<class Scalar>() {
    constexpr int kCount = static_cast<int>(kVectorBytes / sizeof(Scalar));
    if (in_vectors(width * static_cast<int64_t>(sizeof(Scalar)), addresses)) {
      body.template operator()<Scalar, kCount>(width / kCount);
    } else {
      body.template operator()<Scalar, 1>(width);
    }
  });
}

inline int64_t row_threads(int64_t vectors) {
  return std::clamp<int64_t>(ceil_div(vectors, kWarp), 1, kMaxRowWarps) * kWarp;
}

}  // namespace epmoe::cuda
