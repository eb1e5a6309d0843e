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

// out[j] = scale (q . keys[j]) of kKeys keys, one after another in memory.
template <int kKeys>
SIMD_TARGET inline void LogitsOf(const float* keys, int64_t width, const float* q,
                                 float scale, float* out) {
  Vec sum[kKeys] = {};
  int64_t e = 0;
  for (; e + kLanes <= width; e += kLanes)
    for (int j = 0; j < kKeys; ++j)
      sum[j] += Load(q + e) * Load(keys + j * width + e);
  for (int j = 0; j < kKeys; ++j) {
    float total = LaneSum(sum[j]);
    for (int64_t f = e; f < width; ++f) total += q[f] * keys[j * width + f];
    out[j] = total * scale;
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

SIMD_TARGET void KeyLogits(const float* keys, int64_t count, int64_t width, const float* q,
                           float scale, const float* then, float* out) {
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    FetchRows(keys, then, j + kHeadRowsAhead, 4, count, width);
    LogitsOf<4>(keys + j * width, width, q, scale, out + j);
  }
  for (; j < count; ++j) LogitsOf<1>(keys + j * width, width, q, scale, out + j);
}

// w[j] <- exp(w[j] - max w) where seen[j] is -1, 0 where it is 0; returns their sum.
SIMD_TARGET float SoftmaxWeights(float* w, const int32_t* seen, int64_t count) {
  float largest = -INFINITY;
  for (int64_t j = 0; j < count; ++j)
    if (seen[j] != 0 && !(w[j] <= largest)) largest = w[j];
  Vec sums{};
  int64_t j = 0;
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

// y = factor sum_j w[j] values[j] of kVectors vectors of columns.
template <int kVectors>
SIMD_TARGET inline void WeighStrip(const float* values, const float* w, int64_t count,
                                   int64_t width, float factor, const float* then,
                                   float* y) {
  Vec sum[kVectors] = {};
  for (int64_t j = 0; j < count; ++j) {
    if (then != nullptr) FetchRows(values, then, j + kHeadRowsAhead, 1, count, width);
    for (int v = 0; v < kVectors; ++v)
      sum[v] += w[j] * Load(values + j * width + v * kLanes);
  }
  for (int v = 0; v < kVectors; ++v) Store(y + v * kLanes, factor * sum[v]);
}

// The same of all columns; values lie one after another in memory.
SIMD_TARGET void WeighValues(const float* values, const float* w, int64_t count,
                             int64_t width, float factor, const float* then, float* y) {
  int64_t e = 0;
  for (; e + 4 * kLanes <= width; e += 4 * kLanes)  // whole rows are fetched once
    WeighStrip<4>(values + e, w, count, width, factor, e == 0 ? then : nullptr, y + e);
  for (; e + kLanes <= width; e += kLanes)
    WeighStrip<1>(values + e, w, count, width, factor, nullptr, y + e);
  for (; e < width; ++e) {
    float sum = 0;
    for (int64_t j = 0; j < count; ++j) sum += w[j] * values[j * width + e];
    y[e] = factor * sum;
  }
}

inline BlockKernels MakeBlockKernels() {
  return {Normalise, KeyLogits, SoftmaxWeights, WeighValues};
}
