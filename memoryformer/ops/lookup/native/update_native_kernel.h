// Inner loops of AdamW, compiled for one instruction set per inclusion: a part of
// lookup_native_kernel.h, inside its namespace. No include guard, for that reason.

SIMD_TARGET inline Vec Root(Vec x) {
#if SIMD_LANES == 16
  return (Vec)_mm512_sqrt_ps((__m512)x);
#elif SIMD_LANES == 8
  return (Vec)_mm256_sqrt_ps((__m256)x);
#else
  for (int l = 0; l < kLanes; ++l) x[l] = std::sqrt(x[l]);
  return x;
#endif
}

// The operations of `training.optimizer`, in its order.
SIMD_TARGET inline void UpdateVector(const Adam& a, float rate, float decay,
                                     const float* gradient, float* param, float* first,
                                     float* second) {
  const Vec g = Load(gradient) / a.weight * a.factor, p = Load(param);
  const Vec m = a.rest1 * g + a.b1 * Load(first);
  const Vec v = a.rest2 * (g * g) + a.b2 * Load(second);
  const Vec root = Root(v / a.unbias2) + a.eps;
  const Vec u = m / a.unbias1 / root + decay * p;
  Store(first, m);
  Store(second, v);
  Store(param, p - rate * u);
}

SIMD_TARGET void Update(const Adam& adam, float rate, float decay, int64_t count,
                        const float* gradient, float* param, float* first,
                        float* second) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    UpdateVector(adam, rate, decay, gradient + i, param + i, first + i, second + i);
  if (i == count) return;
  const size_t bytes = (count - i) * sizeof(float);
  float last[4][kLanes] = {};
  const float* arrays[4] = {gradient + i, param + i, first + i, second + i};
  for (int a = 0; a < 4; ++a) std::memcpy(last[a], arrays[a], bytes);
  UpdateVector(adam, rate, decay, last[0], last[1], last[2], last[3]);
  std::memcpy(param + i, last[1], bytes);
  std::memcpy(first + i, last[2], bytes);
  std::memcpy(second + i, last[3], bytes);
}

SIMD_TARGET double SumOfSquares(const float* x, int64_t count) {
  Vec sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes)
    for (int s = 0; s < 4; ++s) {
      const Vec part = Load(x + i + s * kLanes);
      sum[s] += part * part;
    }
  const Vec both = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  double total = 0;
  for (int l = 0; l < kLanes; ++l) total += both[l];
  for (; i < count; ++i) total += double{x[i]} * x[i];
  return total;
}

inline UpdateKernels MakeUpdateKernels() { return {Update, SumOfSquares}; }
