// Decoding: a few tokens go through all blocks of a model of memory layers in one call.
//
//   z = norm1(x);  [q k v] = ML(z);  cache <- k, v;  m = attention(q, cache)  (or ML of it)
//   sequential     a = x + m;  y = a + ffn(norm2(a))
//   parallel       y = x + m + ffn(norm2(x))
//   eq13           y = z + m + ffn(z)
//   ffn(z)         ML_2(LayerNorm(ML_1(z))), or one memory layer
//
// All threads work on each step and meet at its end (`Team`): tokens apart, or columns where
// there are too few. What a token gets depends neither on the others nor on the threads, bit
// for bit. Sums over rows are those of `MemoryLayer`. Start at `BlockReader::Read`.

#pragma once

#include "decode_native.h"
#include "team_native.h"

namespace memoryformer {

// What `MemoryLayer` is given, for any type of rows.
struct MemoryRows {
  int64_t tables = 0, features = 0;  // K, F
  Hash hash{};
  const void* rows = nullptr;        // [K, 2^tau, F]
  const float* scales = nullptr;     // [K, 2^tau], or null
  const float* bias = nullptr;       // [F], or null
  // y[begin:end] = sum_k s_k T_k[h_k] of one token
  void (*sum)(const MemoryRows&, const int32_t*, const float*, int64_t, int64_t, float*);

  int64_t Width() const { return tables * hash.code_bits; }
};

template <class T>
void SumMemoryRows(const MemoryRows& layer, const int32_t* codes, const float* scores,
                   int64_t begin, int64_t end, float* y) {
  const Operands<T> op{{1, layer.tables, int64_t{1} << layer.hash.code_bits, layer.features},
                       static_cast<const T*>(layer.rows), layer.scales, codes, scores};
  SumToken(ChooseKernels<T>(), op, 0, begin, end, IsFar<T>(op.shape), y);
}

struct Cache {
  float *keys, *values;  // [B, H, M, E]
  int32_t* segments;     // [B, M]; 0 where nothing is stored
  int32_t* length;       // tokens stored
};

struct Block {
  NormWeights norm1, norm2, middle;      // no norm2 in eq13, no middle where ffn is one layer
  MemoryRows qkv, out, up, down;  // no tables in `out` and `up` where there is none
  Cache cache;
};

enum class Residual { kSequential, kParallel, kEq13 };

struct Trunk {
  int64_t streams, length, width, heads, slots;  // B, L, D, H, M
  Residual residual;
  int64_t half;                 // pairs of a head that are turned
  const float *cos, *sin;       // [B L, half]
  const int32_t* segments;      // [B, L]
  const float* x;               // [B L, D]
  NormWeights final_norm;
  std::vector<Block> blocks;
  float* y;                     // [B L, D]

  int64_t Tokens() const { return streams * length; }
  int64_t HeadWidth() const { return width / heads; }
};

class BlockReader {
 public:
  BlockReader(const Trunk& trunk, Team& team)
      : trunk_(trunk), team_(team), kernels_(ChooseBlockKernels()),
        one_plus_exp_(ChooseOnePlusExp()) {
    for (const Block& b : trunk.blocks)
      for (const MemoryRows* layer : {&b.qkv, &b.out, &b.up, &b.down}) {
        most_tables_ = std::max(most_tables_, layer->tables);
        widest_ = std::max({widest_, layer->features, layer->Width()});
      }
    groups_ = Parts(trunk.streams, trunk.heads);
    const int64_t rows = trunk.Tokens() * widest_;
    memory_.reset(new Scratch(kArrays * rows * sizeof(float)));
    float** arrays[kArrays] = {&x_, &next_, &normed_, &mixed_, &attended_, &hidden_, &second_};
    for (int i = 0; i < kArrays; ++i) *arrays[i] = memory_->As<float>() + i * rows;
    const int64_t lookups = 2 * trunk.Tokens() * most_tables_;
    codes_.reset(new Scratch(lookups * (sizeof(int32_t) + sizeof(float))));
    seen_.reset(new Scratch(kMostQueries * trunk.streams * groups_ * trunk.slots *
                            (sizeof(int32_t) + sizeof(float))));
  }

  void Read() {
    for (const Block& block : trunk_.blocks) WriteSegments(block.cache);
    Addends x{trunk_.x, nullptr, nullptr};  // the residual stream is their sum
    for (const Block& block : trunk_.blocks) x = ReadBlock(block, x);
    team_.Run(trunk_.Tokens(), [&](int64_t n) {
      Normalise(x, trunk_.final_norm, n, 0, trunk_.width, nullptr, trunk_.y);
    });
    for (const Block& block : trunk_.blocks)
      *block.cache.length += static_cast<int32_t>(trunk_.length);
  }

 private:
  static constexpr int kArrays = 7;

  // Parts of each of `items`, so that all threads have some and end together.
  int64_t Parts(int64_t items, int64_t most) const {
    const int64_t threads = team_.threads();
    if (items % threads == 0 || items >= 4 * threads) return 1;
    return std::max<int64_t>(1, std::min(most, threads));
  }

  // The stream after the block, as addends.
  Addends ReadBlock(const Block& block, const Addends& x) {
    const bool eq13 = trunk_.residual == Residual::kEq13;
    if (x.a == x_) std::swap(x_, next_);  // what is read whole may not be written in parts
    NormAndHash(x, &block.norm1, eq13 ? nullptr : x_, block.qkv);
    SumRows(block.qkv, hidden_);
    float* mixed = block.out.tables ? attended_ : mixed_;
    Attend(block.cache, hidden_, mixed);
    if (block.out.tables) {
      NormAndHash({mixed, nullptr, nullptr}, nullptr, nullptr, block.out);
      SumRows(block.out, mixed_);
    }
    if (eq13) {  // the stream itself is normed; the next norm writes there
      std::copy_n(normed_, trunk_.Tokens() * trunk_.width, x_);
      return {x_, mixed_, FeedForward(block, {x_, nullptr, nullptr}, nullptr, nullptr)};
    }
    if (trunk_.residual == Residual::kParallel)
      return {x_, mixed_, FeedForward(block, {x_, nullptr, nullptr}, &block.norm2, nullptr)};
    const float* fed = FeedForward(block, {x_, mixed_, nullptr}, &block.norm2, next_);
    return {next_, fed, nullptr};
  }

  // ffn(norm(x)); x itself goes to `sum`.
  const float* FeedForward(const Block& block, const Addends& x, const NormWeights* norm,
                           float* sum) {
    const MemoryRows& first = block.up.tables ? block.up : block.down;
    NormAndHash(x, norm, sum, first);
    SumRows(first, hidden_);
    if (!block.up.tables) return hidden_;
    NormAndHash({hidden_, nullptr, nullptr}, &block.middle, nullptr, block.down);
    SumRows(block.down, attended_);
    return attended_;
  }

  void Normalise(const Addends& x, const NormWeights& norm, int64_t n, int64_t begin, int64_t end,
                 float* sum, float* y, int64_t width = 0) {
    if (width == 0) width = trunk_.width;
    const auto row = [&](const float* p) { return p == nullptr ? p : p + n * width; };
    kernels_.normalise({row(x.a), row(x.b), row(x.c)}, width, norm, begin, end,
                       sum == nullptr ? sum : sum + n * width, y + n * width);
  }

  // sum <- x, normed_ <- norm(x) (x itself without a norm), and what the layer reads of it.
  void NormAndHash(const Addends& x, const NormWeights* norm, float* sum, const MemoryRows& layer) {
    const int64_t N = trunk_.Tokens(), K = layer.tables, bits = layer.hash.code_bits;
    const int64_t parts = Parts(N, CeilDivide(K, 32));
    team_.Run(N * parts, [&](int64_t item) {
      const int64_t n = item / parts, part = item % parts;
      const int64_t k0 = K * part / parts, k1 = K * (part + 1) / parts;
      const float* z = x.a;
      if (norm != nullptr) {
        Normalise(x, *norm, n, k0 * bits, k1 * bits, sum, normed_, layer.Width());
        z = normed_;
      }
      HashToken(one_plus_exp_, z + n * layer.Width() + k0 * bits, k1 - k0, layer.hash,
                N * K, Codes() + n * K + k0, Scores() + n * K + k0);
    });
  }

  // y [N, F] of the codes and scores of `NormAndHash`.
  void SumRows(const MemoryRows& layer, float* y) {
    const int64_t N = trunk_.Tokens(), F = layer.features, K = layer.tables;
    const int64_t parts = Parts(N, CeilDivide(F, 256));
    const int64_t columns = CeilDivide(CeilDivide(F, parts), 64) * 64;
    team_.Run(N * parts, [&](int64_t item) {
      const int64_t n = item / parts, f0 = std::min(F, item % parts * columns);
      const int64_t f1 = std::min(F, f0 + columns);
      float* row = y + n * F;
      layer.sum(layer, Codes() + n * K, Scores() + n * K, f0, f1, row);
      if (layer.hash.two_rows) {
        float* across = second_ + n * F;
        layer.sum(layer, Codes() + (N + n) * K, Scores() + (N + n) * K, f0, f1, across);
        for (int64_t f = f0; f < f1; ++f) row[f] += across[f];
      }
      if (layer.bias != nullptr)
        for (int64_t f = f0; f < f1; ++f) row[f] += layer.bias[f];
    });
  }

  int64_t Start(const Cache& cache) const {  // where XLA would write
    return std::max<int64_t>(0, std::min<int64_t>(*cache.length, trunk_.slots - trunk_.length));
  }

  void WriteSegments(const Cache& cache) {
    for (int64_t b = 0; b < trunk_.streams; ++b)
      std::copy_n(trunk_.segments + b * trunk_.length, trunk_.length,
                  cache.segments + b * trunk_.slots + Start(cache));
  }

  // Turns q and k, stores k and v, and reads the cache: qkv [N, 3, D] -> y [N, D].
  void Attend(const Cache& cache, float* qkv, float* y) {
    const int64_t L = trunk_.length, D = trunk_.width, H = trunk_.heads, M = trunk_.slots;
    const int64_t E = trunk_.HeadWidth(), start = Start(cache), length = *cache.length;
    // Keys are stored before the queries of their tokens, and of those together, look.
    const int64_t together = length + L <= M ? kMostQueries : 1;
    team_.Run(trunk_.streams * groups_, [&](int64_t item) {
      const int64_t b = item / groups_, group = item % groups_;
      const int64_t end = H * (group + 1) / groups_;
      auto* weights = seen_->As<float>() + kMostQueries * item * M;
      auto* seen = seen_->As<int32_t>() + kMostQueries * (trunk_.streams * groups_ + item) * M;
      for (int64_t l = 0; l < L; l += together) {
        const int64_t n = b * L + l, queries = std::min(together, L - l);
        const int64_t filled = std::min(M, length + l + 1);  // for the first query
        for (int64_t t = 0; t < queries; ++t) {
          const int32_t segment = trunk_.segments[n + t];
          for (int64_t j = 0; j < filled + t; ++j)
            seen[t * M + j] = -int32_t{cache.segments[b * M + j] == segment && segment != 0};
        }
        for (int64_t h = H * group / groups_; h < end; ++h) {
          float *q = qkv + n * 3 * D + h * E;
          float *keys = cache.keys + (b * H + h) * M * E;
          float *values = cache.values + (b * H + h) * M * E;
          for (int64_t t = 0; t < queries; ++t) {
            float *k = q + t * 3 * D + D, *v = k + D;
            Turn(n + t, q + t * 3 * D), Turn(n + t, k);
            std::copy_n(k, E, keys + (start + l + t) * E);
            std::copy_n(v, E, values + (start + l + t) * E);
          }
          kernels_.key_logits(keys, filled + queries - 1, E, q, queries, 3 * D,
                              1 / std::sqrt(static_cast<float>(E)), values, weights, M);
          float factors[kMostQueries];
          for (int64_t t = 0; t < queries; ++t) {
            const float total =
                kernels_.softmax_weights(weights + t * M, seen + t * M, filled + t);
            factors[t] = total > 0 ? 1 / total : 0;
          }
          kernels_.weigh_values(values, weights, M, filled, E, queries, factors,
                                h + 1 == end ? values : keys + M * E, y + n * D + h * E, D);
        }
      }
    });
  }

  // Rotary positions: pairs (i, i + half) of a head.
  void Turn(int64_t n, float* head) const {
    const float *cos = trunk_.cos + n * trunk_.half, *sin = trunk_.sin + n * trunk_.half;
    for (int64_t i = 0; i < trunk_.half; ++i) {
      const float first = head[i], second = head[i + trunk_.half];
      head[i] = first * cos[i] - second * sin[i];
      head[i + trunk_.half] = second * cos[i] + first * sin[i];
    }
  }

  int32_t* Codes() const { return codes_->As<int32_t>(); }
  float* Scores() const {
    return codes_->As<float>() + 2 * trunk_.Tokens() * most_tables_;
  }

  const Trunk& trunk_;
  Team& team_;
  const BlockKernels kernels_;
  const OnePlusExpKernel one_plus_exp_;
  int64_t most_tables_ = 0, widest_ = 0, groups_ = 1;
  std::unique_ptr<Scratch> memory_, codes_, seen_;
  float *x_, *next_, *normed_, *mixed_, *attended_, *hidden_, *second_;  // [N, ..]
};

template <class Pool>
void ReadBlocks(const Trunk& trunk, Pool& pool) {
  if (trunk.Tokens() == 0 || trunk.blocks.empty()) throw std::invalid_argument("no tokens");
  const MemoryRows& layer = trunk.blocks[0].qkv;
  // A block has some eight meetings of a microsecond or two, and a helper wakes up late. On an AMD
  // EPYC (Zen 5) two threads read 4 tokens at D = 128 in 66 us and one in 38, at D = 256 both in
  // 103; from `kProductsPerThread` on, at D = 512 and 4 tokens, two are faster.
  Team team(pool, ChooseThreads({trunk.Tokens(), layer.tables, 0, layer.features}));
  BlockReader(trunk, team).Read();
}

}  // namespace memoryformer
