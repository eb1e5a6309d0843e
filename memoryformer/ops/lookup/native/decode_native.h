// What decoding asks for beside the lookup: a whole memory layer in one call, its hash and
// scores included, and the product of a few vectors with a matrix of narrow weights. Both
// are bound by the bytes they read. Plain C++, as lookup_native.h; start at `MemoryLayer`
// and `MatrixProduct`.

#pragma once

#include <cmath>

#include "forward_native.h"
#include "hash_native.h"

namespace memoryformer {

// --- A memory layer: y = sum_k s(z_k) T_k[h(z_k)] + b, and the rows across if asked. ---

// s(z) = ||z||_1^power * exp(gamma * sum_i log sigmoid(beta |z_i|)); see hashing.py.
struct Hash {
  int64_t code_bits;
  bool power;
  float beta, gamma;
  bool two_rows;  // also the bucket across the least certain bit
};

// The K codes and scores of one token: the first value of a chunk is the high bit, and
// zero (of either sign) counts as set. Those of the second row go `second` further.
inline void HashToken(OnePlusExpKernel one_plus_exp, const float* x, int64_t num_tables,
                      const Hash& hash, int64_t second, int32_t* codes,
                      float* scores) {
  float factors[kHashChunks * kMaxCodeBits];
  const int64_t bits = hash.code_bits;
  for (int64_t k0 = 0; k0 < num_tables; k0 += kHashChunks) {
    const int64_t count = std::min(kHashChunks, num_tables - k0);
    const float* block = x + k0 * bits;
    if (hash.gamma != 0) one_plus_exp(block, count * bits, hash.beta, factors);
    HashChunks(block, count, bits, factors, hash.gamma, hash.power, codes + k0, scores + k0);
    for (int64_t k = 0; k < count && hash.two_rows; ++k) {
      const float* z = block + k * bits;
      int64_t least = 0;
      for (int64_t i = 1; i < bits; ++i)
        if (std::abs(z[i]) < std::abs(z[least])) least = i;
      const float factor = std::exp(-hash.gamma * hash.beta * std::abs(z[least]));
      codes[second + k0 + k] = codes[k0 + k] ^ (1 << (bits - 1 - least));
      scores[second + k0 + k] = scores[k0 + k] * factor;
    }
  }
}

// x [N, K tau], bias [F] or null -> y [N, F].
template <class T, class Pool>
void MemoryLayer(const Shape& shape, const T* tables, const float* scales, const float* x,
                 const float* bias, const Hash& hash, float* y, Pool& pool) {
  const auto [N, K, C, F] = shape;
  const int64_t rows = hash.two_rows ? 2 : 1;
  const Scratch codes_memory(rows * N * K * sizeof(int32_t));
  const Scratch scores_memory(rows * N * K * sizeof(float));
  const Scratch sums_memory(hash.two_rows ? 2 * N * F * sizeof(float) : 0);
  auto* codes = codes_memory.As<int32_t>();
  auto* scores = scores_memory.As<float>();
  const OnePlusExpKernel one_plus_exp = ChooseOnePlusExp();
  const int64_t width = K * hash.code_bits;
  const int64_t parts = CeilDivide(N, 8);
  ParallelFor(pool, AvailableThreads(), parts, [&](int64_t part) {
    for (int64_t n = 8 * part; n < std::min<int64_t>(N, 8 * part + 8); ++n)
      HashToken(one_plus_exp, x + n * width, K, hash, N * K, codes + n * K,
                scores + n * K);
  });
  auto* sums = hash.two_rows ? sums_memory.As<float>() : y;
  const Shape read{rows * N, K, C, F};
  Forward(Operands<T>{read, tables, scales, codes, scores}, sums, pool);
  if (!hash.two_rows && bias == nullptr) return;
  ParallelFor(pool, ChooseThreads({N, 1, 1, F}), parts, [&](int64_t part) {
    const int64_t end = std::min<int64_t>(N, 8 * part + 8) * F;
    for (int64_t i = 8 * part * F; i < end && hash.two_rows; ++i)
      y[i] = sums[i] + sums[N * F + i];
    for (int64_t i = 8 * part * F; i < end && bias != nullptr; i += F)
      for (int64_t f = 0; f < F; ++f) y[i + f] += bias[f];
  });
}

// --- The product of a few vectors with a matrix: y[n, v] = x[n] . W[v]. ----------------

template <class T>
struct Matrix {
  int64_t rows, width;  // V, D
  const T* weights;     // [V, D], or [V, D / 2] pairs of 4 bits
  const float* scales;  // null, [V], or [V, D / 64] of 4-bit weights

  static constexpr bool kPairs = std::is_same_v<T, Int4Pair>;
  const T* Row(int64_t v) const { return weights + v * (kPairs ? width / 2 : width); }
  const float* Scale(int64_t v) const {
    return scales == nullptr ? nullptr : scales + v * (kPairs ? width / kInt4Group : 1);
  }
};

// Rows [v0, v1) of the product: y[n * V + v]. Four vectors at a time, which so stay in the
// first cache for all of these rows; three take less time as four than one by one.
template <class T>
void ProductOfRows(const Matrix<T>& matrix, const MatrixKernels<T>& kernels, const float* x,
                   int64_t N, int64_t v0, int64_t v1, float* y) {
  const int64_t V = matrix.rows, D = matrix.width;
  const T* rows[kMostRows];
  const float* at[4];
  for (int64_t n = 0; n < N;) {
    const bool four = n + 3 <= N;
    const auto& kernel = four ? kernels.four_tokens : kernels.one_token;
    const int64_t tokens = four ? std::min<int64_t>(4, N - n) : 1;
    for (int64_t t = 0; t < 4; ++t) at[t] = x + std::min(n + t, N - 1) * D;
    for (int64_t v = v0; v < v1;) {
      const bool many = v + kernel.count <= v1;
      const int64_t count = many ? kernel.count : 1;
      for (int64_t i = 0; i < count; ++i) rows[i] = matrix.Row(v + i);
      (many ? kernel.many : kernel.one)(rows, matrix.Scale(v), at, D, tokens, V,
                                        y + n * V + v);
      v += count;
    }
    n += tokens;
  }
}

constexpr int64_t kProductsPerWakeUp = 1 << 21;  // some 30 microseconds

// Every product is summed in one order, whatever N and the threads are.
template <class T, class Pool>
void MatrixProduct(const Matrix<T>& matrix, const float* x, int64_t N, float* y,
                   Pool& pool) {
  const int64_t V = matrix.rows;
  if (N == 0 || V == 0) return;
  const MatrixKernels<T> kernels = ChooseMatrixKernels<T>();
  const int64_t row_bytes = std::max<int64_t>(1, matrix.Row(1) - matrix.Row(0)) * sizeof(T);
  constexpr int64_t kItemBytes = 128 << 10, kRowsAtOnce = 48;  // read N / 4 times
  const int64_t rows_per_item = std::max<int64_t>(4, kItemBytes / row_bytes / 4 * 4);
  const int64_t items = CeilDivide(V, rows_per_item);
  // A thread that wakes up takes its caller some microseconds and comes some later.
  const int64_t useful = N * V * matrix.width / kProductsPerWakeUp;
  const int threads = std::max<int64_t>(1, std::min<int64_t>(useful, AvailableThreads()));
  ParallelFor(pool, threads, items, [&](int64_t item) {
    const int64_t end = std::min(V, (item + 1) * rows_per_item);
    for (int64_t v = item * rows_per_item; v < end; v += kRowsAtOnce)
      ProductOfRows(matrix, kernels, x, N, v, std::min(end, v + kRowsAtOnce), y);
  });
}

// The first place of the largest of each row of y [N, V], V > 0; NaN is the largest.
template <class Pool>
void FirstLargest(const float* y, int64_t N, int64_t V, int32_t* places, Pool& pool) {
  const FirstLargestKernel first = ChooseFirstLargest();
  const int threads = N * V < kProductsPerThread ? 1 : AvailableThreads();
  ParallelFor(pool, threads, N, [&](int64_t n) {
    places[n] = static_cast<int32_t>(first(y + n * V, V));
  });
}

}  // namespace memoryformer
