// Integer inner loops, compiled for one instruction set per inclusion: a part of
// lookup_native_kernel.h, inside its namespace. No include guard, for that reason.
//
// A tile is kTileRows = 16 rows of a matrix, four columns after four. Byte 4 r + i of 64
// bytes is column i of row r, plus 128. Of weights of 4 or 2 bits a byte holds as many as fit,
// the lowest bits column i, those above columns 4 + i and so on: a 4-bit weight plus 8; of 2
// bits h, the weight is 2 h - 3. So a register holds 16 rows and no sum runs across lanes. Every
// sum is exact, and the same in all variants: |sum| <= 127 * 127 * kMaxIntegerWidth < 2^31.

#if SIMD_LANES == 16
#define INTEGER_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")))
#else
#define INTEGER_TARGET SIMD_TARGET
#endif

constexpr int kTileVectors = kTileRows / kLanes;

// sum[t] = sum_j weight[r][j] x[t * stride + j] for 16 rows r, of `columns` values (a
// multiple of 32 / kBits); totals[t] = sum_j x[t * stride + j].
template <int kTokens, int kBits>
INTEGER_TARGET inline __attribute__((always_inline)) void SumTile(
    const uint8_t* tile, int64_t columns, const int8_t* x, int64_t stride,
    [[maybe_unused]] const int32_t* totals, IntVec (*result)[kTileVectors]) {
  constexpr int kParts = 8 / kBits, kColumns = 4 * kParts;  // of 64 bytes
#if SIMD_LANES == 16
  // Unsigned weights times signed x, four products a lane, without saturation. Their offset
  // is taken off at the end. A product waits for the one before: two chains where few.
  constexpr int kChains = kTokens >= 4 ? 1 : 2;
  const __m512i mask = _mm512_set1_epi8((1 << kBits % 8) - 1);
  __m512i sum[kTokens][2];
  for (int t = 0; t < kTokens; ++t) sum[t][0] = sum[t][1] = _mm512_setzero_si512();
  for (int64_t j = 0; j < columns; j += kColumns, tile += 64) {
    const __m512i all = _mm512_loadu_si512(tile);
#pragma GCC unroll 4
    for (int m = 0; m < kParts; ++m) {
      const __m512i weights =
          kParts == 1 ? all : _mm512_and_si512(_mm512_srli_epi16(all, m * kBits), mask);
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) {
        int32_t four;
        std::memcpy(&four, x + t * stride + j + 4 * m, sizeof(four));
        sum[t][m % kChains] =
            _mm512_dpbusd_epi32(sum[t][m % kChains], weights, _mm512_set1_epi32(four));
      }
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    __m512i total = _mm512_add_epi32(sum[t][0], sum[t][1]);
    if (kBits == 2) total = _mm512_add_epi32(total, total);
    const int offset = kBits == 8 ? 128 : kBits == 4 ? 8 : 3;
    result[t][0] =
        (IntVec)_mm512_sub_epi32(total, _mm512_set1_epi32(offset * totals[t]));
  }
#elif SIMD_LANES == 8
  // Two products are added in 16 bits, which saturate at 32767: |w| |x| of 8 bits make at
  // most 2 * 127 * 127 = 32258, four of 4 bits at most 4 * 15 * 127 = 7620, eight of 2 bits
  // 8 * 3 * 127 = 3048.
  const __m256i ones = _mm256_set1_epi16(1), mask = _mm256_set1_epi8((1 << kBits % 8) - 1);
  __m256i sum[kTokens][2];
  for (int t = 0; t < kTokens; ++t) sum[t][0] = sum[t][1] = _mm256_setzero_si256();
  for (int64_t j = 0; j < columns; j += kColumns, tile += 64)
    for (int h = 0; h < 2; ++h) {
      const __m256i all =
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + 32 * h));
      const __m256i weights = _mm256_xor_si256(all, _mm256_set1_epi8(-128));
      for (int t = 0; t < kTokens; ++t) {
        __m256i pairs = _mm256_setzero_si256();
        for (int m = 0; m < kParts; ++m) {
          int32_t bits;
          std::memcpy(&bits, x + t * stride + j + 4 * m, sizeof(bits));
          const __m256i four = _mm256_set1_epi32(bits);
          if constexpr (kBits == 8) {
            pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights),
                                         _mm256_sign_epi8(four, weights));
          } else {
            const __m256i part =
                _mm256_and_si256(_mm256_srli_epi16(all, m * kBits), mask);
            pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(part, four));
          }
        }
        sum[t][h] = _mm256_add_epi32(sum[t][h], _mm256_madd_epi16(pairs, ones));
      }
    }
  for (int t = 0; t < kTokens; ++t)
    for (int h = 0; h < 2; ++h) {
      __m256i total = sum[t][h];
      if (kBits == 2) total = _mm256_add_epi32(total, total);
      const int offset = kBits == 8 ? 0 : kBits == 4 ? 8 : 3;
      result[t][h] =
          (IntVec)_mm256_sub_epi32(total, _mm256_set1_epi32(offset * totals[t]));
    }
#else
  for (int t = 0; t < kTokens; ++t)
    for (int r = 0; r < kTileRows; ++r) {
      int32_t sum = 0;
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t q = j / kColumns, m = j % kColumns / 4;
        const int bits = tile[64 * q + 4 * r + j % 4] >> (m * kBits) & ((1 << kBits) - 1);
        const int weight = kBits == 2 ? 2 * bits - 3 : bits - (1 << (kBits - 1));
        sum += weight * x[t * stride + j];
      }
      result[t][r / kLanes][r % kLanes] = sum;
    }
#endif
}

// total + a * b, rounded once: the same in every variant.
SIMD_TARGET inline Vec Fused(Vec a, Vec b, Vec total) {
#if SIMD_LANES == 16
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)total);
#elif SIMD_LANES == 8
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)total);
#else
  for (int l = 0; l < kLanes; ++l) total[l] = std::fma(a[l], b[l], total[l]);
  return total;
#endif
}

// out[t * 16 + r] = sum_g scale_g sum_{j in group g} weight[r][j] x[t * stride + j], groups
// of `group` columns in order. scales are [groups, 16] of rows if kOfRows, else [groups,
// all_tokens] of vectors, as totals are.
template <int kTokens, int kBits, bool kOfRows>
INTEGER_TARGET void GroupSums(const uint8_t* tile, int64_t columns, int64_t group,
                              const int8_t* x, int64_t stride, const int32_t* totals,
                              const float* scales, int64_t all_tokens, float* out) {
  std::fill_n(out, kTokens * kTileRows, 0.0f);
  for (int64_t begin = 0; begin < columns; begin += group) {
    const int64_t count = std::min(group, columns - begin);
    IntVec integers[kTokens][kTileVectors];
    SumTile<kTokens, kBits>(tile, count, x + begin, stride, totals, integers);
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t)
      for (int h = 0; h < kTileVectors; ++h) {  // in memory: integers fill the registers
        const Vec scale = kOfRows ? Load(scales + h * kLanes) : Vec{} + scales[t];
        float* sum = out + t * kTileRows + h * kLanes;
        Store(sum, Fused(__builtin_convertvector(integers[t][h], Vec), scale, Load(sum)));
      }
    tile += kTileRows * count * kBits / 8;
    totals += all_tokens, scales += kOfRows ? kTileRows : all_tokens;
  }
}

// The same for any number of vectors, as many at a time as there are registers for.
template <int kBits, bool kOfRows>
void ManySums(const uint8_t* tile, int64_t columns, int64_t group, const int8_t* x,
              int64_t stride, const int32_t* totals, const float* scales, int64_t tokens,
              int64_t all_tokens, float* out) {
  int64_t t = 0;
  const auto take = [&](auto count) {
    constexpr int kTokens = decltype(count)::value;
    for (; t + kTokens <= tokens; t += kTokens)
      GroupSums<kTokens, kBits, kOfRows>(tile, columns, group, x + t * stride, stride,
                                         totals + t, kOfRows ? scales : scales + t,
                                         all_tokens, out + t * kTileRows);
  };
  if constexpr (SIMD_LANES == 16) {
    take(std::integral_constant<int, 16>());
    take(std::integral_constant<int, 8>());
  }
  take(std::integral_constant<int, 4>());
  take(std::integral_constant<int, 1>());
}

// out[r] = scale[r] * value[r] + a[r] * x + b[r] * y + c.
SIMD_TARGET inline void Combine(const float* scale, const float* value, const float* a,
                                float x, const float* b, float y, float c, float* out) {
  for (int r = 0; r < kTileRows; r += kLanes)
    Store(out + r, Load(scale + r) * Load(value + r) + x * Load(a + r) +
                       (y * Load(b + r) + c));
}

inline IntegerKernels MakeIntegerKernels() {
  return {ManySums<8, true>, ManySums<4, true>, ManySums<8, false>, ManySums<2, false>,
          Combine};
}

#undef INTEGER_TARGET
