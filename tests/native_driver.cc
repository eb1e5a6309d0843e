// Runs the native lookup on ragged shapes, without XLA, for the sanitizers.
// Arrays are exactly as large as they should be, so that one byte too far is an error.

#include <cmath>
#include <cstdio>
#include <random>
#include <thread>

#include "attention_native.h"
#include "backward_native.h"
#include "block_native.h"
#include "decode_native.h"
#include "head_native.h"
#include "lookup_native.h"
#include "screen_search_native.h"
#include "update_native.h"

using namespace memoryformer;

struct ThreadPerTask {
  std::vector<std::thread> threads;
  template <class Work>
  void Schedule(Work work) {
    threads.emplace_back(work);
  }
  ~ThreadPerTask() {
    for (auto& thread : threads) thread.join();
  }
};

template <class T>
T Make(float value);
template <>
float Make<float>(float value) {
  return value;
}
template <>
BFloat16 Make<BFloat16>(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return {static_cast<uint16_t>(bits >> 16)};
}
template <>
int8_t Make<int8_t>(float value) {
  return static_cast<int8_t>(30 * value);
}

template <class T>
std::unique_ptr<T[]> Exactly(int64_t count) {
  return std::unique_ptr<T[]>(new T[count]);
}

template <class T>
bool Check(const Shape& shape, std::mt19937& random) {
  const auto [N, K, C, F] = shape;
  std::normal_distribution<float> normal;
  std::uniform_int_distribution<int32_t> any_code(-3, static_cast<int32_t>(C) + 3);
  auto tables = Exactly<T>(K * C * F), dtables = Exactly<T>(K * C * F);
  auto scales = Exactly<float>(K * C), scores = Exactly<float>(N * K);
  auto dscores = Exactly<float>(N * K), y = Exactly<float>(N * F);
  auto codes = Exactly<int32_t>(N * K);
  for (int64_t i = 0; i < K * C * F; ++i) tables[i] = Make<T>(normal(random));
  for (int64_t i = 0; i < K * C; ++i) scales[i] = normal(random);
  for (int64_t i = 0; i < N * K; ++i) scores[i] = normal(random);
  for (int64_t i = 0; i < N * K; ++i) codes[i] = any_code(random);
  if (N * K > 2) codes[0] = INT32_MIN, codes[1] = INT32_MAX;
  const bool scaled = std::is_same_v<T, int8_t>;
  const Operands<T> op{shape, tables.get(), scaled ? scales.get() : nullptr, codes.get(),
                       scores.get()};
  {
    ThreadPerTask pool;
    Forward(op, y.get(), pool);
  }
  double worst = 0;
  for (int64_t n = 0; n < N; ++n)
    for (int64_t f = 0; f < F; ++f) {
      double sum = 0, size = 1;
      for (int64_t k = 0; k < K; ++k) {
        const int64_t row = op.Row(n, k);
        const double term = double{op.Weight(n, k, row)} * ToFloat(tables[row * F + f]);
        sum += term, size += std::abs(term);
      }
      worst = std::max(worst, std::abs(sum - y[n * F + f]) / size);
    }
  if constexpr (!std::is_same_v<T, int8_t>) {
    ThreadPerTask pool;
    Backward(op, y.get(), dtables.get(), dscores.get(), pool);
  }
  return worst < 1e-5;
}

// A whole memory layer, against its own hash and the lookup's sums.
template <class T>
bool CheckLayer(int64_t N, int64_t K, int64_t bits, int64_t F, std::mt19937& random) {
  const Shape shape{N, K, int64_t{1} << bits, F};
  std::normal_distribution<float> normal;
  auto tables = Exactly<T>(K * shape.buckets * F);
  auto scales = Exactly<float>(K * shape.buckets), x = Exactly<float>(N * K * bits);
  auto bias = Exactly<float>(F), y = Exactly<float>(N * F), z = Exactly<float>(2 * N * F);
  auto scores = Exactly<float>(2 * N * K);
  auto codes = Exactly<int32_t>(2 * N * K);
  for (int64_t i = 0; i < K * shape.buckets * F; ++i) tables[i] = Make<T>(normal(random));
  for (int64_t i = 0; i < K * shape.buckets; ++i) scales[i] = normal(random);
  for (int64_t i = 0; i < N * K * bits; ++i) x[i] = normal(random);
  for (int64_t f = 0; f < F; ++f) bias[f] = normal(random);
  const bool scaled = std::is_same_v<T, int8_t>;
  const OnePlusExpKernel one_plus_exp = ChooseOnePlusExp();
  bool same = true;
  for (const float gamma : {0.0f, 1.0f, 0.7f})
    for (const bool two_rows : {false, true}) {
      const Hash hash{bits, gamma > 0, 2.0f, gamma, two_rows};
      ThreadPerTask pool;
      MemoryLayer(shape, tables.get(), scaled ? scales.get() : nullptr, x.get(), bias.get(),
                  hash, y.get(), pool);
      for (int64_t n = 0; n < N; ++n)
        HashToken(one_plus_exp, x.get() + n * K * bits, K, hash, N * K, codes.get() + n * K,
                  scores.get() + n * K);
      for (int64_t row = 0; row < 1 + two_rows; ++row)
        Forward(Operands<T>{shape, tables.get(), scaled ? scales.get() : nullptr,
                            codes.get() + row * N * K, scores.get() + row * N * K},
                z.get() + row * N * F, pool);
      for (int64_t i = 0; i < N * F; ++i) {
        const float sum = two_rows ? z[i] + z[N * F + i] : z[i];
        same = same && y[i] == sum + bias[i % F];
      }
    }
  return same;
}

template <class T>
bool CheckProduct(int64_t V, int64_t D, int64_t N, std::mt19937& random) {
  constexpr bool pairs = std::is_same_v<T, Int4Pair>, scaled = pairs || sizeof(T) == 1;
  const int64_t stored = V * (pairs ? D / 2 : D);
  std::normal_distribution<float> normal;
  auto weights = Exactly<T>(stored);
  auto scales = Exactly<float>(V * (pairs ? D / kInt4Group : 1));
  auto x = Exactly<float>(N * D), y = Exactly<float>(N * V);
  for (int64_t i = 0; i < stored; ++i) {
    if constexpr (pairs) weights[i] = {static_cast<uint8_t>(random())};
    else weights[i] = Make<T>(normal(random));
  }
  for (int64_t i = 0; i < V * (pairs ? D / kInt4Group : 1); ++i) scales[i] = normal(random);
  for (int64_t i = 0; i < N * D; ++i) x[i] = normal(random);
  {
    ThreadPerTask pool;
    MatrixProduct(Matrix<T>{V, D, weights.get(), scaled ? scales.get() : nullptr}, x.get(),
                  N, y.get(), pool);
  }
  double worst = 0;
  for (int64_t n = 0; n < N; ++n)
    for (int64_t v = 0; v < V; ++v) {
      double sum = 0, size = 1;
      for (int64_t d = 0; d < D; ++d) {
        double w;
        if constexpr (pairs) {
          const int64_t j = d % kInt4Group, group = d / kInt4Group, half = kInt4Group / 2;
          const int bits = weights[v * D / 2 + group * half + j % half].bits;
          w = ((j < half ? bits & 15 : bits >> 4) - 8) *
              double{scales[v * (D / kInt4Group) + group]};
        } else {
          w = ToFloat(weights[v * D + d]) * (scaled ? double{scales[v]} : 1.0);
        }
        sum += w * x[n * D + d], size += std::abs(w * x[n * D + d]);
      }
      worst = std::max(worst, std::abs(sum - y[n * V + v]) / size);
    }
  return worst < 1e-5;
}

// Integers of `bits` bits, against plain sums.
bool CheckIntegers(int64_t V, int64_t D, int64_t N, bool four_bits, std::mt19937& random) {
  D = CeilDivide(D, four_bits ? kInt4Group : 4) * (four_bits ? kInt4Group : 4);
  const int64_t tiles = CeilDivide(V, kTileRows), bits = four_bits ? 4 : 8;
  const int64_t num_scales = tiles * kTileRows * (four_bits ? D / kInt4Group : 1);
  std::normal_distribution<float> normal;
  auto weights = Exactly<uint8_t>(tiles * kTileRows * D * bits / 8);
  auto scales = Exactly<float>(num_scales);
  auto x = Exactly<float>(N * D), y = Exactly<float>(N * V);
  auto q = Exactly<int8_t>(D);
  const auto nibble = [&] { return 1 + random() % 15; };
  for (int64_t i = 0; i < tiles * kTileRows * D * bits / 8; ++i)
    weights[i] = static_cast<uint8_t>(four_bits ? nibble() | nibble() << 4 : 1 + random() % 255);
  for (int64_t i = 0; i < num_scales; ++i) scales[i] = normal(random);
  for (int64_t i = 0; i < N * D; ++i) x[i] = normal(random);
  {
    ThreadPerTask pool;
    IntegerProduct(IntegerMatrix{V, D, four_bits, weights.get(), scales.get()}, x.get(), N,
                   y.get(), pool);
  }
  double worst = 0;
  for (int64_t n = 0; n < N; ++n) {
    const double scale = RoundVector(x.get() + n * D, D, q.get());
    for (int64_t v = 0; v < V; ++v) {
      const int64_t tile = v / kTileRows, r = v % kTileRows;
      double sum = 0, size = 1;
      for (int64_t d = 0; d < D; ++d) {
        const int64_t column = four_bits ? d / 8 * 4 + d % 4 : d, stored = D * bits / 8;
        const int byte = weights[tile * kTileRows * stored + column / 4 * 64 + 4 * r + column % 4];
        const int weight = !four_bits ? byte - 128 : (d % 8 < 4 ? byte & 15 : byte >> 4) - 8;
        const int64_t group = four_bits ? tile * (D / kInt4Group) + d / kInt4Group : tile;
        const double term = scale * q[d] * weight * scales[group * kTileRows + r];
        sum += term, size += std::abs(term);
      }
      worst = std::max(worst, std::abs(sum - y[n * V + v]) / size);
    }
  }
  return worst < 1e-5;
}

// The search on rows whose tiles say nothing (all zero, and a slack that keeps every row or
// that keeps some), against a sort of the plain product.
bool CheckScreen(int64_t V, int64_t D, int64_t N, int64_t k, std::mt19937& random) {
  auto rows = Exactly<int8_t>(V * D), rotation = Exactly<int8_t>(D * D);
  auto scales = Exactly<float>(V), rotation_scales = Exactly<float>(D);
  auto x = Exactly<float>(N * D), y = Exactly<float>(N * V), values = Exactly<float>(N * k);
  auto indices = Exactly<int32_t>(N * k);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < V * D; ++i) rows[i] = static_cast<int8_t>(random() % 3) - 1;
  for (int64_t i = 0; i < D * D; ++i) rotation[i] = i % (D + 1) == 0 ? 1 : 0;
  for (int64_t i = 0; i < V; ++i) scales[i] = 1;
  for (int64_t i = 0; i < D; ++i) rotation_scales[i] = 1;
  for (int64_t i = 0; i < N * D; ++i) x[i] = normal(random);
  bool right = true;
  for (const float most_rows : {0.0f, 1.0f}) {
    Screen screen{{V, D, rows.get(), scales.get()}, {D, D, rotation.get(), rotation_scales.get()},
                  4 * CeilDivide(D, 32), nullptr, 2 * std::sqrt(float(D)), most_rows};
    const int64_t size = CeilDivide(V, kTileRows) * screen.TileBytes();
    auto tiles = Exactly<uint8_t>(size);
    std::fill_n(tiles.get(), size, 0);
    screen.tiles = tiles.get();
    ThreadPerTask pool;
    ScreenedTop(screen, x.get(), N, k, values.get(), indices.get(), pool);
    MatrixProduct(screen.rows, x.get(), N, y.get(), pool);
    for (int64_t n = 0; n < N; ++n) {
      std::vector<Found> all(V);
      for (int64_t v = 0; v < V; ++v) all[v] = {y[n * V + v], static_cast<int32_t>(v)};
      std::sort(all.begin(), all.end());
      for (int64_t i = 0; i < k; ++i)
        right = right && values[n * k + i] == all[i].value && indices[n * k + i] == all[i].index;
    }
  }
  return right;
}

// Every type of weights, on one ragged shape.
bool CheckDecode(int64_t a, int64_t b, int64_t c, std::mt19937& random) {
  const int64_t bits = 1 + a % 11, whole_groups = kInt4Group * (1 + b % 3);
  return CheckLayer<float>(c, a, bits, b, random) &&
         CheckLayer<BFloat16>(c, a, bits, b, random) &&
         CheckLayer<int8_t>(c, a, bits, b, random) &&
         CheckProduct<float>(a, b, c, random) && CheckProduct<BFloat16>(a, b, c, random) &&
         CheckProduct<int8_t>(a, b, c, random) &&
         CheckProduct<Int4Pair>(a, whole_groups, c, random) &&
         CheckIntegers(a, b, c, false, random) && CheckIntegers(a, b, c, true, random) &&
         CheckScreen(a, b, c, 1, random) && CheckScreen(70 * a, b, c, 3, random);
}

std::unique_ptr<float[]> Normal(int64_t count, std::mt19937& random) {
  std::normal_distribution<float> normal;
  auto values = Exactly<float>(count);
  for (int64_t i = 0; i < count; ++i) values[i] = normal(random);
  return values;
}

// The head: nats against their definition; targets may lie outside.
bool CheckHead(int64_t N, int64_t D, int64_t V, std::mt19937& random) {
  const auto x = Normal(N * D, random), kernel = Normal(D * V, random);
  auto weights = Normal(N, random), dx = Exactly<float>(N * D);
  auto dkernel = Exactly<float>(D * V);
  auto targets = Exactly<int32_t>(N);
  for (int64_t n = 0; n < N; ++n) targets[n] = static_cast<int32_t>(random() % (V + 2)) - 1;
  ThreadPerTask pool;
  const Head head{N, D, V, x.get(), kernel.get(), targets.get(), weights.get(), dx.get(),
                  dkernel.get()};
  const double nats = HeadNats(head, pool);
  double expected = 0, size = 1;
  for (int64_t n = 0; n < N; ++n) {
    if (weights[n] <= 0) continue;
    double total = 0, chosen = 0;
    for (int64_t v = 0; v < V; ++v) {
      double logit = 0;
      for (int64_t d = 0; d < D; ++d) logit += double{x[n * D + d]} * kernel[d * V + v];
      total += std::exp(logit);
      if (v == targets[n]) chosen = logit;
    }
    expected += weights[n] * (std::log(total) - chosen);
    size += std::abs(weights[n] * std::log(total)) + std::abs(weights[n] * chosen);
  }
  return std::abs(nats - expected) / size < 1e-5;
}

// Attention of L queries over M keys of which some are filled, in two documents and padding,
// against its definition.
template <class T>
bool CheckAttention(int64_t L, int64_t H, int64_t E, int64_t filled, std::mt19937& random) {
  const int64_t B = 2, M = filled + 3;
  const auto q = Normal(B * L * H * E, random);
  auto keys = Exactly<T>(B * H * M * E), values = Exactly<T>(B * H * M * E);
  auto index = Exactly<int32_t>(B * L), segments = Exactly<int32_t>(B * L);
  auto key_segments = Exactly<int32_t>(B * M);
  auto y = Exactly<float>(B * L * H * E);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < B * H * M * E; ++i) keys[i] = Make<T>(normal(random));
  for (int64_t i = 0; i < B * H * M * E; ++i) values[i] = Make<T>(normal(random));
  for (int64_t i = 0; i < B * M; ++i) key_segments[i] = i < M ? 1 : i % M < 2 ? 0 : 1 + i % 2;
  for (int64_t i = 0; i < B * L; ++i) {
    index[i] = static_cast<int32_t>(std::max<int64_t>(0, filled - L + i % L));
    segments[i] = i < L ? i % 7 != 3 : 1 + i % 2;
  }
  const Attention<T> op{B, L, H, E, M, q.get(), keys.get(), values.get(), index.get(),
                        segments.get(), key_segments.get(), filled, y.get()};
  {
    ThreadPerTask pool;
    Attend(op, pool);
  }
  double worst = 0;
  for (int64_t i = 0; i < B * L * H; ++i) {
    const int64_t b = i / (L * H), n = i / H, h = i % H;
    std::vector<double> weights(M, 0), sums(E, 0);
    double total = 0;
    for (int64_t j = 0; j < std::min<int64_t>(filled, index[n] + 1); ++j) {
      const int64_t at = ((b * H + h) * M + j) * E;
      if (key_segments[b * M + j] != segments[n] || segments[n] == 0) continue;
      double logit = 0;
      for (int64_t e = 0; e < E; ++e) logit += double{q[i * E + e]} * ToFloat(keys[at + e]);
      total += weights[j] = std::exp(logit / std::sqrt(double(E)));
      for (int64_t e = 0; e < E; ++e) sums[e] += weights[j] * ToFloat(values[at + e]);
    }
    for (int64_t e = 0; e < E; ++e) {
      const double expected = total == 0 ? 0 : sums[e] / total;
      worst = std::max(worst, std::abs(expected - y[i * E + e]));
    }
  }
  return worst < 1e-5;
}

// Leaves of these sizes: the norm, and an update that moves every value.
bool CheckUpdate(const std::vector<int64_t>& sizes, std::mt19937& random) {
  std::vector<std::unique_ptr<float[]>> kept;
  std::vector<Leaf> leaves;
  double squares = 0;
  for (const int64_t size : sizes) {
    for (int i = 0; i < 4; ++i) kept.push_back(Normal(size, random));
    const size_t last = kept.size();
    for (int64_t i = 0; i < size; ++i) {
      const double g = kept[last - 4][i];
      squares += g * g;
      kept[last - 1][i] = 1;  // a second moment
    }
    leaves.push_back({size, kept[last - 4].get(), kept[last - 3].get(),
                      kept[last - 2].get(), kept[last - 1].get(), 0.1f, 0.5f});
  }
  ThreadPerTask pool;
  const double norm = Norm(leaves, pool);
  std::vector<float> before;
  for (const Leaf& leaf : leaves)
    before.insert(before.end(), leaf.param, leaf.param + leaf.size);
  AdamW(leaves, Adam{2, 1, 0.1f, 0.1f, 0.9f, 0.1f, 0.9f, 0.1f, 1e-8f}, pool);
  bool moved = true;
  size_t at = 0;
  for (const Leaf& leaf : leaves)
    for (int64_t i = 0; i < leaf.size; ++i) moved = moved && leaf.param[i] != before[at++];
  return moved && std::abs(norm - std::sqrt(squares)) < 1e-5 * (1 + norm);
}

// Rows in memory are summed in the order of rows in a cache: every bit is the same.
template <class T>
bool CheckFarColumns(int count, int64_t columns, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<std::unique_ptr<T[]>> stored;
  std::vector<const T*> rows;
  auto weights = Exactly<float>(count), near = Exactly<float>(columns);
  auto far = Exactly<float>(columns);
  for (int k = 0; k < count; ++k) {
    stored.push_back(Exactly<T>(columns));
    for (int64_t f = 0; f < columns; ++f) stored[k][f] = Make<T>(normal(random));
    rows.push_back(stored[k].get());
    weights[k] = normal(random);
  }
  const Kernels<T> kernels = ChooseKernels<T>();
  bool same = true;
  for (const bool first : {true, false}) {
    kernels.sum_columns(rows.data(), weights.get(), count, 0, columns, first, false, near.get());
    kernels.sum_columns(rows.data(), weights.get(), count, 0, columns, first, true, far.get());
    for (int64_t f = 0; f < columns; ++f) same = same && near[f] == far[f];
  }
  return same;
}

// Blocks with drawn weights, on arrays of exactly their sizes.
template <class T>
struct DrawnBlocks {
  std::mt19937& random;
  std::vector<std::unique_ptr<float[]>> floats;
  std::vector<std::unique_ptr<T[]>> tables;
  std::vector<std::unique_ptr<int32_t[]>> integers;

  float* Floats(int64_t count) {
    std::normal_distribution<float> normal;
    floats.push_back(Exactly<float>(count));
    for (int64_t i = 0; i < count; ++i) floats.back()[i] = normal(random);
    return floats.back().get();
  }
  int32_t* Integers(int64_t count, int32_t value) {
    integers.push_back(Exactly<int32_t>(count));
    std::fill_n(integers.back().get(), count, value);
    return integers.back().get();
  }
  MemoryRows Layer(int64_t inputs, int64_t bits, int64_t features, bool two_rows) {
    const int64_t count = (inputs / bits << bits) * features;
    tables.push_back(Exactly<T>(count));
    for (int64_t i = 0; i < count; ++i)
      tables.back()[i] = Make<T>(std::normal_distribution<float>()(random));
    MemoryRows layer;
    layer.tables = inputs / bits, layer.features = features;
    layer.hash = {bits, two_rows, 2.0f, 0.7f, two_rows};
    layer.rows = tables.back().get();
    layer.scales = sizeof(T) == 1 ? Floats(inputs / bits << bits) : nullptr;
    layer.bias = two_rows ? Floats(features) : nullptr;
    layer.sum = SumMemoryRows<T>;
    return layer;
  }
};

struct BlocksShape {
  int64_t streams, length, heads, head_width, bits, slots;
};

// What a token gets depends neither on the threads nor on the other streams, and nothing is
// touched outside of the arrays.
template <class T>
bool CheckBlocks(const BlocksShape& s, int form, std::mt19937& random) {
  DrawnBlocks<T> drawn{random, {}, {}, {}};
  const int64_t D = s.heads * s.head_width, N = s.streams * s.length;
  const int64_t cached = D * s.slots, wide = D / s.bits * (s.bits + 1);
  const bool two_rows = form & 1, layer_norm = form & 2, one_layer = form & 4, out = form & 8;
  const auto norm = [&](int64_t width, bool bias) {
    float* scale = drawn.Floats(width);
    return NormWeights{scale, bias ? drawn.Floats(width) : nullptr, 1e-5f};
  };
  Trunk trunk{s.streams, s.length, D, s.heads, s.slots};
  trunk.residual = static_cast<Residual>(form % 3);
  trunk.half = s.head_width / 2;
  trunk.cos = drawn.Floats(N * trunk.half), trunk.sin = drawn.Floats(N * trunk.half);
  trunk.x = drawn.Floats(N * D);
  int32_t* segments = drawn.Integers(N, 1);
  for (int64_t l = 0; l + 1 < s.length; ++l) segments[l] = 0;  // stream 0 begins with padding
  trunk.segments = segments;
  trunk.final_norm = norm(D, layer_norm);
  for (int i = 0; i < 2; ++i) {
    Block block{norm(D, layer_norm), norm(D, layer_norm), norm(wide, true)};
    block.qkv = drawn.Layer(D, s.bits, 3 * D, two_rows);
    if (out) block.out = drawn.Layer(D, s.bits, D, two_rows);
    if (!one_layer) block.up = drawn.Layer(D, s.bits, wide, two_rows);
    block.down = one_layer ? drawn.Layer(D, s.bits, D, two_rows)
                           : drawn.Layer(wide, s.bits + 1, D, two_rows);
    trunk.blocks.push_back(block);
  }
  std::vector<std::vector<float>> found;
  for (const int threads : {1, 3, 8, 0}) {  // 0: stream 0 alone
    Trunk one = trunk;
    if (threads == 0) one.streams = 1;
    for (Block& block : one.blocks) {
      block.cache = {drawn.Floats(0), drawn.Floats(0), drawn.Integers(s.streams * s.slots, 0),
                     drawn.Integers(1, static_cast<int32_t>(s.slots - 2 * s.length))};
      for (float** rows : {&block.cache.keys, &block.cache.values}) {
        drawn.floats.push_back(Exactly<float>(s.streams * cached));
        *rows = drawn.floats.back().get();
        for (int64_t j = 0; j < s.streams * cached; ++j) (*rows)[j] = std::sin(j % cached);
      }
      for (int64_t b = 0; b < s.streams; ++b)
        std::fill_n(block.cache.segments + b * s.slots, s.slots / 2, 1);
    }
    one.y = drawn.Floats(N * D);
    std::vector<float> result;
    for (int call = 0; call < 3; ++call) {  // the last has no room, as XLA would write it
      ThreadPerTask pool;
      Team team(pool, std::max(1, threads));
      BlockReader(one, team).Read();
      result.insert(result.end(), one.y, one.y + s.length * D);
      if (threads) result.insert(result.end(), one.y + s.length * D, one.y + N * D);
    }
    for (const Block& block : one.blocks)
      result.insert(result.end(), block.cache.keys, block.cache.keys + cached);
    found.push_back(result);
  }
  bool same = found[0] == found[1] && found[0] == found[2];
  for (int call = 0; call < 3; ++call)
    for (int64_t i = 0; i < s.length * D; ++i) {
      const float value = found[0][call * N * D + i];
      same = same && std::isfinite(value) && value == found[3][call * s.length * D + i];
    }
  return same;
}

// The first place of the largest, among NaN, equal values and infinities.
bool CheckLargest(int64_t V, std::mt19937& random) {
  auto y = Exactly<float>(3 * V);
  auto places = Exactly<int32_t>(3);
  for (int64_t i = 0; i < 3 * V; ++i) y[i] = static_cast<float>(random() % 5) - 4;
  for (int64_t i = V; i < 2 * V; ++i) y[i] = i % 7 == 3 ? NAN : y[i];
  for (int64_t i = 2 * V; i < 3 * V; ++i) y[i] = -INFINITY;
  {
    ThreadPerTask pool;
    FirstLargest(y.get(), 3, V, places.get(), pool);
  }
  bool right = places[2] == 0;
  for (int64_t n = 0; n < 2; ++n) {
    const auto rank = [&](int64_t v) { return std::isnan(y[n * V + v]) ? INFINITY : y[n * V + v]; };
    for (int64_t v = 0; v < V; ++v)
      right = right && (v < places[n] ? rank(v) < rank(places[n]) : rank(v) <= rank(places[n]));
  }
  return right;
}

// Every type of tables, on one shape; says which shape is wrong.
bool CheckTypes(const Shape& s, std::mt19937& random) {
  if (Check<float>(s, random) && Check<BFloat16>(s, random) && Check<int8_t>(s, random))
    return true;
  std::printf("wrong sums: N=%ld K=%ld C=%ld F=%ld\n", long(s.tokens), long(s.tables),
              long(s.buckets), long(s.features));
  return false;
}

int main() {
  std::mt19937 random(0);
  const Shape shapes[] = {{0, 3, 4, 5},    {4, 0, 2, 3},     {3, 2, 4, 0},
                          {1, 1, 2, 1},    {3, 1, 1, 7},
                          {7, 3, 4, 5},    {33, 5, 16, 40},  {130, 9, 16, 67},
                          {513, 16, 8, 160}, {1, 130, 4, 300}, {300, 13, 32, 129},
                          {2, 3, 2048, 64}, {4097, 2, 8, 17}};
  // Few tokens for so many threads: tiles, parts and columns that would be left empty.
  const Shape crowded[] = {{52, 1340, 2, 16}, {81, 210, 2, 64}, {3, 100, 2, 1000},
                           {1, 999, 2, 1100}, {17, 7, 4, 9000}};
  for (const int instructions : {0, 1, 2})
    for (const int64_t reuse : {int64_t{0}, int64_t{1} << 40}) {
      instruction_set = instructions;
      packing_reuse = reuse;
      max_threads = 3;
      for (const Shape& s : shapes)
        if (!CheckTypes(s, random)) return 1;
      max_threads = 64;
      for (const Shape& s : crowded)
        if (!CheckTypes(s, random)) return 1;
    }
  max_threads = 3;
  for (const int instructions : {0, 1, 2}) {
    instruction_set = instructions;
    packing_reuse = 4;
    const int64_t decode_shapes[][3] = {{1, 1, 1}, {3, 5, 2}, {33, 70, 1}, {40, 129, 9},
                                        {7, 2, 4}, {13, 17, 33}, {101, 40, 7}};
    for (const auto& s : decode_shapes)
      if (!CheckDecode(s[0], s[1], s[2], random)) {
        std::printf("wrong decode: %ld %ld %ld\n", long(s[0]), long(s[1]), long(s[2]));
        return 1;
      }
    const BlocksShape block_shapes[] = {{1, 1, 1, 4, 2, 3}, {3, 2, 2, 6, 3, 9},
                                        {2, 3, 3, 20, 5, 40}, {5, 1, 1, 64, 8, 33}};
    for (const BlocksShape& s : block_shapes)
      for (int form = 0; form < 16; ++form)
        if (!(s.bits < 8 ? CheckBlocks<float>(s, form, random) &&
                               CheckBlocks<BFloat16>(s, form, random) &&
                               CheckBlocks<int8_t>(s, form, random)
                         : form % 8 != 5 || CheckBlocks<int8_t>(s, form, random))) {
          std::printf("wrong blocks: %ld streams, form %d\n", long(s.streams), form);
          return 1;
        }
    for (const int count : {1, 7, 8, 9, 30})
      for (const int64_t columns : {1, 17, 64, 200})
        if (!(CheckFarColumns<float>(count, columns, random) &&
              CheckFarColumns<BFloat16>(count, columns, random) &&
              CheckFarColumns<int8_t>(count, columns, random))) {
          std::printf("wrong far rows: %d of %ld\n", count, long(columns));
          return 1;
        }
    for (const int64_t size : {1, 3, 16, 33, 1000})
      if (!CheckLargest(size, random)) {
        std::puts("wrong largest");
        return 1;
      }
    const int64_t head_shapes[][3] = {{0, 3, 5}, {1, 1, 1}, {7, 5, 13}, {97, 33, 32},
                                      {200, 300, 67}};
    for (const auto& s : head_shapes)
      if (!CheckHead(s[0], s[1], s[2], random)) {
        std::printf("wrong head: %ld %ld %ld\n", long(s[0]), long(s[1]), long(s[2]));
        return 1;
      }
    const int64_t attention_shapes[][4] = {{1, 1, 1, 1},   {5, 2, 7, 9},    {50, 3, 33, 300},
                                           {130, 1, 64, 130}, {7, 2, 20, 0}};
    for (const auto& s : attention_shapes)
      if (!CheckAttention<float>(s[0], s[1], s[2], s[3], random) ||
          !CheckAttention<BFloat16>(s[0], s[1], s[2], s[3], random)) {
        std::printf("wrong attention: %ld %ld\n", long(s[0]), long(s[3]));
        return 1;
      }
    if (!CheckUpdate({1, 0, 17, 3 * kUpdateItem + 5}, random)) {
      std::puts("wrong update");
      return 1;
    }
  }
  std::puts("ok");
  return 0;
}
