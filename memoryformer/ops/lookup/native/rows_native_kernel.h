// Sums of rows that lie in memory, compiled for one instruction set per inclusion: a part of
// lookup_native_kernel.h, inside its namespace. No include guard, for that reason.
//
// A few rows at a time are read from their first column to their last, while the same columns of
// the next few are fetched. So memory is read in runs of a whole row, and what is fetched
// fits the first cache. The sum stays in y between groups. On an AMD EPYC (Zen 5) rows of 3 KB
// arrive at twice the rate of strips of 128 columns across all rows.

// One line of the cache and all lanes of it, in a type that rows may be in.
constexpr int kLineVectors = kLanes == 4 ? 8 : 64 / kLanes;

// y[begin:end] (+)= sum of kRows rows, and those columns of kRows `next` rows are fetched.
template <class T, int kRows>
SIMD_TARGET inline void AddFarRows(const T* const* rows, const T* const* next,
                                   const float* weights, int64_t begin, int64_t end,
                                   bool first, float* y) {
  constexpr int64_t kColumns = kLineVectors * kLanes;
  constexpr int64_t kFetch = kColumns < 64 / int64_t{sizeof(T)} ? kColumns : 64 / sizeof(T);
  int64_t f = begin;
  for (; f + kColumns <= end; f += kColumns) {
    if (next != nullptr)
      for (int i = 0; i < kRows; ++i)
        for (int64_t column = 0; column < kColumns; column += kFetch)
          __builtin_prefetch(next[i] + f + column);
    Vec sum[kLineVectors];
    for (int v = 0; v < kLineVectors; ++v)
      sum[v] = first ? Vec{} : Load(y + f + v * kLanes);
    for (int i = 0; i < kRows; ++i)
      for (int v = 0; v < kLineVectors; ++v)
        sum[v] += weights[i] * Load(rows[i] + f + v * kLanes);
    for (int v = 0; v < kLineVectors; ++v) Store(y + f + v * kLanes, sum[v]);
  }
  for (; f + kLanes <= end; f += kLanes) {
    Vec sum = first ? Vec{} : Load(y + f);
    for (int i = 0; i < kRows; ++i) sum += weights[i] * Load(rows[i] + f);
    Store(y + f, sum);
  }
  for (; f < end; ++f) {
    float sum = first ? 0.0f : y[f];
    for (int i = 0; i < kRows; ++i) sum += weights[i] * ToFloat(rows[i][f]);
    y[f] = sum;
  }
}

// y[begin:end] (+)= sum_k weights[k] * rows[k][begin:end], in the order of k.
template <class T>
SIMD_TARGET void SumFarColumns(const T* const* rows, const float* weights, int count,
                               int64_t begin, int64_t end, bool first, float* y) {
  constexpr int kRows = sizeof(T) == 1 ? 8 : 4;  // 8 rows of 4 KB would fill the cache
  for (int i = 0; i < std::min(kRows, count); ++i)
    for (int64_t f = begin; f < end; f += 64 / sizeof(T)) __builtin_prefetch(rows[i] + f);
  int k = 0;
  for (; k + kRows <= count; k += kRows) {
    const bool more = k + 2 * kRows <= count;
    AddFarRows<T, kRows>(rows + k, more ? rows + k + kRows : nullptr, weights + k, begin,
                         end, first && k == 0, y);
  }
  for (; k < count; ++k)
    AddFarRows<T, 1>(rows + k, nullptr, weights + k, begin, end, first && k == 0, y);
}
