// Softmax attention of many queries over a cache, whose logits are never in memory:
//
//   o = sum_j e^(l_j - m) v_j / sum_j e^(l_j - m),   l_j = q . k_j / sqrt(E),   m = max_j l_j
//
// over the keys that a query may see: of its own document, none ahead of it, no padding. Keys
// come in blocks; m is the largest so far, and what was summed is rescaled where it grows.
// Start at `Attend`.

#pragma once

#include "lookup_native.h"

namespace memoryformer {

template <class T>
struct Attention {
  int64_t batch, length, heads, width, room;  // B, L, H, E, M
  const float* q;                             // [B, L, H, E]
  const T *keys, *values;                     // [B, H, M, E]
  const int32_t* index;                       // [B, L], of a query among the keys
  const int32_t* segments;                    // [B, L]; 0 is padding
  const int32_t* key_segments;                // [B, M]
  int64_t filled;                             // keys that are there
  float* y;                                   // [B, L, H, E]
};

constexpr int64_t kKeyBlock = 128;
constexpr int64_t kQueryTile = 48;   // their logits of a block fit the first cache
constexpr int64_t kQueryPart = 512;  // at most so many share the packed keys

// Some queries of one head, and what they have summed.
struct QueryPart {
  int64_t first, count, padded;  // padded: E, up to whole panels
  float *q, *sums;               // [count, E], [count, padded]
  float *largest, *total;        // [count]
};

// Keys by panel, [panels, E, panel]: transposed, with zeros for those that are absent.
template <class T>
void PackKeys(const T* keys, int64_t count, int64_t width, int64_t panel, float* packed) {
  for (int64_t j0 = 0; j0 < count; j0 += panel, packed += width * panel) {
    const int64_t present = std::min(panel, count - j0);
    if (present < panel) std::fill_n(packed, width * panel, 0.0f);
    for (int64_t e0 = 0; e0 < width; e0 += 16)
      for (int64_t j = 0; j < present; ++j) {
        const T* key = keys + (j0 + j) * width;
        for (int64_t e = e0; e < std::min(width, e0 + 16); ++e)
          packed[e * panel + j] = ToFloat(key[e]);
      }
  }
}

// Values by panel of columns, [padded / panel, count, panel].
template <class T>
void PackValues(const T* values, int64_t count, int64_t width, int64_t panel, float* packed) {
  for (int64_t e0 = 0; e0 < width; e0 += panel)
    for (int64_t j = 0; j < count; ++j, packed += panel) {
      const int64_t present = std::min(panel, width - e0);
      for (int64_t e = 0; e < present; ++e) packed[e] = ToFloat(values[j * width + e0 + e]);
      std::fill(packed + present, packed + panel, 0.0f);
    }
}

// The logits [rows, kKeyBlock] of queries t .. t + rows with `count` keys from `begin` on become
// weights; `common` is the segment of all these keys, or -1.
template <class T>
void WeighRows(const Attention<T>& op, const AttentionKernels& kernels, int64_t b, int64_t t,
               int64_t rows, int64_t begin, int64_t count, int64_t columns, int32_t common,
               QueryPart& part, float* logits) {
  const float scale = 1 / std::sqrt(static_cast<float>(op.width));
  const int32_t* segments = op.key_segments + b * op.room + begin;
  int32_t seen[kKeyBlock] = {};
  for (int64_t r = 0; r < rows; ++r, logits += kKeyBlock) {
    const int64_t n = b * op.length + part.first + t + r, at = t + r;
    const int32_t own = op.segments[n];
    int64_t visible = std::min(count, op.index[n] + 1 - begin);
    if (own == 0 || (common >= 0 && common != own)) visible = 0;
    if (common < 0)
      for (int64_t j = 0; j < count; ++j) seen[j] = segments[j] == own;
    kernels.softmax(logits, columns, scale, static_cast<int32_t>(visible),
                    common < 0 ? seen : nullptr, part.largest + at, part.total + at,
                    part.sums + at * part.padded, part.padded);
  }
}

// What the queries of a part of head h read.
template <class T>
void AttendPart(const Attention<T>& op, const AttentionKernels& kernels, int64_t b, int64_t h,
                QueryPart& part) {
  const int64_t E = op.width, panel = kernels.panel;
  const Scratch keys_memory(kKeyBlock * E * sizeof(float));
  const Scratch values_memory(kKeyBlock * part.padded * sizeof(float));
  const Scratch logits_memory(kQueryTile * kKeyBlock * sizeof(float));
  auto *keys = keys_memory.As<float>(), *values = values_memory.As<float>();
  auto* logits = logits_memory.As<float>();
  const int32_t* index = op.index + b * op.length + part.first;
  const int64_t last = *std::max_element(index, index + part.count);
  const int64_t end = std::min({op.filled, op.room, last + 1});
  for (int64_t begin = 0; begin < end; begin += kKeyBlock) {
    const int64_t count = std::min(kKeyBlock, end - begin);
    const int64_t at = ((b * op.heads + h) * op.room + begin) * E;
    PackKeys(op.keys + at, count, E, panel, keys);
    PackValues(op.values + at, count, E, panel, values);
    const int32_t* segments = op.key_segments + b * op.room + begin;
    const bool alike = std::count(segments, segments + count, *segments) == count;
    for (int64_t t = 0; t < part.count; t += kQueryTile) {
      const int64_t rows = std::min(kQueryTile, part.count - t);
      const int64_t furthest = *std::max_element(index + t, index + t + rows);
      const int64_t needed = std::min(count, furthest + 1 - begin);
      if (needed <= 0) continue;
      const int64_t columns = CeilDivide(needed, panel) * panel;
      for (int64_t p = 0; p < columns; p += panel)
        kernels.multiply({part.q + t * E, E, 1, E, 1, 0}, rows, keys + p * E, logits + p,
                         kKeyBlock, false);
      WeighRows(op, kernels, b, t, rows, begin, needed, columns,
                alike ? std::max(0, *segments) : -1, part, logits);
      for (int64_t p = 0; p < part.padded; p += panel)
        kernels.multiply({logits, kKeyBlock, 1, needed, 1, 0}, rows, values + p * count,
                         part.sums + t * part.padded + p, part.padded, true);
    }
  }
}

template <class T, class Pool>
void Attend(const Attention<T>& op, Pool& pool) {
  const int64_t B = op.batch, L = op.length, H = op.heads, E = op.width;
  if (B * L * H * E == 0) return;
  const AttentionKernels kernels = ChooseAttentionKernels();
  const int threads = ChooseThreads({B * L, H, 1, E * std::min(op.filled + 1, op.room)});
  // Parts of a head's queries, so that every thread has some.
  const int64_t wanted = CeilDivide(threads, B * H);
  const int64_t size = std::min(kQueryPart, CeilDivide(CeilDivide(L, wanted), 12) * 12);
  const int64_t parts = CeilDivide(L, size);
  ParallelFor(pool, threads, B * H * parts, [&](int64_t item) {
    const int64_t b = item / parts / H, h = item / parts % H, n0 = item % parts * size;
    const int64_t count = std::min(size, L - n0);
    const int64_t padded = CeilDivide(E, kernels.panel) * kernels.panel;
    const Scratch memory(count * (E + padded + 2) * sizeof(float));
    auto* q = memory.As<float>();
    float* sums = q + count * E;
    QueryPart part{n0, count, padded, q, sums, sums + count * padded,
                   sums + count * (padded + 1)};
    std::fill_n(sums, count * padded, 0.0f);
    std::fill_n(part.largest, count, kUnseen);
    std::fill_n(part.total, count, 0.0f);
    const int64_t at = ((b * L + n0) * H + h) * E;
    for (int64_t n = 0; n < count; ++n) std::copy_n(op.q + at + n * H * E, E, q + n * E);
    AttendPart(op, kernels, b, h, part);
    for (int64_t n = 0; n < count; ++n) {
      const float inverse = part.total[n] == 0 ? 0 : 1 / part.total[n];
      float* y = op.y + at + n * H * E;
      for (int64_t e = 0; e < E; ++e) y[e] = sums[n * padded + e] * inverse;
    }
  });
}

}  // namespace memoryformer
