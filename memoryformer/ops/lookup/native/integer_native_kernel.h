// Integer inner loops, compiled for one instruction set per inclusion: a part of
// lookup_native_kernel.h, inside its namespace. No include guard, for that reason.
//
// A tile is kTileRows = 16 rows of a matrix, four columns after four: byte 4 r + i of 64
// bytes is column 4 q + i of row r, plus 128; of 4-bit weights, plus 8, column 8 q + i is
// the low half of that byte and 8 q + 4 + i the high one. So a register holds 16 rows and
// no sum runs across lanes. Every sum is exact, and the same in all variants:
// |sum| <= 127 * 127 * kMaxIntegerWidth < 2^31.

#if SIMD_LANES == 16
#define INTEGER_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")))
#else
#define INTEGER_TARGET SIMD_TARGET
#endif

// sums[t * 16 + r] = sum_j weight[r][j] x[t * stride + j], for kTokens vectors of
// `columns` values (a multiple of 4, of 8 for 4 bits); totals[t] = sum_j x[t * stride + j].
template <int kTokens, bool kFourBits>
INTEGER_TARGET void IntegerSums(const uint8_t* tile, int64_t columns, const int8_t* x,
                                int64_t stride, const int32_t* totals, int32_t* sums) {
  constexpr int64_t kColumns = kFourBits ? 8 : 4;  // of 64 bytes
#if SIMD_LANES == 16
  // Unsigned weights times signed x, four products a lane, without saturation. Their offset
  // is taken off at the start. A product waits for the one before: two chains where few.
  constexpr int kChains = kTokens >= 4 ? 1 : 2;
  __m512i sum[kTokens][2];
  for (int t = 0; t < kTokens; ++t) {
    sum[t][0] = _mm512_set1_epi32(-(kFourBits ? 8 : 128) * totals[t]);
    sum[t][1] = _mm512_setzero_si512();
  }
  const auto four = [](const int8_t* p) INTEGER_TARGET {
    int32_t bits;
    std::memcpy(&bits, p, sizeof(bits));
    return _mm512_set1_epi32(bits);
  };
  const auto add = [&](int chain, __m512i weights, const int8_t* at) INTEGER_TARGET {
    for (int t = 0; t < kTokens; ++t)
      sum[t][chain] =
          _mm512_dpbusd_epi32(sum[t][chain], weights, four(at + t * stride));
  };
  int64_t j = 0;
  for (; j + 2 * kColumns <= columns; j += 2 * kColumns, tile += 128)
    for (int h = 0; h < 2; ++h) {
      const __m512i both = _mm512_loadu_si512(tile + 64 * h);
      const int8_t* at = x + j + h * kColumns;
      if constexpr (kFourBits) {
        const __m512i mask = _mm512_set1_epi8(15);
        add(0, _mm512_and_si512(both, mask), at);
        add(kChains - 1, _mm512_and_si512(_mm512_srli_epi16(both, 4), mask), at + 4);
      } else {
        add(h % kChains, both, at);
      }
    }
  if (j < columns) {
    const __m512i both = _mm512_loadu_si512(tile);
    if constexpr (kFourBits) {
      const __m512i mask = _mm512_set1_epi8(15);
      add(0, _mm512_and_si512(both, mask), x + j);
      add(0, _mm512_and_si512(_mm512_srli_epi16(both, 4), mask), x + j + 4);
    } else {
      add(0, both, x + j);
    }
  }
  for (int t = 0; t < kTokens; ++t)
    _mm512_storeu_si512(sums + t * kTileRows, _mm512_add_epi32(sum[t][0], sum[t][1]));
#elif SIMD_LANES == 8
  // Two products are added in 16 bits, which saturate at 32767: |w| |x| of 8 bits make at
  // most 2 * 127 * 127 = 32258, four of 4 bits at most 4 * 15 * 127 = 7620.
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i sum[kTokens][2];
  for (int t = 0; t < kTokens; ++t)
    sum[t][0] = sum[t][1] = _mm256_set1_epi32(kFourBits ? -8 * totals[t] : 0);
  const auto four = [](const int8_t* p) INTEGER_TARGET {
    int32_t bits;
    std::memcpy(&bits, p, sizeof(bits));
    return _mm256_set1_epi32(bits);
  };
  for (int64_t j = 0; j < columns; j += kColumns, tile += 64)
    for (int h = 0; h < 2; ++h) {
      const __m256i raw =
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + 32 * h));
      const __m256i low = kFourBits ? _mm256_and_si256(raw, _mm256_set1_epi8(15))
                                    : _mm256_xor_si256(raw, _mm256_set1_epi8(-128));
      const __m256i high = kFourBits ? _mm256_and_si256(_mm256_srli_epi16(raw, 4),
                                                        _mm256_set1_epi8(15))
                                     : _mm256_abs_epi8(low);
      for (int t = 0; t < kTokens; ++t) {
        const int8_t* at = x + t * stride + j;
        const __m256i pairs =
            kFourBits ? _mm256_add_epi16(_mm256_maddubs_epi16(low, four(at)),
                                         _mm256_maddubs_epi16(high, four(at + 4)))
                      : _mm256_maddubs_epi16(high, _mm256_sign_epi8(four(at), low));
        sum[t][h] = _mm256_add_epi32(sum[t][h], _mm256_madd_epi16(pairs, ones));
      }
    }
  for (int t = 0; t < kTokens; ++t)
    for (int h = 0; h < 2; ++h)
      _mm256_storeu_si256(
          reinterpret_cast<__m256i*>(sums + t * kTileRows + kTileRows / 2 * h),
          sum[t][h]);
#else
  for (int t = 0; t < kTokens; ++t)
    for (int r = 0; r < kTileRows; ++r) {
      int32_t sum = 0;
      for (int64_t j = 0; j < columns; j += kColumns) {
        const uint8_t* bytes = tile + j / kColumns * 64 + 4 * r;
        const int8_t* at = x + t * stride + j;
        for (int i = 0; i < 4; ++i)
          if constexpr (kFourBits)
            sum += ((bytes[i] & 15) - 8) * at[i] + ((bytes[i] >> 4) - 8) * at[4 + i];
          else
            sum += (bytes[i] - 128) * at[i];
      }
      sums[t * kTileRows + r] = sum;
    }
#endif
}

// The same for any number of vectors, as many at a time as there are registers for.
template <bool kFourBits>
void ManySums(const uint8_t* tile, int64_t columns, const int8_t* x, int64_t stride,
              const int32_t* totals, int64_t tokens, int32_t* sums) {
  int64_t t = 0;
  const auto take = [&](auto count) {
    constexpr int kTokens = decltype(count)::value;
    for (; t + kTokens <= tokens; t += kTokens)
      IntegerSums<kTokens, kFourBits>(tile, columns, x + t * stride, stride, totals + t,
                                      sums + t * kTileRows);
  };
  if constexpr (SIMD_LANES == 16) {
    take(std::integral_constant<int, 16>());
    take(std::integral_constant<int, 8>());
  }
  take(std::integral_constant<int, 4>());
  take(std::integral_constant<int, 1>());
}

// total[r] = a[r] * b[r] + total[r], rounded once: the same in every variant.
SIMD_TARGET inline void AddScaled(const int32_t* a, const float* b, float* total) {
  for (int r = 0; r < kTileRows; r += kLanes) {
#if SIMD_LANES == 16
    const __m512 wide = _mm512_cvtepi32_ps(_mm512_loadu_si512(a + r));
    Store(total + r, (Vec)_mm512_fmadd_ps(wide, (__m512)Load(b + r),
                                          (__m512)Load(total + r)));
#elif SIMD_LANES == 8
    const __m256 wide = _mm256_cvtepi32_ps(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + r)));
    Store(total + r, (Vec)_mm256_fmadd_ps(wide, (__m256)Load(b + r),
                                          (__m256)Load(total + r)));
#else
    for (int l = r; l < r + kLanes; ++l)
      total[l] = std::fma(static_cast<float>(a[l]), b[l], total[l]);
#endif
  }
}

// total[r] += a[r] * factor; rounding is the caller's to bound.
SIMD_TARGET inline void AddTimes(const int32_t* a, float factor, float* total) {
  typedef int32_t AnyIntVec
      __attribute__((vector_size(4 * SIMD_LANES), aligned(4), may_alias));
  for (int r = 0; r < kTileRows; r += kLanes) {
    const IntVec values = *reinterpret_cast<const AnyIntVec*>(a + r);
    Store(total + r, Load(total + r) + factor * __builtin_convertvector(values, Vec));
  }
}

// out[r] = scale[r] * value[r] + a[r] * x + b[r] * y + c.
SIMD_TARGET inline void Combine(const float* scale, const float* value, const float* a,
                                float x, const float* b, float y, float c, float* out) {
  for (int r = 0; r < kTileRows; r += kLanes)
    Store(out + r, Load(scale + r) * Load(value + r) + x * Load(a + r) +
                       (y * Load(b + r) + c));
}

inline IntegerKernels MakeIntegerKernels() {
  return {ManySums<false>, ManySums<true>, AddScaled, AddTimes, Combine};
}

#undef INTEGER_TARGET
