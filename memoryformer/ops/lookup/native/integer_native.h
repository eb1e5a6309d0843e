// Products of integers: weights of 8 or 4 bits times activations rounded to 8. Exact sums
// of integers, so that every instruction set gives the same bits. Start at
// `IntegerProduct`; the inner loops are in integer_native_kernel.h.

#pragma once

#include "decode_native.h"

namespace memoryformer {

// Rounds x[0:count] to integers in [-127, 127] times a scale, which it returns:
// scale = max |x| / 127, q = round(x / scale) with ties to even. Zeros have the scale 0; what
// is not finite gives the scale NaN and zeros.
inline float RoundVector(const float* x, int64_t count, int8_t* q) {
  float largest = 0;
  bool finite = true;
  for (int64_t j = 0; j < count; ++j) {
    largest = std::max(largest, std::abs(x[j]));
    finite = finite && std::isfinite(x[j]);
  }
  const float scale = largest / 127.0f;
  if (!finite || scale == 0) {
    std::fill_n(q, count, int8_t{0});
    return finite ? 0.0f : NAN;
  }
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  for (int64_t j = 0; j < count; ++j) {
    const float whole = (x[j] / scale + kRound) - kRound;
    q[j] = static_cast<int8_t>(std::min(127.0f, std::max(-127.0f, whole)));
  }
  return scale;
}

inline int32_t Total(const int8_t* q, int64_t count) {
  int32_t total = 0;
  for (int64_t j = 0; j < count; ++j) total += q[j];
  return total;
}

struct IntegerMatrix {
  int64_t rows, width;     // V, D; D a multiple of 4, of 64 for 4 bits
  bool four_bits;
  const uint8_t* tiles;    // [V / 16, D / 4, 16, 4], or [V / 16, D / 8, 16, 4]
  const float* scales;     // [V / 16, 16], or [V / 16, D / 64, 16]
};

// y[n, v] = s_n (s_v sum_d q[n, d] w[v, d]), or with a scale for each 64 columns of 4-bit
// weights, summed over them in order. Each step of float32 is one rounding.
template <class Pool>
void IntegerProduct(const IntegerMatrix& matrix, const float* x, int64_t N, float* y,
                    Pool& pool) {
  const int64_t V = matrix.rows, D = matrix.width;
  if (N == 0 || V == 0) return;
  if (D > kMaxIntegerWidth) throw std::invalid_argument("sums of more than 2^17 products");
  const int64_t group = matrix.four_bits ? kInt4Group : D;
  const int64_t groups = D == 0 ? 0 : D / group;
  const Scratch rounded_memory(N * D), scales_memory(N * sizeof(float));
  const Scratch totals_memory(groups * N * sizeof(int32_t));
  auto* rounded = rounded_memory.As<int8_t>();
  auto* x_scales = scales_memory.As<float>();
  auto* totals = totals_memory.As<int32_t>();  // [groups, N]
  for (int64_t n = 0; n < N; ++n) {
    x_scales[n] = RoundVector(x + n * D, D, rounded + n * D);
    for (int64_t g = 0; g < groups; ++g)
      totals[g * N + n] = Total(rounded + n * D + g * group, group);
  }
  const IntegerKernels kernels = ChooseIntegerKernels();
  const auto sums_of = matrix.four_bits ? kernels.four_bits : kernels.eight_bits;
  const int64_t tile_bytes = kTileRows * D / (matrix.four_bits ? 2 : 1);
  const int64_t tiles = CeilDivide(V, kTileRows);
  const int64_t per_item = std::max<int64_t>(1, (128 << 10) / (kTileRows * D + 1));
  constexpr int64_t kTokens = 16;  // at a time
  ParallelFor(pool, AvailableThreads(), CeilDivide(tiles, per_item), [&](int64_t item) {
    float sums[kTokens * kTileRows];
    for (int64_t tile = item * per_item;
         tile < std::min(tiles, (item + 1) * per_item); ++tile) {
      const int64_t count = std::min<int64_t>(kTileRows, V - tile * kTileRows);
      for (int64_t n0 = 0; n0 < N; n0 += kTokens) {
        const int64_t tokens = std::min(kTokens, N - n0);
        sums_of(matrix.tiles + tile * tile_bytes, D, group, rounded + n0 * D, D, totals + n0,
                matrix.scales + tile * groups * kTileRows, tokens, N, sums);
        for (int64_t t = 0; t < tokens; ++t)
          for (int64_t r = 0; r < count; ++r)
            y[(n0 + t) * V + tile * kTileRows + r] =
                sums[t * kTileRows + r] * x_scales[n0 + t];
      }
    }
  });
}

}  // namespace memoryformer
