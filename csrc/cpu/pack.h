// Consecutive numbers of a row in vector registers, in the dtype of sums.
//
// Compilers keep an array that a loop adds to in memory, where every addition waits for the store of the last one. A
// vector stays in its register if the processor has one as wide; a wider one would be taken apart number by number. So
// loops over packs are compiled for each width.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "checks.h"
#include "lanes.h"
#include "stream.h"

namespace epmoe::cpu {

// Of 16-bit numbers there are twice as many, in two registers: those of even columns and those of odd ones. That is how
// bfloat16 comes apart without a shuffle; float16, which is rare on CPUs, is converted number by number.
template <class Scalar, int kBytes>
struct Pack {
  static_assert(kBytes % 16 == 0);  // as `put` wants it
  using Wide = compute_t<Scalar>;
  static constexpr int64_t kCount = kBytes / sizeof(Scalar);
  static constexpr int64_t kParts = sizeof(Wide) / sizeof(Scalar);
  static constexpr int64_t kLanes = kCount / kParts;
  using Part [[gnu::vector_size(kBytes)]] = Wide;
  using Bits [[gnu::vector_size(kBytes)]] = uint32_t;

  Part part[kParts] = {};

  [[gnu::always_inline]] void load(const Scalar* from) {
    if constexpr (std::is_same_v<Scalar, Wide>) {
      std::memcpy(&part[0], from, kBytes);
    } else if constexpr (std::is_same_v<Scalar, BFloat16>) {
      Bits pairs;
      std::memcpy(&pairs, from, kBytes);
      part[0] = reinterpret_cast<Part>(pairs << 16);
      part[1] = reinterpret_cast<Part>(pairs & 0xffff0000U);
    } else {
      Wide columns[kParts][kLanes];
#pragma omp simd
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        columns[0][lane] = static_cast<Wide>(from[2 * lane]);
        columns[1][lane] = static_cast<Wide>(from[2 * lane + 1]);
      }
      std::memcpy(part, columns, sizeof(part));
    }
  }

  // this += a * b
  [[gnu::always_inline]] void add_product(const Pack& a, const Pack& b) {
    for (int64_t p = 0; p < kParts; ++p) {
      part[p] += a.part[p] * b.part[p];
    }
  }

  [[gnu::always_inline]] void add_product(const Pack& a, Wide factor) {
    for (int64_t p = 0; p < kParts; ++p) {
      part[p] += a.part[p] * factor;
    }
  }

  [[gnu::always_inline]] void scale(Wide factor) {
    for (int64_t p = 0; p < kParts; ++p) {
      part[p] *= factor;
    }
  }

  // Rounds to nearest even.
  template <bool kStream>
  [[gnu::always_inline]] void store(Scalar* to) const {
    if constexpr (std::is_same_v<Scalar, Wide>) {
      put(kStream, to, &part[0], kBytes);
    } else if constexpr (std::is_same_v<Scalar, BFloat16>) {
      Bits even = reinterpret_cast<Bits>(part[0]), odd = reinterpret_cast<Bits>(part[1]);
      round(part[0] != part[0], even);
      round(part[1] != part[1], odd);
      const Bits pairs = even >> 16 | (odd & 0xffff0000U);
      put(kStream, to, &pairs, kBytes);
    } else {
      Wide columns[kParts][kLanes];
      std::memcpy(columns, part, sizeof(part));
      alignas(kBytes) Scalar narrow[kCount];
#pragma omp simd
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        epmoe::cpu::store(narrow[2 * lane], columns[0][lane]);
        epmoe::cpu::store(narrow[2 * lane + 1], columns[1][lane]);
      }
      put(kStream, to, narrow, kBytes);
    }
  }

  // To its place among the `kTotal` numbers of several packs, the even columns before the odd ones: the order that all
  // widths have in common.
  template <int64_t kTotal>
  [[gnu::always_inline]] void spill(Wide* to, int64_t index) const {
    for (int64_t p = 0; p < kParts; ++p) {
      std::memcpy(to + p * (kTotal / kParts) + index * kLanes, &part[p], kBytes);
    }
  }

 private:
  // The upper 16 bits become the rounded number.
  template <class Mask>
  [[gnu::always_inline]] static void round(const Mask& is_nan, Bits& bits) {
    bits += 0x7fff + (bits >> 16 & 1);
    bits = is_nan ? Bits{} + 0x7fc00000U : bits;
  }
};

}  // namespace epmoe::cpu
