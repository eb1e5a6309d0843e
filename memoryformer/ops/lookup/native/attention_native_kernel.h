// Inner loop of attention_native.h, compiled for one instruction set per inclusion: a part of
// lookup_native_kernel.h, inside its namespace. No include guard, for that reason.

SIMD_TARGET inline float LargestLane(Vec v) {
  float lane[kLanes];
  Store(lane, v);
  for (int half = kLanes / 2; half >= 1; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] = lane[l] > lane[l + half] ? lane[l] : lane[l + half];
  return lane[0];
}

// logits[0:count] become e^(scale l - m) where a key is seen, else 0: the first `visible` are, and
// of them those whose `seen` is not zero, if it is given. count is whole vectors. m, the total
// and sums[0:width] go on from the keys before.
SIMD_TARGET void SoftmaxBlock(float* logits, int64_t count, float scale, int32_t visible,
                              const int32_t* seen, float* largest, float* total, float* sums,
                              int64_t width) {
  IntVec lane;
  for (int l = 0; l < kLanes; ++l) lane[l] = l;
  Vec top = Vec{} + kUnseen;
  for (int64_t j = 0; j < count; j += kLanes) {
    Vec l = scale * Load(logits + j);
    if (j + kLanes > visible) l = lane + int32_t(j) < visible ? l : Vec{} + kUnseen;
    if (seen != nullptr)
      l = *reinterpret_cast<const AnyIntVec*>(seen + j) != 0 ? l : Vec{} + kUnseen;
    Store(logits + j, l);
    top = l > top ? l : top;
  }
  const float before = *largest, now = std::max(before, LargestLane(top));
  Vec sum{};
  for (int64_t j = 0; j < count; j += kLanes) {
    const Vec l = Load(logits + j);
    const Vec e = l == kUnseen ? Vec{} : ExpOf(l - now);
    sum += e;
    Store(logits + j, e);
  }
  const float factor = now == before ? 1 : std::exp(before - now);
  *largest = now;
  *total = *total * factor + LaneSum(sum);
  for (int64_t e = 0; e < width && factor != 1; e += kLanes)
    Store(sums + e, factor * Load(sums + e));
}

inline AttentionKernels MakeAttentionKernels() { return {kPanel, Multiply, SoftmaxBlock}; }
