// Inner loops of block_native.h, compiled for one instruction set per inclusion: a part of
// lookup_native_kernel.h, inside its namespace. No include guard, for that reason.

// a[i] + b[i] + c[i]; b and c may be null.
SIMD_TARGET inline Vec SumAt(const Addends& x, int64_t i) {
  Vec sum = Load(x.a + i);
  if (x.b != nullptr) sum += Load(x.b + i);
  if (x.c != nullptr) sum += Load(x.c + i);
  return sum;
}
inline float ScalarSumAt(const Addends& x, int64_t i) {
  return x.a[i] + (x.b != nullptr ? x.b[i] : 0.0f) + (x.c != nullptr ? x.c[i] : 0.0f);
}

// sum_i (x_i - mean)^power, power 1 or 2, always in one order.
template <int kPower>
SIMD_TARGET inline float SumAround(const Addends& x, int64_t width, float mean) {
  Vec sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= width; i += 2 * kLanes)
    for (int h = 0; h < 2; ++h) {
      const Vec centred = SumAt(x, i + h * kLanes) - mean;
      sums[h] += kPower == 1 ? centred : centred * centred;
    }
  float total = LaneSum(sums[0] + sums[1]);
  for (; i < width; ++i) {
    const float centred = ScalarSumAt(x, i) - mean;
    total += kPower == 1 ? centred : centred * centred;
  }
  return total;
}

// Columns [begin, end) of y = norm(a + b + c), and of the sum where `sum` is not null.
SIMD_TARGET void Normalise(const Addends& x, int64_t width, const NormWeights& norm, int64_t begin,
                           int64_t end, float* sum, float* y) {
  float mean = 0, divisor = 1, factor = 1;
  if (norm.bias != nullptr) {
    mean = SumAround<1>(x, width, 0) / width;
    factor = 1 / std::sqrt(SumAround<2>(x, width, mean) / width + norm.eps);
  } else {
    divisor = std::sqrt(SumAround<2>(x, width, 0) / width) + norm.eps;
  }
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    const Vec value = SumAt(x, i);
    if (sum != nullptr) Store(sum + i, value);
    const Vec scaled = (value - mean) * factor / divisor * Load(norm.scale + i);
    Store(y + i, norm.bias == nullptr ? scaled : scaled + Load(norm.bias + i));
  }
  for (; i < end; ++i) {
    const float value = ScalarSumAt(x, i);
    if (sum != nullptr) sum[i] = value;
    const float scaled = (value - mean) * factor / divisor * norm.scale[i];
    y[i] = norm.bias == nullptr ? scaled : scaled + norm.bias[i];
  }
}

// out[t * stride + j] = scale (q_t . keys[j]) of kKeys keys, one after another in memory, and
// kQueries queries, `apart` floats apart. The same bits for any number of either.
template <int kKeys, int kQueries>
SIMD_TARGET inline void LogitsOf(const float* keys, int64_t width, const float* q,
                                 int64_t apart, float scale, float* out, int64_t stride) {
  constexpr int kBeside = std::min(kKeys, kQueries > 1 || kLanes < 16 ? 4 : 8);
  Vec sum[kQueries][kKeys];
  const int64_t end = width / kLanes * kLanes;
  for (int first = 0; first < kKeys; first += kBeside) {
    Vec part[kQueries][kBeside] = {};
    for (int64_t e = 0; e < end; e += kLanes) {
      Vec at[kQueries];
      for (int t = 0; t < kQueries; ++t) at[t] = Load(q + t * apart + e);
#pragma GCC unroll 8
      for (int j = 0; j < kBeside; ++j) {
        const Vec key = InRegister(Load(keys + (first + j) * width + e));
#pragma GCC unroll 4
        for (int t = 0; t < kQueries; ++t) part[t][j] += at[t] * key;
      }
    }
    for (int t = 0; t < kQueries; ++t)
      for (int j = 0; j < kBeside; ++j) sum[t][first + j] = part[t][j];
  }
  for (int t = 0; t < kQueries; ++t) {
    float* of = out + t * stride;
    if constexpr (kKeys == kLanes)
      Store(of, LaneSums(sum[t]));
    else
      for (int j = 0; j < kKeys; ++j) of[j] = LaneSum(sum[t][j]);
    for (int j = 0; j < kKeys && end < width; ++j)
      of[j] = AddRest(of[j], keys + j * width, q + t * apart, end, width);
    for (int j = 0; j < kKeys; ++j) of[j] *= scale;
  }
}

// Fetches `rows` rows from row j on of `count` rows, and then of what is read after them: heads
// are too short for the processor to fetch ahead by itself.
constexpr int64_t kHeadRowsAhead = 16;
inline void FetchRows(const float* from, const float* then, int64_t j, int64_t rows,
                      int64_t count, int64_t width) {
  const float* row = j < count ? from + j * width : then + (j - count) * width;
  for (int64_t e = 0; e < rows * width; e += 16) __builtin_prefetch(row + e);
}

template <int kQueries>
SIMD_TARGET void LogitsOfAll(const float* keys, int64_t count, int64_t width, const float* q,
                             int64_t apart, float scale, const float* then, float* out,
                             int64_t stride) {
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    FetchRows(keys, then, j + kHeadRowsAhead, kLanes, count, width);
    LogitsOf<kLanes, kQueries>(keys + j * width, width, q, apart, scale, out + j, stride);
  }
  for (; j < count; ++j)
    LogitsOf<1, kQueries>(keys + j * width, width, q, apart, scale, out + j, stride);
}

void KeyLogits(const float* keys, int64_t count, int64_t width, const float* q,
               int64_t queries, int64_t apart, float scale, const float* then, float* out,
               int64_t stride) {
  if (queries == kMostQueries)
    return LogitsOfAll<kMostQueries>(keys, count, width, q, apart, scale, then, out, stride);
  for (int64_t t = 0; t < queries; ++t)
    LogitsOfAll<1>(keys, count, width, q + t * apart, apart, scale, then, out + t * stride,
                   stride);
}

// w[j] <- exp(w[j] - max w) where seen[j] is -1, 0 where it is 0; returns their sum.
SIMD_TARGET float SoftmaxWeights(float* w, const int32_t* seen, int64_t count) {
  Vec most = Vec{} - INFINITY;
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    const Vec value = Load(w + j);
    const auto is_seen = (IntVec)Load(reinterpret_cast<const float*>(seen + j));
    most = (is_seen != 0) & (IntVec)(value > most) ? value : most;
  }
  float largest = -INFINITY;
  for (int l = 0; l < kLanes; ++l) largest = std::max(largest, most[l]);
  for (; j < count; ++j)
    if (seen[j] != 0) largest = std::max(largest, w[j]);
  Vec sums{};
  j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    const Vec weight = ExpOf(Load(w + j) - largest);
    const Vec masked =
        (Vec)((IntVec)weight & (IntVec)Load(reinterpret_cast<const float*>(seen + j)));
    Store(w + j, masked);
    sums += masked;
  }
  float total = LaneSum(sums);
  for (; j < count; ++j) {
    w[j] = seen[j] != 0 ? std::exp(w[j] - largest) : 0.0f;
    total += w[j];
  }
  return total;
}

// sum_j w[j] values[j * width]: one function, so that it has the same bits for all.
SIMD_TARGET __attribute__((noinline)) float WeighColumn(const float* values, const float* w,
                                                        int64_t count, int64_t width) {
  float sum = 0;
  for (int64_t j = 0; j < count; ++j) sum += w[j] * values[j * width];
  return sum;
}

// y_t = factor_t sum_j w_t[j] values[j], j < count + t, of kVectors vectors of columns and
// kQueries queries; w_t and y_t are apart as `weights` and `results` say.
template <int kVectors, int kQueries>
SIMD_TARGET inline void WeighStrip(const float* values, const float* w, int64_t weights,
                                   int64_t count, int64_t width, const float* factors,
                                   const float* then, float* y, int64_t results) {
  Vec sum[kQueries][kVectors] = {};
  for (int64_t j = 0; j < count; ++j) {
    if (then != nullptr) FetchRows(values, then, j + kHeadRowsAhead, 1, count, width);
    for (int v = 0; v < kVectors; ++v) {
      const Vec value = InRegister(Load(values + j * width + v * kLanes));
#pragma GCC unroll 4
      for (int t = 0; t < kQueries; ++t) sum[t][v] += w[t * weights + j] * value;
    }
  }
  for (int t = 0; t < kQueries; ++t)
    for (int v = 0; v < kVectors; ++v) {
      for (int64_t j = count; j < count + t; ++j)
        sum[t][v] += w[t * weights + j] * Load(values + j * width + v * kLanes);
      Store(y + t * results + v * kLanes, factors[t] * sum[t][v]);
    }
}

// The same of all columns; values lie one after another in memory.
template <int kQueries>
SIMD_TARGET void WeighAll(const float* values, const float* w, int64_t weights, int64_t count,
                          int64_t width, const float* factors, const float* then, float* y,
                          int64_t results) {
  constexpr int kWide = kQueries > 1 && kLanes < 16 ? 2 : 4;
  int64_t e = 0;
  for (; e + kWide * kLanes <= width; e += kWide * kLanes)  // whole rows are fetched once
    WeighStrip<kWide, kQueries>(values + e, w, weights, count, width, factors,
                                e == 0 ? then : nullptr, y + e, results);
  for (; e + kLanes <= width; e += kLanes)
    WeighStrip<1, kQueries>(values + e, w, weights, count, width, factors, nullptr, y + e,
                            results);
  for (; e < width; ++e)
    for (int t = 0; t < kQueries; ++t)
      y[t * results + e] =
          factors[t] * WeighColumn(values + e, w + t * weights, count + t, width);
}

void WeighValues(const float* values, const float* w, int64_t weights, int64_t count,
                 int64_t width, int64_t queries, const float* factors, const float* then,
                 float* y, int64_t results) {
  if (queries == kMostQueries)
    return WeighAll<kMostQueries>(values, w, weights, count, width, factors, then, y, results);
  for (int64_t t = 0; t < queries; ++t)
    WeighAll<1>(values, w + t * weights, weights, count + t, width, factors + t, then,
                y + t * results, results);
}

inline BlockKernels MakeBlockKernels() {
  return {Normalise, KeyLogits, SoftmaxWeights, WeighValues};
}
