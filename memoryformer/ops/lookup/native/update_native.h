// AdamW of all parameters in one pass over them, in place, and the norm of their gradients.
// Bound by bytes: 28 of each parameter (p, m, v and g read, p, m, v written), and 4 for the
// norm. Plain C++, as lookup_native.h; start at `AdamW` and `Norm`.

#pragma once

#include <cmath>
#include <vector>

#include "lookup_native.h"

namespace memoryformer {

struct Leaf {
  int64_t size;
  const float* gradient;
  float *param, *first, *second;  // null for the norm
  float rate, decay;
};

constexpr int64_t kUpdateItem = 1 << 15;  // values

// body(leaf, begin, end) for pieces of every leaf, which are numbered in their order.
template <class Pool, class Body>
int64_t ForEachPiece(const std::vector<Leaf>& leaves, Pool& pool, const Body& body) {
  std::vector<int64_t> first{0};  // piece of every leaf
  int64_t values = 0;
  for (const Leaf& leaf : leaves) {
    first.push_back(first.back() + CeilDivide(leaf.size, kUpdateItem));
    values += leaf.size;
  }
  const int threads = values < 4 * kUpdateItem ? 1 : AvailableThreads();
  ParallelFor(pool, threads, first.back(), [&](int64_t piece) {
    const auto next = std::upper_bound(first.begin(), first.end(), piece);
    const auto i = next - first.begin() - 1;
    const int64_t begin = (piece - first[i]) * kUpdateItem;
    body(piece, leaves[i], begin, std::min(leaves[i].size, begin + kUpdateItem));
  });
  return first.back();
}

// The Euclidean norm over all leaves: floats within a piece, doubles over pieces in order.
template <class Pool>
float Norm(const std::vector<Leaf>& leaves, Pool& pool) {
  int64_t pieces = 0;
  for (const Leaf& leaf : leaves) pieces += CeilDivide(leaf.size, kUpdateItem);
  std::vector<double> sums(pieces);
  const auto sum_of_squares = ChooseUpdateKernels().sum_of_squares;
  ForEachPiece(leaves, pool, [&](int64_t piece, const Leaf& leaf, int64_t begin, int64_t end) {
    sums[piece] = sum_of_squares(leaf.gradient + begin, end - begin);
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return static_cast<float>(std::sqrt(total));
}

template <class Pool>
void AdamW(const std::vector<Leaf>& leaves, const Adam& adam, Pool& pool) {
  const auto update = ChooseUpdateKernels().update;
  ForEachPiece(leaves, pool, [&](int64_t, const Leaf& leaf, int64_t begin, int64_t end) {
    update(adam, leaf.rate, leaf.decay, end - begin, leaf.gradient + begin,
           leaf.param + begin, leaf.first + begin, leaf.second + begin);
  });
}

}  // namespace memoryformer
