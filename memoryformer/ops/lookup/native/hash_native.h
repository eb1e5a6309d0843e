// Codes and scores of the chunks of a token, for one row of each table. Start at `HashChunks`.

#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

namespace memoryformer {

constexpr int64_t kMaxCodeBits = 16;
constexpr int64_t kHashChunks = 32;  // at a time

// The signs of eight values, the first of them the high bit. Zero of either sign counts as set,
// and NaN does not.
inline uint8_t SignByte(const float* z) {
#if defined(__SSE2__)
  static constexpr uint8_t kReversed[16] = {0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15};
  const __m128 zero = _mm_setzero_ps();
  const int first = _mm_movemask_ps(_mm_cmpge_ps(_mm_loadu_ps(z), zero));
  const int second = _mm_movemask_ps(_mm_cmpge_ps(_mm_loadu_ps(z + 4), zero));
  return static_cast<uint8_t>(kReversed[first] << 4 | kReversed[second]);
#else
  int byte = 0;
  for (int i = 0; i < 8; ++i) byte = 2 * byte + (z[i] >= 0);
  return static_cast<uint8_t>(byte);
#endif
}

// codes[k] = the signs of z[k, 0:bits], the first one the high bit, for up to kHashChunks.
inline void SignCodes(const float* z, int64_t count, int64_t bits, int32_t* codes) {
  uint8_t bytes[kHashChunks * kMaxCodeBits / 8 + 4] = {};
  const int64_t size = count * bits, whole = size / 8 * 8;
  for (int64_t i = 0; i < whole; i += 8) bytes[i / 8] = SignByte(z + i);
  for (int64_t i = whole; i < size; ++i)
    bytes[i / 8] = static_cast<uint8_t>(bytes[i / 8] | (z[i] >= 0) << (7 - i % 8));
  for (int64_t k = 0; k < count; ++k) {
    const uint8_t* at = bytes + k * bits / 8;
    const uint32_t word = uint32_t{at[0]} << 24 | at[1] << 16 | at[2] << 8 | at[3];
    codes[k] = static_cast<int32_t>(word << k * bits % 8 >> (32 - bits));
  }
}

// exp(gamma * -sum_i log(factors[i])), factors of 1 + exp(-u). The product of eight is in
// the range of a double whatever they are.
inline float Confidence(const float* factors, int64_t count, float gamma) {
  if (gamma == 0) return 1;
  double product = 1, log_sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    product *= factors[i];
    if (gamma != 1 && i % 8 == 7) log_sum += std::log(product), product = 1;
  }
  if (gamma == 1) return static_cast<float>(1 / product);
  return static_cast<float>(std::exp(-double{gamma} * (log_sum + std::log(product))));
}

// The same for gamma = 1 and each of `count` chunks, in the same order.
template <int kBits>
void Confidences(const float* factors, int64_t count, int64_t bits, float* scores) {
  if (kBits != 0) bits = kBits;
  for (int64_t k = 0; k < count; ++k, factors += bits) {
    double product = 1;
    for (int64_t i = 0; i < bits; ++i) product *= factors[i];
    scores[k] = static_cast<float>(1 / product);
  }
}

// Codes and scores of up to kHashChunks; factors are those of `Confidence`. Without branches
// on the values, which nothing can foresee.
inline void HashChunks(const float* z, int64_t count, int64_t bits, const float* factors,
                       float gamma, bool power, int32_t* codes, float* scores) {
  SignCodes(z, count, bits, codes);
  if (gamma == 1 && bits == 8) {
    Confidences<8>(factors, count, bits, scores);
  } else if (gamma == 1 && bits == 10) {
    Confidences<10>(factors, count, bits, scores);
  } else if (gamma == 1) {
    Confidences<0>(factors, count, bits, scores);
  } else {
    for (int64_t k = 0; k < count; ++k)
      scores[k] = Confidence(factors + k * bits, bits, gamma);
  }
  for (int64_t k = 0; k < count && power; ++k) {
    float length = 0;
    for (int64_t i = 0; i < bits; ++i) length += std::abs(z[k * bits + i]);
    scores[k] = length * scores[k];
  }
}

}  // namespace memoryformer
