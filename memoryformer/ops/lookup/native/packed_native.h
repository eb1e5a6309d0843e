// The lookup of many tokens: the rows of a few tables that they read, a slice of columns at a
// time, are copied side by side into the cache and read there by all of them. So a row comes
// from memory once for a tile of tokens, and not once for each. Start at `ForwardPacked`.

#pragma once

#include "lookup_native.h"

namespace memoryformer {

constexpr int64_t kBulkReuse = 4;         // tokens to a row
constexpr int64_t kTileSums = 4096 * 64;  // of a tile of tokens and a slice of columns
constexpr int64_t kMaxTile = 4096;        // rows in a block are counted in 16 bits

// What the tokens of a tile read of `group` tables from k0 on: row in the block and weight
// [count, group], and the rows of the block, in the order of memory. The row after them is
// zeros, for tables beyond the last. kRowsAhead more of `wanted` can be read. Where tokens are
// many, nearly every row is wanted, and all are taken.
struct Group {
  uint16_t* rows;
  float* weights;
  int32_t* wanted;  // code of table k0 + j plus j C
  int64_t count;    // of rows wanted
};

template <class T>
void ResolveGroup(const Operands<T>& op, int64_t n0, int64_t count, int64_t k0, int64_t size,
                  bool every_row, Group& group) {
  const int64_t C = op.shape.buckets, present = std::min(size, op.shape.tables - k0);
  const Scratch places_memory(present * C * sizeof(uint16_t));
  auto* places = places_memory.As<uint16_t>();  // [present, C]: whether wanted, then where
  std::fill_n(places, present * C, uint16_t{every_row});
  for (int64_t n = n0; n < n0 + count && !every_row; ++n)
    for (int64_t j = 0; j < present; ++j) places[op.Row(n, k0 + j) - k0 * C] = 1;
  group.count = 0;
  for (int64_t i = 0; i < present * C; ++i) {
    const bool wanted = places[i];
    group.wanted[group.count] = static_cast<int32_t>(i);
    places[i] = static_cast<uint16_t>(group.count);
    group.count += wanted;
  }
  std::fill_n(group.wanted + group.count, kRowsAhead, 0);
  uint16_t* rows = group.rows;
  float* weights = group.weights;
  for (int64_t n = n0; n < n0 + count; ++n, rows += size, weights += size) {
    for (int64_t j = 0; j < present; ++j) {
      const int64_t row = op.Row(n, k0 + j);
      rows[j] = places[row - k0 * C];
      weights[j] = op.Weight(n, k0 + j, row);
    }
    for (int64_t j = present; j < size; ++j)
      rows[j] = static_cast<uint16_t>(group.count), weights[j] = 0;
  }
}

// How the work is cut: into tiles of tokens, and groups of 2^log_group tables.
struct Cut {
  int64_t tile, num_tiles, num_slices, num_groups, block_rows, list_rows;
  int log_group, blocks;
};

template <class T>
Cut MakeCut(const Shape& s, int width, int threads) {
  const auto [N, K, C, F] = s;
  Cut cut;
  cut.num_slices = CeilDivide(F, width);
  cut.num_tiles = CeilDivide(N, std::min<int64_t>(kMaxTile, kTileSums / width));
  // More tiles than memory traffic asks for, if threads would have nothing to do.
  while (cut.num_tiles * cut.num_slices < threads && N / (2 * cut.num_tiles) >= C)
    cut.num_tiles *= 2;
  cut.tile = CeilDivide(N, cut.num_tiles);
  cut.num_tiles = CeilDivide(N, cut.tile);  // rounding up may have left the last ones empty
  // With few tokens to a row copying costs as much as reading, and waits for memory: a second
  // block is filled meanwhile. Both fit the second cache, if codes are as good as random.
  cut.blocks = cut.tile >= kBulkReuse * C ? 1 : 2;
  const double read = -std::expm1(-static_cast<double>(cut.tile) / C) * C;
  const double bytes = cut.blocks * read * width * sizeof(T);
  cut.log_group = 3;
  while (cut.log_group > 0 && ((int64_t{1} << (cut.log_group - 1)) >= K ||
                               bytes * (1 << cut.log_group) > Level2CacheBytes() * 5 / 8))
    --cut.log_group;
  cut.num_groups = CeilDivide(K, int64_t{1} << cut.log_group);
  cut.block_rows = (std::min(C, cut.tile) << cut.log_group) + 1;
  cut.list_rows = cut.block_rows + kRowsAhead;
  return cut;
}

// The columns from f0 on of `count` tokens from n0 on.
template <class T>
void SumSlice(const Kernels<T>& kernels, const Operands<T>& op, const Cut& cut,
              const Group* groups, int64_t n0, int64_t count, int64_t f0, float* y) {
  const int64_t C = op.shape.buckets, F = op.shape.features, width = kernels.width;
  const int columns = static_cast<int>(std::min(width, F - f0));
  const Scratch blocks_memory(cut.blocks * cut.block_rows * width * sizeof(T));
  const Scratch sums_memory(count * width * sizeof(float));
  auto* sums = sums_memory.As<float>();
  const auto rows_of = [&](int64_t g) {
    T* block = blocks_memory.As<T>() + g % cut.blocks * cut.block_rows * width;
    if (g == cut.num_groups) return RowCopy<T>{nullptr, nullptr, 0, F, columns, block};
    const T* source = op.tables + (g << cut.log_group) * C * F + f0;
    return RowCopy<T>{source, groups[g].wanted, groups[g].count, F, columns, block};
  };
  RowCopy<T> copy = rows_of(0);
  kernels.copy_rows(copy, copy.count);
  for (int64_t g = 0; g < cut.num_groups; ++g) {
    const Group& group = groups[g];
    T* block = copy.block;
    std::memset(block + group.count * width, 0, width * sizeof(T));
    copy = rows_of(g + 1);
    T* next = std::exchange(copy.block, cut.blocks == 1 ? nullptr : copy.block);
    kernels.add_group[cut.log_group](block, group.rows, group.weights, count, g == 0, sums,
                                     copy);
    if (cut.blocks == 1) copy.done = 0, copy.block = next;
    kernels.copy_rows(copy, copy.count);
  }
  for (int64_t n = 0; n < count; ++n)
    std::memcpy(y + (n0 + n) * F + f0, sums + n * width, columns * sizeof(float));
}

template <class T, class Pool>
void ForwardPacked(const Kernels<T>& kernels, const Operands<T>& op, float* y,
                   Pool& pool) {
  const int64_t N = op.shape.tokens;
  const int threads = ChooseThreads(op.shape);
  const Cut cut = MakeCut<T>(op.shape, kernels.width, threads);
  const int64_t size = int64_t{1} << cut.log_group, lists = cut.num_tiles * cut.num_groups;
  const Scratch rows_memory(cut.num_groups * N * size * sizeof(uint16_t));
  const Scratch weights_memory(cut.num_groups * N * size * sizeof(float));
  const Scratch wanted_memory(lists * cut.list_rows * sizeof(int32_t));
  std::vector<Group> groups(lists);
  ParallelFor(pool, threads, lists, [&](int64_t i) {
    const int64_t n0 = i / cut.num_groups * cut.tile, g = i % cut.num_groups;
    const int64_t count = std::min(cut.tile, N - n0);
    const int64_t at = (n0 * cut.num_groups + g * count) * size;
    groups[i] = {rows_memory.As<uint16_t>() + at, weights_memory.As<float>() + at,
                 wanted_memory.As<int32_t>() + i * cut.list_rows, 0};
    ResolveGroup(op, n0, count, g * size, size, cut.blocks == 1, groups[i]);
  });
  ParallelFor(pool, threads, cut.num_tiles * cut.num_slices, [&](int64_t item) {
    const int64_t tile = item / cut.num_slices, n0 = tile * cut.tile;
    SumSlice(kernels, op, cut, groups.data() + tile * cut.num_groups, n0,
             std::min(cut.tile, N - n0), item % cut.num_slices * kernels.width, y);
  });
}

}  // namespace memoryformer
