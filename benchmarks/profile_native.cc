// One kernel of the native code, a given number of times, for callgrind: see
// profile_native.py. Sizes are of one layer of MemoryFormer-base.

#include <cstdio>
#include <random>
#include <string>
#include <thread>

#include "backward_native.h"
#include "decode_native.h"

using namespace memoryformer;

struct NoPool {
  template <class Work>
  void Schedule(Work) {}  // one thread: the caller does everything
};

constexpr int64_t kTables = 128, kBuckets = 256, kFeatures = 1024, kWidth = 1024;

// Values do not matter to what is counted: bytes that are small finite numbers.
template <class T>
std::vector<T> Bytes(int64_t count) {
  std::vector<T> data(count);
  std::memset(static_cast<void*>(data.data()), 0x3c, count * sizeof(T));
  return data;
}

template <class T>
void Layer(int64_t times, bool whole) {
  const auto tables = Bytes<T>(kTables * kBuckets * kFeatures);
  const std::vector<float> scales(kTables * kBuckets, 1.0f);
  std::vector<float> x(kWidth), y(kFeatures), scores(kTables, 0.5f);
  std::vector<int32_t> codes(kTables);
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const float* row_scales = std::is_same_v<T, int8_t> ? scales.data() : nullptr;
  const Shape shape{1, kTables, kBuckets, kFeatures};
  for (float& value : x) value = normal(random);
  NoPool pool;
  for (int64_t i = 0; i < times; ++i) {
    for (int32_t& code : codes) code = random() % kBuckets;
    if (whole)
      MemoryLayer(shape, tables.data(), row_scales, x.data(), nullptr,
                  Hash{8, false, 2.0f, 1.0f}, y.data(), pool);
    else
      Forward(Operands<T>{shape, tables.data(), row_scales, codes.data(), scores.data()},
              y.data(), pool);
  }
}

template <class T>
void Product(int64_t times) {
  constexpr int64_t kOutputs = 1024;
  constexpr bool kPairs = std::is_same_v<T, Int4Pair>;
  const auto weights = Bytes<T>(kOutputs * kWidth / (kPairs ? 2 : 1));
  const std::vector<float> scales(kOutputs * (kPairs ? kWidth / kInt4Group : 1), 1.0f);
  const std::vector<float> x(kWidth, 1.0f);
  std::vector<float> y(kOutputs);
  const bool scaled = kPairs || sizeof(T) == 1;
  NoPool pool;
  for (int64_t i = 0; i < times; ++i)
    MatrixProduct(Matrix<T>{kOutputs, kWidth, weights.data(),
                            scaled ? scales.data() : nullptr},
                  x.data(), 1, y.data(), pool);
}

void Many(int64_t times, bool backward) {
  constexpr int64_t kTokens = 1024, kFewTables = 16;
  const auto tables = Bytes<float>(kFewTables * kBuckets * kFeatures);
  std::vector<float> y(kTokens * kFeatures, 1.0f), scores(kTokens * kFewTables, 0.5f),
      dscores(scores.size()), dtables(tables.size());
  std::vector<int32_t> codes(kTokens * kFewTables);
  std::mt19937 random(1);
  for (int32_t& code : codes) code = random() % kBuckets;
  const Operands<float> op{{kTokens, kFewTables, kBuckets, kFeatures}, tables.data(),
                           nullptr, codes.data(), scores.data()};
  NoPool pool;
  for (int64_t i = 0; i < times; ++i) {
    if (backward)
      Backward(op, y.data(), dtables.data(), dscores.data(), pool);
    else
      Forward(op, y.data(), pool);
  }
}

int main(int, char** arguments) {
  const std::string name = arguments[1];
  const int64_t times = std::stol(arguments[2]);
  max_threads = 1;
  if (name == "lookup float32") Layer<float>(times, false);
  else if (name == "lookup int8") Layer<int8_t>(times, false);
  else if (name == "layer int8") Layer<int8_t>(times, true);
  else if (name == "product float32") Product<float>(times);
  else if (name == "product int8") Product<int8_t>(times);
  else if (name == "product int4") Product<Int4Pair>(times);
  else if (name == "forward N=1024") Many(times, false);
  else if (name == "backward N=1024") Many(times, true);
  else return 1;
  return 0;
}
