// Inner loops of decoding, compiled for one instruction set per inclusion: this is a part
// of lookup_native_kernel.h, inside its namespace. No include guard, for that reason.

// exp(u); relative error below 2e-7 for |u| <= 87, beyond which u is cut off; NaN for NaN.
SIMD_TARGET inline Vec ExpOf(Vec u) {
  u = u < -87.0f ? Vec{} - 87.0f : u;  // comparisons are false for NaN, which stays
  u = u > 87.0f ? Vec{} + 87.0f : u;
  // exp(u) = 2^n exp(r), |r| <= ln 2 / 2: ln 2 in two parts, then the series to r^7.
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = u * 1.44269504f + kRound;
  const Vec n = shifted - kRound;
  const Vec r = (u - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec series = Vec{} + 1.0f / 5040;
  series = series * r + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  series = series * r + 1.0f;
  series = series * r + 1.0f;
  const Vec power = (Vec)(((IntVec)shifted - 0x4b400000 + 127) << 23);
  return series * power;
}

// out[i] = 1 + exp(-beta |x[i]|).
SIMD_TARGET inline Vec OnePlusExpOf(Vec x, float beta) {
  const Vec magnitude = (Vec)((WordVec)x & 0x7fffffffu);
  return 1.0f + ExpOf(-beta * magnitude);
}

SIMD_TARGET inline void OnePlusExp(const float* x, int64_t count, float beta,
                                   float* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) Store(out + i, OnePlusExpOf(Load(x + i), beta));
  if (i == count) return;
  float last[kLanes] = {};
  std::memcpy(last, x + i, (count - i) * sizeof(float));
  Store(last, OnePlusExpOf(Load(last), beta));
  std::memcpy(out + i, last, (count - i) * sizeof(float));
}

// Halves are added to halves, in registers: this is a tenth of the time of bfloat16 rows.
SIMD_TARGET inline float LaneSum(Vec v) {
#if SIMD_LANES >= 8
#if SIMD_LANES == 16
  const __m512d whole = _mm512_castps_pd((__m512)v);
  const __m256 eight = _mm256_castpd_ps(_mm512_castpd512_pd256(whole)) +
                       _mm256_castpd_ps(_mm512_extractf64x4_pd(whole, 1));
#else
  const __m256 eight = (__m256)v;
#endif
  const __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
  const __m128 two = four + _mm_movehl_ps(four, four);
  return two[0] + two[1];
#else
  float part[kLanes];
  Store(part, v);
  for (int half = kLanes / 2; half >= 1; half /= 2)
    for (int l = 0; l < half; ++l) part[l] += part[l + half];
  return part[0];
#endif
}

// Compilers would load it again for each use, which costs more than the use.
SIMD_TARGET inline Vec InRegister(Vec v) {
#if SIMD_LANES > 4
  __asm__("" : "+v"(v));
#endif
  return v;
}

// Lane l is `LaneSum(v[l])`, bit for bit: the same halves are added, those of several at once.
SIMD_TARGET inline Vec LaneSums(const Vec* v) {
#if SIMD_LANES == 16
  __m512 eight[8], four[4], two[2];
  // Taken in the order 0, 4, 8, 12, 1, 5, .., so that sums end in the order of v.
  for (int i = 0; i < 8; ++i) {
    const auto a = (__m512)v[(2 * i & 3) * 4 + (i >> 1)];
    const auto b = (__m512)v[(2 * i + 1 & 3) * 4 + (i >> 1)];
    eight[i] = _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512 a = eight[2 * i], b = eight[2 * i + 1];
    four[i] = _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
  }
  for (int i = 0; i < 2; ++i) {
    const auto a = (__m512d)four[2 * i], b = (__m512d)four[2 * i + 1];
    two[i] = (__m512)_mm512_unpacklo_pd(a, b) + (__m512)_mm512_unpackhi_pd(a, b);
  }
  return (Vec)(_mm512_shuffle_ps(two[0], two[1], 0x88) +
               _mm512_shuffle_ps(two[0], two[1], 0xdd));
#elif SIMD_LANES == 8
  __m256 four[4], two[2];
  for (int i = 0; i < 4; ++i) {
    const auto a = (__m256)v[i], b = (__m256)v[4 + i];
    four[i] = _mm256_permute2f128_ps(a, b, 0x20) + _mm256_permute2f128_ps(a, b, 0x31);
  }
  for (int i = 0; i < 2; ++i) {
    const auto a = (__m256d)four[2 * i], b = (__m256d)four[2 * i + 1];
    two[i] = (__m256)_mm256_unpacklo_pd(a, b) + (__m256)_mm256_unpackhi_pd(a, b);
  }
  return (Vec)(_mm256_shuffle_ps(two[0], two[1], 0x88) +
               _mm256_shuffle_ps(two[0], two[1], 0xdd));
#else
  Vec sums;
  for (int l = 0; l < kLanes; ++l) sums[l] = LaneSum(v[l]);
  return sums;
#endif
}

// p[0:kCount], again and again.
template <int kCount>
SIMD_TARGET inline Vec Repeated(const float* p) {
  if constexpr (kCount == kLanes) return Load(p);
#if SIMD_LANES == 16
  return (Vec)_mm512_broadcast_f32x4(_mm_loadu_ps(p));
#elif SIMD_LANES == 8
  double two;
  std::memcpy(&two, p, sizeof(two));
  return (Vec)_mm256_set1_pd(two);
#else
  return Vec{} + *p;
#endif
}

// total + row[d:width] . x[d:width]: one function, so that it has the same bits for all.
template <class T>
SIMD_TARGET __attribute__((noinline)) float AddRest(float total, const T* row, const float* x,
                                                    int64_t d, int64_t width) {
  for (int64_t f = d; f < width; ++f) total += ToFloat(row[f]) * x[f];
  return total;
}

// kRows rows of a matrix times the vectors x[0:kTokens], kRows kTokens = kLanes, or one row times
// one or four: y[t * stride + i] for t < tokens. All are summed in one order: even and odd vectors
// of columns apart. Four vectors meet all even ones first: registers hold no more sums. Rows of a
// kilobyte are too short for the processor to fetch ahead by itself.
template <class T, int kRows, int kTokens>
SIMD_TARGET void Dots(const T* const* rows, const float* scales, const float* const* x,
                      int64_t width, int64_t tokens, int64_t stride, float* y) {
  constexpr int kProducts = kRows * kTokens;
  constexpr int kBeside = kTokens > 1 ? kRows : std::min(kRows, 4);
  constexpr int kHalves = kTokens > 1 ? 1 : 2;  // of them in registers
  constexpr int64_t kRowsAhead = std::max(4, kRows);
  Vec total[kProducts];
  const int64_t end = width / (2 * kLanes) * (2 * kLanes);
  for (int first = 0; first < kRows; first += kBeside)
    for (int half = 0; half < 2; half += kHalves) {
      Vec sum[kBeside][kTokens][kHalves] = {};
      for (int64_t d = half * kLanes; d < end; d += 2 * kLanes)
#pragma GCC unroll 2
        for (int h = 0; h < kHalves; ++h) {
          Vec at[kTokens];
          for (int t = 0; t < kTokens; ++t) at[t] = InRegister(Load(x[t] + d + h * kLanes));
#pragma GCC unroll 4
          for (int i = 0; i < kBeside; ++i) {
            const T* row = rows[first + i] + d;
            if (sizeof(T) == 1 && half + h == 0) __builtin_prefetch(row + kRowsAhead * width);
            const Vec w = Load(row + h * kLanes);
#pragma GCC unroll 4
            for (int t = 0; t < kTokens; ++t) sum[i][t][h] += w * at[t];
          }
        }
      for (int i = 0; i < kBeside; ++i)
        for (int t = 0; t < kTokens; ++t) {
          Vec& all = total[t * kRows + first + i];
          const Vec& part = sum[i][t][0];
          all = kHalves == 2 ? part + sum[i][t][kHalves - 1] : half == 0 ? part : all + part;
        }
    }
  alignas(64) float out[std::max(kProducts, kLanes)];
  if constexpr (kProducts == kLanes)
    Store(out, LaneSums(total));
  else
    for (int j = 0; j < kProducts; ++j) out[j] = LaneSum(total[j]);
  for (int j = 0; j < kProducts && end < width; ++j)
    out[j] = AddRest(out[j], rows[j % kRows], x[j / kRows], end, width);
  if (scales != nullptr) {
    if constexpr (kProducts == kLanes)
      Store(out, Load(out) * Repeated<kRows>(scales));
    else
      for (int j = 0; j < kProducts; ++j) out[j] *= scales[j % kRows];
  }
  for (int64_t t = 0; t < tokens; ++t)
    std::memcpy(y + t * stride, out + t * kRows, kRows * sizeof(float));
}

SIMD_TARGET inline IntVec LoadBytes(const Int4Pair* p) {
#if SIMD_LANES == 16
  return (IntVec)_mm512_cvtepu8_epi32(
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif SIMD_LANES == 8
  return (IntVec)_mm256_cvtepu8_epi32(
      _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  typedef uint8_t Bytes __attribute__((vector_size(SIMD_LANES), aligned(1), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const Bytes*>(p), IntVec);
#endif
}

// The same for 4-bit weights: `width` is a multiple of 64 columns, each 64 with a scale
// of its own, scales[i * (width / 64) + group].
template <int kRows, int kTokens>
SIMD_TARGET void Int4Dots(const Int4Pair* const* rows, const float* scales,
                          const float* const* x, int64_t width, int64_t tokens,
                          int64_t stride, float* y) {
  constexpr int kHalf = kInt4Group / 2;
  const int64_t groups = width / kInt4Group;
  Vec sum[kRows][kTokens] = {};
  for (int64_t g = 0; g < groups; ++g)
    for (int i = 0; i < kRows; ++i) {
      __builtin_prefetch(rows[i] + g * kHalf + kRows * width / 2);
      Vec low_sum[kTokens] = {}, high_sum[kTokens] = {};
      for (int j = 0; j < kHalf; j += kLanes) {
        const IntVec both = LoadBytes(rows[i] + g * kHalf + j);
        const Vec low = __builtin_convertvector((both & 15) - 8, Vec);
        const Vec high = __builtin_convertvector((both >> 4) - 8, Vec);
        for (int t = 0; t < kTokens; ++t) {
          const float* at = x[t] + g * kInt4Group + j;
          low_sum[t] += low * Load(at);
          high_sum[t] += high * Load(at + kHalf);
        }
      }
      const float scale = scales[i * groups + g];
      for (int t = 0; t < kTokens; ++t) sum[i][t] += scale * (low_sum[t] + high_sum[t]);
    }
  for (int i = 0; i < kRows; ++i)
    for (int64_t t = 0; t < tokens; ++t) y[t * stride + i] = LaneSum(sum[i][t]);
}

template <class T>
MatrixKernels<T> MakeMatrixKernels() {
  if constexpr (std::is_same_v<T, Int4Pair>)
    return {{Int4Dots<4, 1>, 4, Int4Dots<1, 1>}, {Int4Dots<1, 4>, 1, Int4Dots<1, 4>}};
  else
    return {{Dots<T, kLanes, 1>, kLanes, Dots<T, 1, 1>},
            {Dots<T, kLanes / 4, 4>, kLanes / 4, Dots<T, 1, 4>}};
}

// The first place of the largest of y[0:count], of which NaN counts as the largest of all.
SIMD_TARGET int64_t FirstLargest(const float* y, int64_t count) {
  Vec best = Vec{} - INFINITY;
  IntVec is_nan = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec value = Load(y + i);
    best = value > best ? value : best;
    is_nan |= (IntVec)(value != value);
  }
  float largest = -INFINITY;
  bool nan = false;
  for (int l = 0; l < kLanes; ++l) {
    largest = std::max(largest, best[l]);
    nan = nan || is_nan[l] != 0;
  }
  for (; i < count; ++i) {
    nan = nan || y[i] != y[i];
    largest = y[i] > largest ? y[i] : largest;
  }
  for (i = 0; i + 1 < count; ++i)
    if (nan ? y[i] != y[i] : y[i] == largest) break;
  return i;
}
