// Inner loops of packed_native.h, compiled for one instruction set per inclusion: a part of
// lookup_native_kernel.h, inside its namespace. No include guard, for that reason.

// Columns of a slice: as many sums as leave room in the registers, and whole lines of memory.
template <class T>
constexpr int kSliceVectors = sizeof(T) == 1 ? 8 : 4;
template <class T>
constexpr int kSliceColumns = kSliceVectors<T> * kLanes;

template <class T>
SIMD_TARGET inline void FetchRow(const RowCopy<T>& copy, int64_t i) {
  const auto* row = reinterpret_cast<const char*>(copy.source + copy.wanted[i] * copy.stride);
  for (size_t byte = 0; byte < kSliceColumns<T> * sizeof(T); byte += 64)
    __builtin_prefetch(row + byte, 0, 2);
}

// Copies the next `count` rows, or what is left. A row is asked for well before it is copied: it
// lies in memory, and the next one is too far from it for the processor to see.
template <class T>
SIMD_TARGET inline void CopyRows(RowCopy<T>& copy, int64_t count) {
  constexpr int kColumns = kSliceColumns<T>;
  if (copy.done == 0)
    for (int64_t i = 0; i < std::min(kRowsAhead, copy.count); ++i) FetchRow(copy, i);
  const int64_t end = std::min(copy.count, copy.done + count);
  for (int64_t i = copy.done; i < end; ++i) {
    FetchRow(copy, i + kRowsAhead);
    const T* row = copy.source + copy.wanted[i] * copy.stride;
    T* to = copy.block + i * kColumns;
    if (copy.columns == kColumns) {
      std::memcpy(to, row, kColumns * sizeof(T));
    } else {
      std::memcpy(to, row, copy.columns * sizeof(T));
      std::memset(to + copy.columns, 0, (kColumns - copy.columns) * sizeof(T));
    }
  }
  copy.done = end;
}

// sums[n] (+)= sum_j weights[n, j] * block[rows[n, j]] for j < kGroup. On the way, copies the
// rows of the tables that are read next, or fetches them where there is no block for them; as
// many at each step, a loop whose end the processor foresees.
template <class T, int kGroup>
SIMD_TARGET void AddGroup(const T* block, const uint16_t* rows, const float* weights,
                          int64_t num_tokens, bool first, float* sums, RowCopy<T>& next) {
  constexpr int kVectors = kSliceVectors<T>, kColumns = kSliceColumns<T>;
  const int64_t rows_a_step = CeilDivide(next.count, num_tokens);
  const int64_t step = std::max<int64_t>(1, num_tokens / std::max<int64_t>(1, next.count));
  for (int64_t n = 0, due = 0; n < num_tokens; ++n) {
    if (n == due) {
      due += step;
      if (next.block != nullptr) {
        CopyRows(next, rows_a_step);
      } else {
        const int64_t end = std::min(next.count, next.done + rows_a_step);
        for (; next.done < end; ++next.done) FetchRow(next, next.done);
      }
    }
    Vec sum[kVectors];
    for (int v = 0; v < kVectors; ++v)
      sum[v] = first ? Vec{} : Load(sums + n * kColumns + v * kLanes);
#pragma GCC unroll 8
    for (int j = 0; j < kGroup; ++j) {
      const T* row = block + size_t{rows[n * kGroup + j]} * kColumns;
      const float weight = weights[n * kGroup + j];
      for (int v = 0; v < kVectors; ++v) sum[v] += weight * Load(row + v * kLanes);
    }
    for (int v = 0; v < kVectors; ++v) Store(sums + n * kColumns + v * kLanes, sum[v]);
  }
}
