// The native lookup on CPU: y[n] = sum_k scores[n,k] * tables[k, codes[n,k]], and its
// gradients to tables and scores. Plain C++: lookup_native.cc connects it to XLA.
//
// Work is cut into items; no two items write the same element and each sum has a fixed
// order, so the result does not depend on which thread does what. Start at `Forward` and
// `Backward`; the inner loops are in lookup_native_kernel.h.

#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "lookup_native_machine.h"

namespace memoryformer {

struct Shape {
  int64_t tokens, tables, buckets, features;  // N, K, C, F
};

struct BFloat16 {
  uint16_t bits;
};

inline float ToFloat(float x) { return x; }
inline float ToFloat(int8_t x) { return x; }
inline float ToFloat(BFloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

template <class T>
struct Kernels {
  int width, gradient_width;  // columns of a slice: forward, backward
  void (*sum_columns)(const T* const*, const float*, int, int64_t, int64_t, bool, bool,
                      float*);
  void (*pack_slice)(const T*, int64_t, int64_t, int, T*);
  void (*pack_gradient)(const float*, int64_t, int64_t, int, float*);
  void (*add_group[4])(const T*, const uint16_t*, const float*, int64_t, bool, float*,
                       const T*, int64_t, int64_t);
  void (*table_gradients)(const T*, int64_t, int64_t, int, const float*, const int32_t*,
                          const int32_t*, const float*, float*, T*);
};

// Inner loops of decode_native.h. A matrix is stored by output, [V, D], in weights of T.
struct Int4Pair {
  uint8_t bits;  // columns j and j + 32 of a group of 64, each plus 8
};
constexpr int64_t kInt4Group = 64;

template <class T>
struct MatrixKernels {
  // sums[i * tokens + t] = row i . x[t * stride]
  using Dots = void (*)(const T* const* rows, const float* scales, const float* x,
                        int64_t stride, int64_t width, float* sums);
  Dots four_rows, one_row, four_tokens;  // 4 x 1, 1 x 1 and 1 x 4
  Dots many;                             // as many rows x 4 as registers hold
  int64_t many_rows;
};

// Inner loops of integer_native.h, over tiles of 16 rows.
constexpr int kTileRows = 16;
constexpr int64_t kMaxIntegerWidth = 1 << 17;

struct IntegerKernels {
  // (tile, columns, group, x, stride, totals, scales, tokens, all_tokens, out)
  using Sums = void (*)(const uint8_t*, int64_t, int64_t, const int8_t*, int64_t,
                        const int32_t*, const float*, int64_t, int64_t, float*);
  Sums eight_bits, four_bits;      // with scales of rows
  Sums screen_lead, screen_rest;   // 8 and 2 bits, with scales of vectors
  void (*combine)(const float*, const float*, const float*, float, const float*, float,
                  float, float*);
};

// Inner loops of update_native.h. `rest1` is 1 - b1; a gradient is divided by `weight`.
struct Adam {
  float weight, factor, unbias1, unbias2, b1, rest1, b2, rest2, eps;
};
struct UpdateKernels {
  void (*update)(const Adam&, float, float, int64_t, const float*, float*, float*, float*);
  double (*sum_of_squares)(const float*, int64_t);
};

// Inner loops of head_native.h. a[r, k] is at data[r row_stride + k depth_stride], and `blocks`
// such products of that depth are added, block_stride apart.
struct Factor {
  const float* data;
  int64_t row_stride, depth_stride, depth, blocks, block_stride;
};
struct HeadKernels {
  int64_t panel;
  void (*multiply)(Factor, int64_t, const float*, float*, int64_t, bool);
  float (*softmax)(float*, int64_t, int64_t, float);
};

// Inner loops of block_native.h.
struct Addends {
  const float *a, *b, *c;  // b and c may be null
};
struct NormWeights {
  const float *scale, *bias;  // a bias makes it a LayerNorm, null an RMSNorm
  float eps;
};
struct BlockKernels {
  void (*normalise)(const Addends&, int64_t, const NormWeights&, int64_t, int64_t, float*, float*);
  // `then`, before the result, is what is read after
  void (*key_logits)(const float*, int64_t, int64_t, const float*, float, const float* then,
                     float*);
  float (*softmax_weights)(float*, const int32_t*, int64_t);
  void (*weigh_values)(const float*, const float*, int64_t, int64_t, float,
                       const float* then, float*);
};

using FirstLargestKernel = int64_t (*)(const float*, int64_t);
using OnePlusExpKernel = void (*)(const float*, int64_t, float, float*);

constexpr int kAhead = 16;  // tokens

#define SIMD_NAMESPACE portable
#define SIMD_TARGET
#define SIMD_LANES 4
#include "lookup_native_kernel.h"

#if defined(__x86_64__)
#define SIMD_NAMESPACE avx2
#define SIMD_TARGET __attribute__((target("avx2,fma")))
#define SIMD_LANES 8
#include "lookup_native_kernel.h"

#define SIMD_NAMESPACE avx512
#define SIMD_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define SIMD_LANES 16
#include "lookup_native_kernel.h"
#endif

// What `name` is in the namespace of the instruction set in use.
#if defined(__x86_64__)
#define MEMORYFORMER_IN_USE(name)         \
  (InstructionSet() == 2   ? avx512::name \
   : InstructionSet() == 1 ? avx2::name   \
                           : portable::name)
#else
#define MEMORYFORMER_IN_USE(name) portable::name
#endif

template <class T>
Kernels<T> ChooseKernels() {
  return MEMORYFORMER_IN_USE(MakeKernels<T>());
}

template <class T>
MatrixKernels<T> ChooseMatrixKernels() {
  return MEMORYFORMER_IN_USE(MakeMatrixKernels<T>());
}

inline OnePlusExpKernel ChooseOnePlusExp() { return MEMORYFORMER_IN_USE(OnePlusExp); }

inline FirstLargestKernel ChooseFirstLargest() {
  return MEMORYFORMER_IN_USE(FirstLargest);
}

inline UpdateKernels ChooseUpdateKernels() {
  return MEMORYFORMER_IN_USE(MakeUpdateKernels());
}

inline HeadKernels ChooseHeadKernels() { return MEMORYFORMER_IN_USE(MakeHeadKernels()); }

inline BlockKernels ChooseBlockKernels() { return MEMORYFORMER_IN_USE(MakeBlockKernels()); }

#undef MEMORYFORMER_IN_USE

inline IntegerKernels ChooseIntegerKernels() {
#if defined(__x86_64__)
  switch (InstructionSet()) {
    case 2:
      if (__builtin_cpu_supports("avx512vnni")) return avx512::MakeIntegerKernels();
      return avx2::MakeIntegerKernels();
    case 1:
      return avx2::MakeIntegerKernels();
  }
#endif
  return portable::MakeIntegerKernels();
}

constexpr int64_t kProductsPerThread = 1 << 17;  // less is not worth a wake-up

inline int ChooseThreads(const Shape& s) {
  const int64_t products = s.tokens * s.tables * s.features;
  const int64_t useful = products / kProductsPerThread;
  return useful < 2 ? 1 : static_cast<int>(std::min<int64_t>(useful, AvailableThreads()));
}

inline int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t Clamp(int32_t code, int64_t buckets) {
  return std::min<int64_t>(std::max<int32_t>(code, 0), buckets - 1);
}

template <class T>
struct Operands {
  Shape shape;
  const T* tables;        // [K, C, F]
  const float* scales;    // [K, C], or null: one scale per row, for int8
  const int32_t* codes;   // [N, K]
  const float* scores;    // [N, K]

  int64_t Row(int64_t n, int64_t k) const {
    return k * shape.buckets + Clamp(codes[n * shape.tables + k], shape.buckets);
  }
  float Weight(int64_t n, int64_t k, int64_t row) const {
    const float score = scores[n * shape.tables + k];
    return scales == nullptr ? score : score * scales[row];
  }
};

// --- Forward. ------------------------------------------------------------------------

// Tables larger than this are taken to lie in memory: all layers share the last cache,
// and what sysconf says of it is wrong on some processors.
constexpr int64_t kFarBytes = 8 << 20;


// Few tokens, or rows that caches hold: read every row in place.
template <class T, class Pool>
void ForwardInPlace(const Kernels<T>& kernels, const Operands<T>& op, float* y,
                    Pool& pool) {
  constexpr int kBlock = 128;  // rows whose addresses are resolved at a time
  const auto [N, K, C, F] = op.shape;
  const int threads = ChooseThreads(op.shape);
  const bool far = K * C * F * int64_t{sizeof(T)} > kFarBytes;
  // Columns are split only where tokens do not suffice; whole cache lines stay together.
  const int64_t token_parts = std::min<int64_t>(N, 4 * threads);
  const int64_t column_parts =
      N >= threads ? 1 : std::max<int64_t>(1, std::min<int64_t>(threads / N, F / 256));
  const int64_t columns = CeilDivide(CeilDivide(F, column_parts), 64) * 64;
  ParallelFor(pool, threads, token_parts * column_parts, [&](int64_t item) {
    const int64_t token_part = item / column_parts, column_part = item % column_parts;
    const int64_t f0 = std::min(F, column_part * columns);
    const int64_t f1 = std::min(F, f0 + columns);
    const T* rows[kBlock];
    float weights[kBlock];
    for (int64_t n = N * token_part / token_parts;
         n < N * (token_part + 1) / token_parts; ++n) {
      for (int64_t k0 = 0; k0 < K; k0 += kBlock) {
        const int count = static_cast<int>(std::min<int64_t>(kBlock, K - k0));
        for (int i = 0; i < count; ++i) {
          const int64_t row = op.Row(n, k0 + i);
          rows[i] = op.tables + row * F;
          weights[i] = op.Weight(n, k0 + i, row);
        }
        kernels.sum_columns(rows, weights, count, f0, f1, k0 == 0, far, y + n * F);
      }
    }
  });
}

// Many tokens: copy a slice of a group of tables into the cache and use it for a whole
// tile of tokens, so that a row is read from memory once per tile and not per token.
template <class T, class Pool>
void ForwardPacked(const Kernels<T>& kernels, const Operands<T>& op, float* y,
                   Pool& pool) {
  const auto [N, K, C, F] = op.shape;
  const int width = kernels.width, threads = ChooseThreads(op.shape);
  int log_group = 3;
  while (log_group > 0 && ((int64_t{1} << (log_group - 1)) >= K ||
                           (C * width * int64_t{sizeof(T)}) << log_group >
                               Level2CacheBytes() * 5 / 8))
    --log_group;
  const int64_t group = int64_t{1} << log_group, num_groups = CeilDivide(K, group);

  // Row in the block and weight of each lookup, [K / group, N, group].
  const Scratch rows_memory(num_groups * N * group * sizeof(uint16_t));
  const Scratch weights_memory(num_groups * N * group * sizeof(float));
  auto* rows = rows_memory.As<uint16_t>();
  auto* weights = weights_memory.As<float>();
  const int64_t parts = std::min<int64_t>(N, 4 * threads);
  ParallelFor(pool, threads, parts, [&](int64_t part) {
    for (int64_t n = N * part / parts; n < N * (part + 1) / parts; ++n)
      for (int64_t g = 0; g < num_groups; ++g) {
        const int64_t k0 = g * group, present = std::min(group, K - k0);
        uint16_t* group_rows = rows + (g * N + n) * group;
        float* group_weights = weights + (g * N + n) * group;
        for (int64_t j = 0; j < present; ++j) {
          const int64_t row = op.Row(n, k0 + j);
          group_rows[j] = static_cast<uint16_t>(row - k0 * C);
          group_weights[j] = op.Weight(n, k0 + j, row);
        }
        for (int64_t j = present; j < group; ++j)  // absent tables add 0 * 0
          group_rows[j] = static_cast<uint16_t>(j * C), group_weights[j] = 0;
      }
  });

  const int64_t num_slices = CeilDivide(F, width);
  int64_t num_tiles = CeilDivide(N, 4096);
  // More tiles than memory traffic asks for, if threads would have nothing to do.
  while (num_tiles * num_slices < threads && N / (2 * num_tiles) >= C) num_tiles *= 2;
  const int64_t tile = CeilDivide(N, num_tiles);
  num_tiles = CeilDivide(N, tile);  // rounding up may have left the last ones empty
  ParallelFor(pool, threads, num_tiles * num_slices, [&](int64_t item) {
    const int64_t n0 = item / num_slices * tile;
    const int64_t count = std::min(tile, N - n0);
    const int64_t f0 = item % num_slices * width;
    const int columns = static_cast<int>(std::min<int64_t>(width, F - f0));
    const Scratch block_memory(group * C * width * sizeof(T));
    const Scratch sums_memory(count * width * sizeof(float));
    T* block = block_memory.As<T>();
    float* sums = sums_memory.As<float>();
    for (int64_t g = 0; g < num_groups; ++g) {
      const T* source = op.tables + g * group * C * F + f0;
      const int64_t present = std::min(group, K - g * group);
      kernels.pack_slice(source, present * C, F, columns, block);
      for (int64_t j = present; j < group; ++j)
        std::memset(block + j * C * width, 0, width * sizeof(T));
      const int64_t next = std::clamp<int64_t>(K - (g + 1) * group, 0, group) * C;
      const int64_t at = (g * N + n0) * group;
      kernels.add_group[log_group](block, rows + at, weights + at, count, g == 0, sums,
                                   source + group * C * F, next, F);
    }
    for (int64_t n = 0; n < count; ++n)
      std::memcpy(y + (n0 + n) * F + f0, sums + n * width, columns * sizeof(float));
  });
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
  if (C <= UINT16_MAX && N >= packing_reuse.load() * C)
    ForwardPacked(kernels, op, y, pool);
  else
    ForwardInPlace(kernels, op, y, pool);
}

// --- Backward. -----------------------------------------------------------------------

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

