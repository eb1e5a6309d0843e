// The forward of the lookup, y[n] = sum_k scores[n,k] * tables[k, codes[n,k]]: in place, or
// packed (packed_native.h). Both add the tables of a token in order. Start at `Forward`.

#pragma once

#include "lookup_native.h"
#include "packed_native.h"

namespace memoryformer {

// Tables larger than this are taken to lie in memory: all layers share the last cache,
// and what sysconf says of it is wrong on some processors.
constexpr int64_t kFarBytes = 8 << 20;

template <class T>
bool IsFar(const Shape& s) {
  return s.tables * s.buckets * s.features * int64_t{sizeof(T)} > kFarBytes;
}

// Columns [begin, end) of y[0:F], for token n.
template <class T>
void SumToken(const Kernels<T>& kernels, const Operands<T>& op, int64_t n, int64_t begin,
              int64_t end, bool far, float* y) {
  constexpr int kBlock = 128;  // rows whose addresses are resolved at a time
  const int64_t K = op.shape.tables, F = op.shape.features;
  const T* rows[kBlock];
  float weights[kBlock];
  for (int64_t k0 = 0; k0 < K; k0 += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, K - k0));
    for (int i = 0; i < count; ++i) {
      const int64_t row = op.Row(n, k0 + i);
      rows[i] = op.tables + row * F;
      weights[i] = op.Weight(n, k0 + i, row);
    }
    kernels.sum_columns(rows, weights, count, begin, end, k0 == 0, far, y);
  }
}

// Few tokens, or rows that caches hold: read every row in place.
template <class T, class Pool>
void ForwardInPlace(const Kernels<T>& kernels, const Operands<T>& op, float* y,
                    Pool& pool) {
  const int64_t N = op.shape.tokens, F = op.shape.features;
  const int threads = ChooseThreads(op.shape);
  const bool far = IsFar<T>(op.shape);
  // Columns are split only where tokens do not suffice; whole cache lines stay together.
  const int64_t token_parts = std::min<int64_t>(N, 4 * threads);
  const int64_t column_parts =
      N >= threads ? 1 : std::max<int64_t>(1, std::min<int64_t>(threads / N, F / 256));
  const int64_t columns = CeilDivide(CeilDivide(F, column_parts), 64) * 64;
  ParallelFor(pool, threads, token_parts * column_parts, [&](int64_t item) {
    const int64_t token_part = item / column_parts, column_part = item % column_parts;
    const int64_t f0 = std::min(F, column_part * columns);
    const int64_t f1 = std::min(F, f0 + columns);
    for (int64_t n = N * token_part / token_parts;
         n < N * (token_part + 1) / token_parts; ++n)
      SumToken(kernels, op, n, f0, f1, far, y + n * F);
  });
}

// Whether a row is read often enough to be copied. In memory, rows of one byte are read in
// place no faster than rows of two: the wait for so many lines is what takes the time.
template <class T>
bool PaysToPack(const Shape& s) {
  if (s.buckets > UINT16_MAX) return false;
  const int64_t gain = !IsFar<T>(s) ? 1 : sizeof(T) == 1 ? 8 : sizeof(T) == 4 ? 2 : 1;
  return s.tokens >= CeilDivide(packing_reuse.load() * s.buckets, gain);
}

template <class T, class Pool>
void Forward(const Operands<T>& op, float* y, Pool& pool) {
  const auto [N, K, C, F] = op.shape;
  AdviseHugePages(y, N * F * sizeof(float));
  if (N == 0 || K == 0 || C == 0 || F == 0) {
    std::fill_n(y, N * F, 0.0f);
    return;
  }
  const Kernels<T> kernels = ChooseKernels<T>();
  if (PaysToPack<T>(op.shape))
    ForwardPacked(kernels, op, y, pool);
  else
    ForwardInPlace(kernels, op, y, pool);
}

}  // namespace memoryformer
