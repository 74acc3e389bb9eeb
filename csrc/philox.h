// Philox4x32-10, bit for bit epmoe/ops/philox.py: the layout of key, counter and draw is told there.
#pragma once

#include <cstdint>

// In front of what CPU and CUDA kernels share.
#ifdef __CUDACC__
#define EPMOE_HOST_DEVICE __host__ __device__
#else
#define EPMOE_HOST_DEVICE
#endif

namespace epmoe {

constexpr int64_t kSecondExpertStream = 0;
constexpr int64_t kMaxLayer = 65536;
constexpr int64_t kMaxStream = 255;

struct PhiloxWords {
  uint32_t word[4];
};

// The words of four consecutive lanes; a draw is made of each by philox_draw.
EPMOE_HOST_DEVICE inline PhiloxWords philox_words(
    int64_t seed, int64_t stream, int64_t layer, int64_t sample, int64_t position, int64_t block) {
  uint32_t c0 = static_cast<uint32_t>(block);
  uint32_t c1 = static_cast<uint32_t>(position);
  uint32_t c2 = static_cast<uint32_t>(sample);
  uint32_t c3 = static_cast<uint32_t>((stream << 24) | (layer << 8) | ((sample >> 32) & 0xFF));
  uint32_t k0 = static_cast<uint32_t>(seed);
  uint32_t k1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product_0 = uint64_t{0xD2511F53} * c0;
    const uint64_t product_1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(product_1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product_1);
    c2 = static_cast<uint32_t>(product_0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product_0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}

// In [0, 1), a multiple of 2^-24: float32 holds it exactly.
EPMOE_HOST_DEVICE inline float philox_draw(uint32_t word) {
  return static_cast<float>(word >> 8) * 0x1p-24F;
}

}  // namespace epmoe
