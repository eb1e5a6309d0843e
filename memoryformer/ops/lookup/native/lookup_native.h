// The native lookup on CPU, y[n] = sum_k scores[n,k] * tables[k, codes[n,k]]: what all of it
// shares. Plain C++: lookup_native.cc connects it to XLA.
//
// Work is cut into items; no two items write the same element and each sum has a fixed
// order, so the result does not depend on which thread does what. Start at `Forward` in
// forward_native.h and `Backward` in backward_native.h; the inner loops are in
// lookup_native_kernel.h.

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

inline int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kRowsAhead = 64;

// Rows wanted[0:count] of an array of `stride` columns, of which `columns` are copied to
// `block`; those before `done` are there. kRowsAhead more of `wanted` can be read.
template <class T>
struct RowCopy {
  const T* source;
  const int32_t* wanted;
  int64_t count, stride;
  int columns;
  T* block;
  int64_t done = 0;
};

template <class T>
struct Kernels {
  int width, gradient_width;  // columns of a slice: forward, backward
  void (*sum_columns)(const T* const*, const float*, int, int64_t, int64_t, bool, bool,
                      float*);
  void (*copy_rows)(RowCopy<T>&, int64_t);
  void (*add_group[4])(const T*, const uint16_t*, const float*, int64_t, bool, float*,
                       RowCopy<T>&);
  void (*pack_gradient)(const float*, int64_t, int64_t, int, float*);
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
  // y[t * stride + i] = row i . x[t], t < tokens; the kernel reads as many x as it can
  using Dots = void (*)(const T* const* rows, const float* scales, const float* const* x,
                        int64_t width, int64_t tokens, int64_t stride, float* y);
  struct Some {
    Dots many;      // `count` rows
    int64_t count;
    Dots one;       // one row
  };
  Some one_token, four_tokens;
};
constexpr int64_t kMostRows = 16;  // `count` is no more

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

// Inner loops of attention_native.h; `multiply` is the head's.
struct AttentionKernels {
  int64_t panel;
  void (*multiply)(Factor, int64_t, const float*, float*, int64_t, bool);
  void (*softmax)(float*, int64_t, float, int32_t, const int32_t*, float*, float*, float*,
                  int64_t);
};
constexpr float kUnseen = -3.4028234663852886e38f;  // the logit of a key that is not seen

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
  // `then` is what is read after
  void (*key_logits)(const float*, int64_t, int64_t, const float*, int64_t, int64_t, float,
                     const float* then, float*, int64_t);
  float (*softmax_weights)(float*, const int32_t*, int64_t);
  void (*weigh_values)(const float*, const float*, int64_t, int64_t, int64_t, int64_t,
                       const float*, const float* then, float*, int64_t);
};
constexpr int kMostQueries = 4;  // that share a read of keys and values

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

inline AttentionKernels ChooseAttentionKernels() {
  return MEMORYFORMER_IN_USE(MakeAttentionKernels());
}
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

}  // namespace memoryformer
