// The search over the bounds of screen_native.h. Start at `ScreenedTop`.

#pragma once

#include <functional>
#include <numeric>

#include "screen_native.h"

namespace memoryformer {

// The vectors of one pass, at most kStreams: x, and what is known of each.
template <class Pool>
class Search {
 public:
  Search(const Screen& screen, const float* x, int64_t tokens, int64_t k, Pool& pool)
      : screen_(screen), x_(x), k_(k), pool_(pool), live_(tokens),
        tiles_(CeilDivide(screen.rows.rows, kTileRows)),
        upper_(tokens * tiles_ * kTileRows * sizeof(float)),
        highest_(tokens * tiles_ * sizeof(float)) {
    std::iota(live_.begin(), live_.end(), 0);
  }

  // Finds what it can, and returns the vectors for which all rows must be read.
  std::vector<int64_t> Run(float* values, int32_t* indices) {
    Rotate();
    if (live_.empty()) return std::move(whole_);
    const int64_t sample =
        std::min(tiles_, std::max({int64_t{64}, tiles_ / 16, k_ + kExtra}));
    Pass(0, sample);
    if (sample < tiles_) {
      Candidates(sample);  // a threshold that can only rise: few leave, more may follow
      Pass(sample, tiles_);
    }
    Candidates(tiles_);
    Finish(values, indices);
    return std::move(whole_);
  }

 private:
  int64_t Rows(int64_t tiles) const {
    return std::min(screen_.rows.rows, tiles * kTileRows);
  }
  float* Upper(int64_t t) const { return upper_.As<float>() + t * tiles_ * kTileRows; }
  float* Highest(int64_t t) const { return highest_.As<float>() + t * tiles_; }

  void Rotate() {
    const int64_t D = screen_.rows.width, N = live_.size();
    const Scratch rotated_memory(N * D * sizeof(float));
    auto* rotated = rotated_memory.template As<float>();
    MatrixProduct(screen_.rotation, x_, N, rotated, pool_);
    const int64_t groups = screen_.Groups(), norms = screen_.Norms();
    const int64_t columns = screen_.Columns();
    integers_.resize(N * columns), norms_.resize(N * norms + 1);  // data() is no null
    scales_.resize(N * groups), totals_.resize(N * (groups + 1));
    queries_.clear();
    std::vector<int64_t> kept;
    for (int64_t n = 0; n < N; ++n) {
      const int64_t i = kept.size();
      Query query{integers_.data() + i * columns, norms_.data() + i * norms,
                  scales_.data() + i * groups, totals_.data() + i * (groups + 1),
                  0, 0, 0, 0, 0};
      const bool usable = k_ + kExtra < tiles_ &&
                          query.Prepare(screen_, x_ + n * D, rotated + n * D);
      (usable ? kept : whole_).push_back(n);
      if (usable) queries_.push_back(query);
    }
    live_ = kept;
    screen_counts.bytes += D * (D + int64_t{sizeof(float)});
  }

  void Pass(int64_t begin, int64_t end) {
    const int64_t tokens = queries_.size();
    if (tokens == 0) return;
    const Together together(screen_, queries_);
    const IntegerKernels kernels = ChooseIntegerKernels();
    const int64_t bytes = screen_.TileBytes();
    const int64_t per_item = std::max<int64_t>(1, (128 << 10) / bytes);
    ParallelFor(pool_, AvailableThreads(), CeilDivide(end - begin, per_item), [&](int64_t i) {
      float upper[kStreams * kTileRows];
      const int64_t last = std::min(end, begin + (i + 1) * per_item);
      for (int64_t tile = begin + i * per_item; tile < last; ++tile) {
        UpperBounds(screen_, kernels, screen_.tiles + tile * bytes, queries_, together,
                    upper);
        const int64_t count = Rows(tile + 1) - tile * kTileRows;
        for (int64_t t = 0; t < tokens; ++t) {
          const float* of = upper + t * kTileRows;
          std::memcpy(Upper(t) + tile * kTileRows, of, kTileRows * sizeof(float));
          Highest(t)[tile] = *std::max_element(of, of + count);
        }
      }
    });
    screen_counts.bytes += (end - begin) * bytes;
  }

  // The exact product of vector n with row v.
  float Exact(const MatrixKernels<int8_t>& kernels, int64_t n, int64_t v) const {
    const int64_t D = screen_.rows.width;
    const int8_t* row = screen_.rows.Row(v);
    const float* x = x_ + n * D;
    float sum;
    kernels.one_token.one(&row, screen_.rows.Scale(v), &x, D, 1, 1, &sum);
    return sum;
  }

  // For each vector, the threshold from rows of the first `tiles` and the rows that reach
  // it. Vectors with too many leave.
  void Candidates(int64_t tiles) {
    const MatrixKernels<int8_t> kernels = ChooseMatrixKernels<int8_t>();
    const int64_t probes = k_ + kExtra;
    std::vector<int64_t> order(tiles), kept;
    std::vector<float> exact(probes);
    size_t to = 0;
    for (size_t t = 0; t < live_.size(); ++t) {
      const float* highest = Highest(t);
      std::iota(order.begin(), order.end(), 0);
      std::partial_sort(order.begin(), order.begin() + probes, order.end(),
                        [&](int64_t a, int64_t b) { return highest[a] > highest[b]; });
      for (int64_t i = 0; i < probes; ++i) {
        const float* begin = Upper(t) + order[i] * kTileRows;
        const int64_t count = Rows(order[i] + 1) - order[i] * kTileRows;
        const int64_t row = std::max_element(begin, begin + count) - Upper(t);
        exact[i] = Exact(kernels, live_[t], row);
      }
      std::nth_element(exact.begin(), exact.begin() + (k_ - 1), exact.end(),
                       std::greater<float>());
      const float threshold = exact[k_ - 1];
      std::vector<int32_t> rows;
      const int64_t most = static_cast<int64_t>(screen_.most_rows * Rows(tiles));
      for (int64_t tile = 0; tile < tiles; ++tile) {
        if (!(highest[tile] >= threshold)) continue;
        for (int64_t v = tile * kTileRows; v < Rows(tile + 1); ++v)
          if (Upper(t)[v] >= threshold) rows.push_back(static_cast<int32_t>(v));
      }
      const int64_t count = rows.size();
      if (count > most || count < k_) {
        whole_.push_back(live_[t]);
        continue;
      }
      if (to != t) Move(t, to);
      kept.push_back(live_[t]);
      survivors_.resize(std::max(survivors_.size(), to + 1));
      survivors_[to++] = std::move(rows);
    }
    live_ = kept;
    queries_.resize(to), survivors_.resize(to);
  }

  // Vectors stay side by side when others leave.
  void Move(size_t from, size_t to) {
    std::memcpy(Upper(to), Upper(from), tiles_ * kTileRows * sizeof(float));
    std::memcpy(Highest(to), Highest(from), tiles_ * sizeof(float));
    Query target = queries_[to];
    const Query source = queries_[from];
    std::memcpy(target.integers, source.integers, screen_.Columns());
    std::memcpy(target.norms, source.norms, screen_.Norms());
    std::memcpy(target.scales, source.scales, screen_.Groups() * sizeof(float));
    std::memcpy(target.totals, source.totals, (screen_.Groups() + 1) * sizeof(int32_t));
    queries_[to] = source;
    queries_[to].integers = target.integers, queries_[to].norms = target.norms;
    queries_[to].scales = target.scales, queries_[to].totals = target.totals;
  }

  void Finish(float* values, int32_t* indices) {
    const MatrixKernels<int8_t> kernels = ChooseMatrixKernels<int8_t>();
    const int64_t row_bytes = screen_.rows.width + int64_t{sizeof(float)};
    for (size_t t = 0; t < live_.size(); ++t) {
      const std::vector<int32_t>& rows = survivors_[t];
      std::vector<Found> found(rows.size());
      constexpr int64_t kRowsPerItem = 128;
      ParallelFor(pool_, AvailableThreads(), CeilDivide(rows.size(), kRowsPerItem),
                  [&](int64_t item) {
        const int64_t last = std::min<int64_t>(rows.size(), (item + 1) * kRowsPerItem);
        for (int64_t i = item * kRowsPerItem; i < last; ++i)
          found[i] = {Exact(kernels, live_[t], rows[i]), rows[i]};
      });
      Keep(found, k_, values + live_[t] * k_, indices + live_[t] * k_);
      screen_counts.rows += found.size();
      screen_counts.bytes += found.size() * row_bytes;
    }
  }

  const Screen& screen_;
  const float* x_;
  int64_t k_;
  Pool& pool_;
  std::vector<int64_t> live_, whole_;  // positions in x
  std::vector<Query> queries_;         // of live_, as is all below
  std::vector<std::vector<int32_t>> survivors_;
  int64_t tiles_;
  Scratch upper_, highest_;
  std::vector<int8_t> integers_, norms_;
  std::vector<float> scales_;
  std::vector<int32_t> totals_;
};

// x [N, D] -> the k largest of y[n, :] = `MatrixProduct`(rows, x) and where they are, largest
// first, of equals the lower index: [N, k] each. 1 <= k <= V.
template <class Pool>
void ScreenedTop(const Screen& screen, const float* x, int64_t N, int64_t k, float* values,
                 int32_t* indices, Pool& pool) {
  const int64_t V = screen.rows.rows, D = screen.rows.width;
  for (int64_t n0 = 0; n0 < N; n0 += kStreams) {
    const int64_t tokens = std::min(kStreams, N - n0);
    Search<Pool> search(screen, x + n0 * D, tokens, k, pool);
    const std::vector<int64_t> whole =
        search.Run(values + n0 * k, indices + n0 * k);
    screen_counts.vectors += tokens;
    if (whole.empty()) continue;
    const int64_t count = whole.size();
    const Scratch x_memory(count * D * sizeof(float)), y_memory(count * V * sizeof(float));
    auto* together = x_memory.template As<float>();
    auto* y = y_memory.template As<float>();
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(together + i * D, x + (n0 + whole[i]) * D, D * sizeof(float));
    MatrixProduct(screen.rows, together, count, y, pool);
    ParallelFor(pool, AvailableThreads(), count, [&](int64_t i) {
      std::vector<Found> found(V);
      for (int64_t v = 0; v < V; ++v) found[v] = {y[i * V + v], static_cast<int32_t>(v)};
      const int64_t n = n0 + whole[i];
      Keep(found, k, values + n * k, indices + n * k);
    });
    screen_counts.whole += count;
    screen_counts.rows += count * V;
    screen_counts.bytes += V * (D + int64_t{sizeof(float)});
  }
}

}  // namespace memoryformer
