// The head and its loss in one call, with gradients:
//
//   nats = sum_n w[n] (log sum_v exp(l[n, v]) - l[n, t[n]]),   l = x W
//   dl = w (softmax(l) - onehot(t));   dx = dl W';   dW = x' dl
//
// Logits exist for one tile of tokens in a cache, where they become dl. Work is cut so that no
// two items write the same element, and each sum has a fixed order. Start at `HeadNats`.

#pragma once

#include <cmath>

#include "lookup_native.h"

namespace memoryformer {

struct Head {
  int64_t tokens, width, vocabulary;  // N, D, V
  const float* x;                     // [N, D]
  const float* kernel;                // [D, V]
  const int32_t* targets;             // [N]
  const float* weights;               // [N]
  float *dx, *dkernel;                // [N, D], [D, V]
};

constexpr int64_t kHeadTile = 96;           // tokens; their logits stay in a cache
constexpr int64_t kHeadDepth = 256;         // of a product at a time: a panel of it is in L1
constexpr int64_t kHeadBytes = 48 << 20;    // of dl at a time
constexpr float kAbsent = -1e30f;           // a logit beyond the vocabulary

// packed[p, r, 0:panel] = source[r, p * panel ..], of [rows, columns]; zeros beyond.
inline void PackPanel(const float* source, int64_t rows, int64_t columns, int64_t p,
                      int64_t panel, float* packed) {
  const int64_t begin = p * panel, count = std::min(panel, columns - begin);
  for (int64_t r = 0; r < rows; ++r, packed += panel) {
    std::memcpy(packed, source + r * columns + begin, count * sizeof(float));
    std::memset(packed + count, 0, (panel - count) * sizeof(float));
  }
}

// packed[q, c, 0:panel] = source[q * panel .., c]: the panels of the transposed matrix. Both
// sides have `padded` columns, as panels of `PackPanel` have them.
inline void PackTransposed(const float* source, int64_t rows, int64_t columns, int64_t q,
                           int64_t panel, int64_t padded, float* packed) {
  const int64_t begin = q * panel, count = std::min(panel, rows - begin);
  std::memset(packed, 0, padded * panel * sizeof(float));
  for (int64_t c0 = 0; c0 < columns; c0 += 16)
    for (int64_t r = 0; r < count; ++r)
      for (int64_t c = c0; c < std::min(columns, c0 + 16); ++c)
        packed[c * panel + r] = source[(begin + r) * columns + c];
}

struct PackedHead {
  int64_t panel, panels, width_panels;
  const float* by_token;  // [V / panel, D, panel]
  const float* by_width;  // [D / panel, V, panel]
};

// One tile of tokens: dl in `gradients` [V / panel, kHeadTile, panel], dx, and the nats.
inline void HeadTile(const Head& head, const PackedHead& packed, const HeadKernels& kernels,
                     int64_t n0, int64_t count, float* gradients, double* nats) {
  const int64_t D = head.width, panel = packed.panel, stride = kHeadTile * panel;
  for (int64_t p = 0; p < packed.panels; ++p)
    for (int64_t d = 0; d < D; d += kHeadDepth) {
      const Factor x{head.x + n0 * D + d, D, 1, std::min(kHeadDepth, D - d), 1, 0};
      kernels.multiply(x, count, packed.by_token + (p * D + d) * panel,
                       gradients + p * stride, panel, d > 0);
    }
  for (int64_t t = 0; t < count; ++t) {
    float* logits = gradients + t * panel;
    for (int64_t v = head.vocabulary; v < packed.panels * panel; ++v)
      logits[v / panel * stride + v % panel] = kAbsent;
    const float weight = head.weights[n0 + t] > 0 ? head.weights[n0 + t] : 0;
    const int64_t target = head.targets[n0 + t];
    const bool known = target >= 0 && target < head.vocabulary;
    float* chosen = logits + target / panel * stride + target % panel;
    const float logit = known ? *chosen : 0;
    const float log_total = kernels.softmax(logits, packed.panels, stride, weight);
    nats[n0 + t] = weight > 0 ? weight * (double{log_total} - logit) : 0;
    if (known) *chosen -= weight;
    if (weight > 0) continue;  // not a product: 0 * inf would be nan
    for (int64_t p = 0; p < packed.panels; ++p)
      std::memset(logits + p * stride, 0, panel * sizeof(float));
  }
  const Scratch sums_memory(packed.width_panels * stride * sizeof(float));
  auto* sums = sums_memory.As<float>();
  const int64_t step = std::max<int64_t>(1, kHeadDepth / panel);
  for (int64_t p = 0; p < packed.panels; p += step)
    for (int64_t q = 0; q < packed.width_panels; ++q) {
      const int64_t blocks = std::min(step, packed.panels - p);
      const Factor dl{gradients + p * stride, panel, 1, panel, blocks, stride};
      kernels.multiply(dl, count, packed.by_width + (q * packed.panels + p) * panel * panel,
                       sums + q * stride, panel, p > 0);
    }
  for (int64_t t = 0; t < count; ++t)
    for (int64_t q = 0; q < packed.width_panels; ++q)
      std::memcpy(head.dx + (n0 + t) * D + q * panel, sums + q * stride + t * panel,
                  std::min(panel, D - q * panel) * sizeof(float));
}

// dW[:, panel p] of the tiles from token n0 on; added to what is there unless they are first.
inline void HeadPanel(const Head& head, const PackedHead& packed, const HeadKernels& kernels,
                      int64_t p, int64_t n0, int64_t end, const float* gradients) {
  const int64_t D = head.width, V = head.vocabulary, panel = packed.panel;
  const Scratch sums_memory(D * panel * sizeof(float));
  auto* sums = sums_memory.As<float>();
  if (n0 > 0) PackPanel(head.dkernel, D, V, p, panel, sums);
  for (int64_t n = n0; n < end; n += kHeadTile) {
    const int64_t tile = (n - n0) / kHeadTile * packed.panels + p;
    const Factor x{head.x + n * D, 1, D, std::min(kHeadTile, end - n), 1, 0};
    kernels.multiply(x, D, gradients + tile * kHeadTile * panel, sums, panel, n > 0);
  }
  const int64_t columns = std::min(panel, V - p * panel);
  for (int64_t d = 0; d < D; ++d)
    std::memcpy(head.dkernel + d * V + p * panel, sums + d * panel, columns * sizeof(float));
}

template <class Pool>
float HeadNats(const Head& head, Pool& pool) {
  const int64_t N = head.tokens, D = head.width, V = head.vocabulary;
  const HeadKernels kernels = ChooseHeadKernels();
  const int64_t panel = kernels.panel, panels = CeilDivide(V, panel);
  const int64_t width_panels = CeilDivide(D, panel), tile_values = panels * panel * kHeadTile;
  const Scratch by_token_memory(panels * D * panel * sizeof(float));
  const Scratch by_width_memory(width_panels * panels * panel * panel * sizeof(float));
  auto* by_token = by_token_memory.As<float>();
  auto* by_width = by_width_memory.As<float>();
  const PackedHead packed{panel, panels, width_panels, by_token, by_width};
  const int threads = ChooseThreads({N, 1, 1, V * D});
  ParallelFor(pool, threads, panels + width_panels, [&](int64_t i) {
    if (i < width_panels)
      PackTransposed(head.kernel, D, V, i, panel, panels * panel,
                     by_width + i * panels * panel * panel);
    else
      PackPanel(head.kernel, D, V, i - width_panels, panel,
                by_token + (i - width_panels) * D * panel);
  });
  const int64_t most = std::max<int64_t>(1, kHeadBytes / (tile_values * sizeof(float)));
  const int64_t tiles = std::min(most, std::max<int64_t>(1, CeilDivide(N, kHeadTile)));
  const Scratch gradients_memory(tiles * tile_values * sizeof(float));
  auto* gradients = gradients_memory.As<float>();
  std::vector<double> nats(N);
  std::fill_n(head.dkernel, N == 0 ? D * V : 0, 0.0f);
  for (int64_t n0 = 0; n0 < N; n0 += tiles * kHeadTile) {
    const int64_t end = std::min(N, n0 + tiles * kHeadTile);
    ParallelFor(pool, threads, CeilDivide(end - n0, kHeadTile), [&](int64_t i) {
      const int64_t n = n0 + i * kHeadTile;
      HeadTile(head, packed, kernels, n, std::min(kHeadTile, end - n),
               gradients + i * tile_values, nats.data());
    });
    ParallelFor(pool, threads, panels, [&](int64_t p) {
      HeadPanel(head, packed, kernels, p, n0, end, gradients);
    });
  }
  double total = 0;
  for (double x : nats) total += x;
  return static_cast<float>(total);
}

}  // namespace memoryformer
