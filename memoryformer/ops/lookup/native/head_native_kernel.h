// Inner loops of the head, compiled for one instruction set per inclusion: a part of
// lookup_native_kernel.h, inside its namespace. No include guard, for that reason.

constexpr int kPanel = 2 * kLanes;  // columns of a packed matrix that lie side by side
constexpr int kTileRows = kLanes == 16 ? 12 : 6;  // with two vectors each, most registers

// c[r, :] (+)= sum_k a[r, k] b[k, :], one panel of b. The depth is `blocks` times `depth`,
// between which a skips; b does not.
template <int kRows>
SIMD_TARGET void MultiplyRows(const Factor& a, const float* b, float* c, int64_t c_row,
                              bool add) {
  Vec sum[kRows][2];
  for (int r = 0; r < kRows; ++r)
    for (int h = 0; h < 2; ++h)
      sum[r][h] = add ? Load(c + r * c_row + h * kLanes) : Vec{};
  for (int64_t block = 0; block < a.blocks; ++block) {
    const float* at = a.data + block * a.block_stride;
    for (int64_t k = 0; k < a.depth; ++k, at += a.depth_stride, b += kPanel) {
      const Vec low = Load(b), high = Load(b + kLanes);
      for (int r = 0; r < kRows; ++r) {
        const float factor = at[r * a.row_stride];
        sum[r][0] += factor * low;
        sum[r][1] += factor * high;
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int h = 0; h < 2; ++h) Store(c + r * c_row + h * kLanes, sum[r][h]);
}

SIMD_TARGET void Multiply(Factor a, int64_t rows, const float* b, float* c, int64_t c_row,
                          bool add) {
  const auto advance = [&](int count) {
    a.data += count * a.row_stride;
    c += count * c_row;
    rows -= count;
  };
  for (; rows >= kTileRows; advance(kTileRows))
    MultiplyRows<kTileRows>(a, b, c, c_row, add);
  for (; rows >= 4; advance(4)) MultiplyRows<4>(a, b, c, c_row, add);
  for (; rows >= 1; advance(1)) MultiplyRows<1>(a, b, c, c_row, add);
}

// Logits of one token, `stride` apart by panel, become weight * softmax; returns log sum exp.
SIMD_TARGET float Softmax(float* logits, int64_t panels, int64_t stride, float weight) {
  Vec top = Load(logits);
  for (int64_t p = 0; p < panels; ++p)
    for (int h = 0; h < 2; ++h) {
      const Vec x = Load(logits + p * stride + h * kLanes);
      top = x > top ? x : top;
    }
  float largest = top[0];
  for (int l = 1; l < kLanes; ++l) largest = std::max(largest, float{top[l]});
  Vec sum[2] = {};
  for (int64_t p = 0; p < panels; ++p)
    for (int h = 0; h < 2; ++h) {
      float* at = logits + p * stride + h * kLanes;
      const Vec e = ExpOf(Load(at) - largest);
      sum[h] += e;
      Store(at, e);
    }
  const float total = LaneSum(sum[0] + sum[1]), scale = weight / total;
  for (int64_t p = 0; p < panels; ++p)
    for (int h = 0; h < 2; ++h) {
      float* at = logits + p * stride + h * kLanes;
      Store(at, scale * Load(at));
    }
  return std::log(total) + largest;
}

inline HeadKernels MakeHeadKernels() { return {kPanel, Multiply, Softmax}; }
