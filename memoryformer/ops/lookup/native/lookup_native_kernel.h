// The inner loops of the native lookup, written once and compiled for one instruction
// set per inclusion. Before including, define
//   SIMD_NAMESPACE  the namespace of this copy
//   SIMD_TARGET     the function attribute that selects the instruction set
//   SIMD_LANES      floats in one vector register
// A slice is kWidth columns of a row, as many as leave room in the registers.
// Every sum runs over k, or over tokens, in ascending order, whatever the tiling.

namespace SIMD_NAMESPACE {

constexpr int kLanes = SIMD_LANES;
constexpr int kVectors = 4;
constexpr int kWidth = kLanes * kVectors;
// The slice of dy of 4096 tokens takes 512 KiB: half of what a second cache often has.
constexpr int kGradientVectors = kLanes == 16 ? 2 : 4;
constexpr int kGradientWidth = kLanes * kGradientVectors;

typedef float Vec __attribute__((vector_size(4 * SIMD_LANES)));
typedef uint32_t WordVec __attribute__((vector_size(4 * SIMD_LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * SIMD_LANES)));
// The same vectors at any address, over memory of any type.
typedef float AnyVec __attribute__((vector_size(4 * SIMD_LANES), aligned(4), may_alias));
typedef int32_t AnyIntVec
    __attribute__((vector_size(4 * SIMD_LANES), aligned(4), may_alias));
typedef uint16_t AnyHalfVec
    __attribute__((vector_size(2 * SIMD_LANES), aligned(2), may_alias));
typedef uint16_t HalfVec __attribute__((vector_size(2 * SIMD_LANES)));
typedef int8_t AnyByteVec
    __attribute__((vector_size(SIMD_LANES), aligned(1), may_alias));

SIMD_TARGET inline Vec Load(const float* p) {
  return *reinterpret_cast<const AnyVec*>(p);
}
// Compilers widen generic vectors of small integers lane by lane: hence the intrinsics.
SIMD_TARGET inline Vec Load(const BFloat16* p) {
#if SIMD_LANES == 16
  const auto wide = (WordVec)_mm512_cvtepu16_epi32(
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif SIMD_LANES == 8
  const auto wide = (WordVec)_mm256_cvtepu16_epi32(
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  const auto wide =
      __builtin_convertvector(*reinterpret_cast<const AnyHalfVec*>(p), WordVec);
#endif
  return (Vec)(wide << 16);
}
SIMD_TARGET inline Vec Load(const int8_t* p) {
#if SIMD_LANES == 16
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif SIMD_LANES == 8
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(
      _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  const auto bytes = *reinterpret_cast<const AnyByteVec*>(p);
  return __builtin_convertvector(__builtin_convertvector(bytes, IntVec), Vec);
#endif
}

SIMD_TARGET inline void Store(float* p, Vec v) { *reinterpret_cast<AnyVec*>(p) = v; }
SIMD_TARGET inline void Store(BFloat16* p, Vec v) {  // to nearest, ties to even
  const WordVec bits = (WordVec)v;
  const WordVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const WordVec is_nan = (WordVec)(v != v);
  const WordVec kept = (rounded & ~is_nan) | (is_nan & 0x7fc0);
  *reinterpret_cast<AnyHalfVec*>(p) = __builtin_convertvector(kept, HalfVec);
}

// --- Forward, few tokens: every row is read where it lies. ---------------------------

#include "rows_native_kernel.h"

template <class T, int kCount>
SIMD_TARGET inline void SumRows(const T* const* rows, const float* weights, int count,
                                int64_t column, bool first, float* y) {
  Vec sum[kCount];
  for (int v = 0; v < kCount; ++v)
    sum[v] = first ? Vec{} : Load(y + column + v * kLanes);
  for (int k = 0; k < count; ++k) {
    const T* row = rows[k] + column;
    for (int v = 0; v < kCount; ++v) sum[v] += weights[k] * Load(row + v * kLanes);
  }
  for (int v = 0; v < kCount; ++v) Store(y + column + v * kLanes, sum[v]);
}

// y[begin:end] (+)= sum_k weights[k] * rows[k][begin:end], in the order of k. Rows that are
// `far`, in memory and not in a cache, are read another way.
template <class T>
SIMD_TARGET void SumColumns(const T* const* rows, const float* weights, int count,
                            int64_t begin, int64_t end, bool first, bool far,
                            float* y) {
  if (far) return SumFarColumns(rows, weights, count, begin, end, first, y);
  constexpr int kStrip = 8 * kLanes;
  int64_t f = begin;
  for (; f + kStrip <= end; f += kStrip)
    SumRows<T, 8>(rows, weights, count, f, first, y);
  for (; f + 2 * kLanes <= end; f += 2 * kLanes)
    SumRows<T, 2>(rows, weights, count, f, first, y);
  for (; f + kLanes <= end; f += kLanes) SumRows<T, 1>(rows, weights, count, f, first, y);
  for (; f < end; ++f) {
    float sum = first ? 0.0f : y[f];
    for (int k = 0; k < count; ++k) sum += weights[k] * ToFloat(rows[k][f]);
    y[f] = sum;
  }
}

// --- Backward: tokens sorted by bucket, so dT stays in registers. --------------------

// block[r, 0:kColumns] = rows[r, 0:width] of a [rows, stride] array, padded with zeros.
template <class T, int kColumns>
SIMD_TARGET void PackSlice(const T* source, int64_t num_rows, int64_t stride, int width,
                           T* block) {
  if (width == kColumns) {
    for (int64_t r = 0; r < num_rows; ++r)
      std::memcpy(block + r * kColumns, source + r * stride, kColumns * sizeof(T));
    return;
  }
  for (int64_t r = 0; r < num_rows; ++r) {
    std::memcpy(block + r * kColumns, source + r * stride, width * sizeof(T));
    std::memset(block + r * kColumns + width, 0, (kColumns - width) * sizeof(T));
  }
}

// out[i] += sum of partial[i, :], for i < count; the same order for every i.
SIMD_TARGET inline void AddLaneSums(const float* partial, int64_t count, float* out) {
  int64_t i = 0;
#if SIMD_LANES > 4
  for (; i + 4 <= count; i += 4) {
    __m128 quad[4];
    for (int q = 0; q < 4; ++q) {
      const float* p = partial + (i + q) * kLanes;
      __m256 eight = _mm256_loadu_ps(p);
      if (kLanes == 16) eight = _mm256_add_ps(eight, _mm256_loadu_ps(p + kLanes - 8));
      quad[q] =
          _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    }
    const __m128 sums =
        _mm_hadd_ps(_mm_hadd_ps(quad[0], quad[1]), _mm_hadd_ps(quad[2], quad[3]));
    _mm_storeu_ps(out + i, _mm_add_ps(_mm_loadu_ps(out + i), sums));
  }
#endif
  for (; i < count; ++i) {
    float part[kLanes];
    std::memcpy(part, partial + i * kLanes, sizeof(part));
    for (int half = kLanes / 2; half >= 4; half /= 2)
      for (int l = 0; l < half; ++l) part[l] += part[l + half];
    out[i] += (part[0] + part[1]) + (part[2] + part[3]);
  }
}

// One slice of one table. For each bucket c, over its tokens n = order[begin..end):
//   drows[c] = sum scores[n] * dy[n];   dscores[n] += dy[n] . rows[c].
// `dy` is a packed slice [N, kGradientWidth]; `order`, `scores`, `dscores` are sorted by
// bucket, and kAhead more values of `order` can be read: the rows of dy come from a far
// cache, and a bucket is too short for the processor to see past its end.
template <class T>
SIMD_TARGET void TableGradients(const T* rows, int64_t num_buckets, int64_t stride,
                                int width, const float* dy, const int32_t* starts,
                                const int32_t* order, const float* scores,
                                float* dscores, T* drows) {
  constexpr int kBatch = 32;
  constexpr int kRowsAhead = 4;  // a stride is a page: the processor fetches none itself
  alignas(64) float partial[kBatch * kLanes];
  alignas(64) T padded[kGradientWidth];
  int filled = 0;
  int64_t flushed = 0;
  for (int64_t c = 0; c < num_buckets; ++c) {
    const T* row = rows + c * stride;
    if (c + kRowsAhead < num_buckets)
      for (int f = 0; f < kGradientWidth; f += 64 / sizeof(T)) {
        __builtin_prefetch(row + kRowsAhead * stride + f);
        __builtin_prefetch(drows + (c + kRowsAhead) * stride + f, 1);
      }
    if (width < kGradientWidth) {
      std::memset(padded, 0, sizeof(padded));
      std::memcpy(padded, row, width * sizeof(T));
      row = padded;
    }
    Vec value[kGradientVectors], sum[kGradientVectors];
    for (int v = 0; v < kGradientVectors; ++v)
      value[v] = Load(row + v * kLanes), sum[v] = Vec{};
    for (int32_t i = starts[c]; i < starts[c + 1]; ++i) {
      const float* gradient = dy + int64_t{order[i]} * kGradientWidth;
      const float* soon = dy + int64_t{order[i + kAhead]} * kGradientWidth;
      for (int f = 0; f < kGradientWidth; f += 16) __builtin_prefetch(soon + f);
      const float score = scores[i];
      Vec dot{};
      for (int v = 0; v < kGradientVectors; ++v) {
        const Vec g = Load(gradient + v * kLanes);
        sum[v] += score * g;
        dot += value[v] * g;
      }
      Store(partial + filled * kLanes, dot);
      if (++filled == kBatch) {
        AddLaneSums(partial, kBatch, dscores + flushed);
        flushed += kBatch;
        filled = 0;
      }
    }
    T* drow = width < kGradientWidth ? padded : drows + c * stride;
    for (int v = 0; v < kGradientVectors; ++v) Store(drow + v * kLanes, sum[v]);
    if (width < kGradientWidth) std::memcpy(drows + c * stride, padded, width * sizeof(T));
  }
  AddLaneSums(partial, filled, dscores + flushed);
}

#include "packed_native_kernel.h"

template <class T>
Kernels<T> MakeKernels() {
  Kernels<T> kernels;
  kernels.width = kSliceColumns<T>;
  kernels.gradient_width = kGradientWidth;
  kernels.sum_columns = SumColumns<T>;
  kernels.copy_rows = CopyRows<T>;
  kernels.pack_gradient = PackSlice<float, kGradientWidth>;
  kernels.add_group[0] = AddGroup<T, 1>;
  kernels.add_group[1] = AddGroup<T, 2>;
  kernels.add_group[2] = AddGroup<T, 4>;
  kernels.add_group[3] = AddGroup<T, 8>;
  if constexpr (!std::is_same_v<T, int8_t>) kernels.table_gradients = TableGradients<T>;
  return kernels;
}

#include "decode_native_kernel.h"
#include "integer_native_kernel.h"
#include "update_native_kernel.h"
#include "head_native_kernel.h"
#include "attention_native_kernel.h"
#include "block_native_kernel.h"

}  // namespace SIMD_NAMESPACE

#undef SIMD_NAMESPACE
#undef SIMD_TARGET
#undef SIMD_LANES
