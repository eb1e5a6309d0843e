// The gradients of the lookup to tables and scores. Start at `Backward`.

#pragma once

#include "lookup_native.h"

namespace memoryformer {

// Sorts the tokens of one table by bucket, stably: their codes and scores, [N] each.
inline void SortByBucket(const int32_t* codes, const float* scores, int64_t N, int64_t C,
                         int32_t* starts, int32_t* order, float* sorted_scores) {
  std::fill(starts, starts + C + 1, 0);
  for (int64_t n = 0; n < N; ++n) ++starts[codes[n] + 1];
  for (int64_t c = 0; c < C; ++c) starts[c + 1] += starts[c];
  for (int64_t n = 0; n < N; ++n) {
    const int32_t at = starts[codes[n]]++;
    order[at] = static_cast<int32_t>(n);
    sorted_scores[at] = scores[n];
  }
  for (int64_t c = C; c > 0; --c) starts[c] = starts[c - 1];
  starts[0] = 0;
}

// body(n K + k, k N + n) for every lookup, in tiles that suit both orders.
template <class Pool, class Body>
void ForEachLookup(Pool& pool, int threads, int64_t N, int64_t K, const Body& body) {
  const int64_t parts = std::min<int64_t>(N, 4 * threads);
  ParallelFor(pool, threads, parts, [&](int64_t part) {
    const int64_t end = N * (part + 1) / parts;
    for (int64_t n0 = N * part / parts; n0 < end; n0 += 16)
      for (int64_t k = 0; k < K; ++k)
        for (int64_t n = n0; n < std::min(end, n0 + 16); ++n)
          body(n * K + k, k * N + n);
  });
}

// A thread owns tables: it sorts the tokens of each by bucket, then passes over slices of
// dy, for each slice over its tables, and writes every row of dT once. No array is
// cleared first, and there is nothing to add up between threads.
template <class T, class Pool>
void Backward(const Operands<T>& op, const float* dy, T* dtables, float* dscores,
              Pool& pool) {
  const auto [N, K, C, F] = op.shape;
  if (N > INT32_MAX) throw std::invalid_argument("more than 2^31 - 1 tokens in a call");
  if (K == 0 || C == 0) {
    std::fill_n(dscores, N * K, 0.0f);
    return;
  }
  AdviseHugePages(dtables, K * C * F * sizeof(T));
  const Kernels<T> kernels = ChooseKernels<T>();
  const int width = kernels.gradient_width, threads = ChooseThreads(op.shape);
  const Scratch codes_memory(K * N * sizeof(int32_t));
  const Scratch scores_memory(K * N * sizeof(float));
  const Scratch starts_memory(K * (C + 1) * sizeof(int32_t));
  const Scratch order_memory(K * (N + kAhead) * sizeof(int32_t));
  const Scratch sorted_scores_memory(K * N * sizeof(float));
  auto* codes = codes_memory.As<int32_t>();  // [K, N]
  auto* scores = scores_memory.As<float>();  // [K, N]
  const auto starts = [&](int64_t k) { return starts_memory.As<int32_t>() + k * (C + 1); };
  const auto order = [&](int64_t k) {
    return order_memory.As<int32_t>() + k * (N + kAhead);
  };
  auto* sorted_scores = sorted_scores_memory.As<float>();
  ForEachLookup(pool, threads, N, K, [&](int64_t nk, int64_t kn) {
    codes[kn] = static_cast<int32_t>(Clamp(op.codes[nk], C));
    scores[kn] = op.scores[nk];
  });

  const int64_t parts = std::min<int64_t>(K, threads);
  ParallelFor(pool, threads, parts, [&](int64_t part) {
    const int64_t begin = K * part / parts, end = K * (part + 1) / parts;
    for (int64_t k = begin; k < end; ++k) {
      SortByBucket(codes + k * N, scores + k * N, N, C, starts(k), order(k),
                   sorted_scores + k * N);
      std::fill_n(order(k) + N, kAhead, 0);
    }
    // Sorted, the codes have done their work: dscores takes their place.
    auto* sorted_dscores = reinterpret_cast<float*>(codes);
    std::fill(sorted_dscores + begin * N, sorted_dscores + end * N, 0.0f);
    const Scratch slice_memory(N * width * sizeof(float));
    float* slice = slice_memory.As<float>();
    for (int64_t f0 = 0; f0 < F; f0 += width) {
      const int columns = static_cast<int>(std::min<int64_t>(width, F - f0));
      kernels.pack_gradient(dy + f0, N, F, columns, slice);
      for (int64_t k = begin; k < end; ++k)
        kernels.table_gradients(op.tables + k * C * F + f0, C, F, columns, slice, starts(k),
                                order(k), sorted_scores + k * N, sorted_dscores + k * N,
                                dtables + k * C * F + f0);
    }
    for (int64_t k = begin; k < end; ++k)  // back to the order of the tokens
      for (int64_t i = 0; i < N; ++i)
        scores[k * N + order(k)[i]] = sorted_dscores[k * N + i];
  });
  ForEachLookup(pool, threads, N, K,
                [&](int64_t nk, int64_t kn) { dscores[nk] = scores[kn]; });
}

}  // namespace memoryformer
