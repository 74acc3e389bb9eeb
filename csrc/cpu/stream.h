// Results that are too large for the caches, written past them by non-temporal (streaming) stores.
//
// An ordinary store first reads the line that it will overwrite, so a large copy moves half as much again as it must.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace epmoe::cpu {

// Whether a result of so many bytes will have left the caches before anybody reads it. Measured, not asked for: virtual
// machines tell the size of a cache that many share.
inline bool streams([[maybe_unused]] int64_t bytes) {
  [[maybe_unused]] constexpr int64_t kKept = int64_t{16} << 20;
#if defined(__SSE2__)
  return bytes >= kKept;
#else
  return false;
#endif
}

// Copies past the caches to where nothing overlaps, if the place is aligned for it. No sanitizer watches those stores,
// tests compare what they wrote. Call `fence` when a thread has put all of its own.
[[gnu::always_inline]] inline void put(void* to, const void* from, size_t bytes) {
#if defined(__SSE2__)
  constexpr size_t kVector = sizeof(__m128i);
  auto* target = static_cast<char*>(to);
  const auto* source = static_cast<const char*>(from);
  if ((reinterpret_cast<uintptr_t>(target) | bytes) % kVector == 0) {
    for (size_t at = 0; at < bytes; at += kVector) {
      const __m128i value = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + at));
      _mm_stream_si128(reinterpret_cast<__m128i*>(target + at), value);
    }
    return;
  }
#endif
  std::memcpy(to, from, bytes);
}

// Where a block of a result is computed: in its place, or beside it to be put past the caches.
template <bool kStream, class Scalar, int64_t kSize>
struct Block {
  Scalar* at;

  explicit Block(Scalar* place) : at(place) {}
  void write(int64_t) {}
};

template <class Scalar, int64_t kSize>
struct Block<true, Scalar, kSize> {
  alignas(64) Scalar at[kSize];
  Scalar* place;

  explicit Block(Scalar* to) : place(to) {}
  [[gnu::always_inline]] void write(int64_t count) {
    put(place, at, static_cast<size_t>(count) * sizeof(Scalar));
  }
};

// Makes what a thread has put visible to the others.
inline void fence([[maybe_unused]] bool stream) {
#if defined(__SSE2__)
  if (stream) {
    _mm_sfence();
  }
#endif
}

}  // namespace epmoe::cpu
