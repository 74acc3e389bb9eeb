// Results of operators that move more than the caches hold, written past them by non-temporal (streaming) stores.
//
// An ordinary store first reads the line that it will overwrite, so a large copy moves half as much again as it must.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "checks.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace epmoe::cpu {

// Whether the rows of a result are put past the caches: those that are read and written do not fit them, and every row
// is aligned. Measured, not asked for: virtual machines tell the size of a cache that many share.
inline bool streams([[maybe_unused]] const Tensor& rows_ND, [[maybe_unused]] int64_t rows_moved) {
#if defined(__SSE2__)
  constexpr int64_t kKept = int64_t{24} << 20, kAligned = sizeof(__m128i);
  const int64_t row_bytes = rows_ND.size(1) * static_cast<int64_t>(rows_ND.element_size());
  return rows_moved * row_bytes >= kKept && row_bytes % kAligned == 0 &&
      reinterpret_cast<uintptr_t>(rows_ND.const_data_ptr()) % kAligned == 0;
#else
  return false;
#endif
}

// Copies to where nothing overlaps; past the caches if rows stream, and then to an aligned place, whole vectors of 16
// bytes. No sanitizer watches those stores, tests compare what they wrote. Call `fence` when a thread has put all its
// own.
[[gnu::always_inline]] inline void put([[maybe_unused]] bool stream, void* to, const void* from, size_t bytes) {
#if defined(__SSE2__)
  if (stream) {
    for (size_t at = 0; at < bytes; at += sizeof(__m128i)) {
      const auto value = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const char*>(from) + at));
      _mm_stream_si128(reinterpret_cast<__m128i*>(static_cast<char*>(to) + at), value);
    }
    return;
  }
#endif
  std::memcpy(to, from, bytes);
}

// Makes what a thread has put visible to the others.
inline void fence([[maybe_unused]] bool stream) {
#if defined(__SSE2__)
  if (stream) {
    _mm_sfence();
  }
#endif
}

}  // namespace epmoe::cpu
