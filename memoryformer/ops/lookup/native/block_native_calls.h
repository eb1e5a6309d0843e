// XLA's side of block_native.h: a part of lookup_native.cc, behind its helpers. No include
// guard, for that reason.

namespace {

// Takes operands one after another, and remembers whether all were as expected.
class OperandList {
 public:
  explicit OperandList(ffi::RemainingArgs args) : args_(args) {}

  const float* Float32(int64_t count) {
    const auto buffer = Next();
    return Check(buffer, ffi::DataType::F32, count) ? buffer->template typed_data<float>()
                                                    : nullptr;
  }

  // Tables [K, 2^tau, F] of `inputs` = K tau values, then their scales and bias if any.
  memoryformer::MemoryRows Layer(int64_t inputs, bool has_bias, bool power, bool two_rows,
                                 const float* beta_gamma) {
    memoryformer::MemoryRows layer;
    const auto buffer = Next();
    if (!buffer || buffer->dimensions().size() != 3) return Fail(layer);
    const auto d = buffer->dimensions();
    const int64_t K = d[0], C = d[1], bits = K > 0 ? inputs / K : 0;
    if (bits < 1 || bits > memoryformer::kMaxCodeBits || K * bits != inputs ||
        int64_t{1} << bits != C)
      return Fail(layer);
    layer.tables = K, layer.features = d[2];
    layer.hash = {bits, power, beta_gamma[0], beta_gamma[1], two_rows};
    layer.rows = buffer->untyped_data();
    switch (buffer->element_type()) {
      case ffi::DataType::F32:
        layer.sum = memoryformer::SumMemoryRows<float>;
        break;
      case ffi::DataType::BF16:
        layer.sum = memoryformer::SumMemoryRows<BFloat16>;
        break;
      case ffi::DataType::S8:
        layer.sum = memoryformer::SumMemoryRows<int8_t>;
        layer.scales = Float32(K * C);
        break;
      default:
        return Fail(layer);
    }
    if (has_bias) layer.bias = Float32(d[2]);
    return layer;
  }

  void Skip(size_t count) { next_ += count; }  // what comes back as results
  bool good() const { return good_; }
  bool ended() const { return next_ == args_.size(); }

 private:
  std::optional<ffi::AnyBuffer> Next() {
    if (next_ < args_.size())
      if (auto buffer = args_.get<ffi::AnyBuffer>(next_++)) return *buffer;
    good_ = false;
    return std::nullopt;
  }
  bool Check(const std::optional<ffi::AnyBuffer>& buffer, ffi::DataType type,
             int64_t count) {
    const bool right = buffer && buffer->element_type() == type &&
                       static_cast<int64_t>(buffer->element_count()) == count;
    good_ = good_ && right;
    return right;
  }
  memoryformer::MemoryRows Fail(const memoryformer::MemoryRows& layer) {
    good_ = false;
    return layer;
  }

  ffi::RemainingArgs args_;
  size_t next_ = 0;
  bool good_ = true;
};

// The cache of block i, in the places of its operands: XLA copied it there if it had to.
bool TakeCache(ffi::RemainingRets caches, size_t i, memoryformer::Trunk& trunk,
               memoryformer::Cache& cache) {
  auto keys = caches.get<Floats>(4 * i), values = caches.get<Floats>(4 * i + 1);
  auto segments = caches.get<Codes>(4 * i + 2), length = caches.get<Codes>(4 * i + 3);
  if (!keys || !values || !segments || !length) return false;
  const auto d = (*keys)->dimensions();
  if (d.size() != 4 || d[0] != trunk.streams || d[1] != trunk.heads ||
      d[3] != trunk.HeadWidth() || d[2] < trunk.length || (i > 0 && d[2] != trunk.slots) ||
      (*values)->element_count() != (*keys)->element_count() ||
      static_cast<int64_t>((*segments)->element_count()) != d[0] * d[2] ||
      (*length)->element_count() != 1)
    return false;
  trunk.slots = d[2];
  cache = {(*keys)->typed_data(), (*values)->typed_data(), (*segments)->typed_data(),
           (*length)->typed_data()};
  return true;
}

ffi::Error BlocksCall(ffi::ThreadPool pool, Floats x, Floats cos, Floats sin, Codes segments,
                      Floats knobs, ffi::RemainingArgs args, int64_t heads,
                      int64_t residual, bool layer_norm, float eps, float middle_eps,
                      bool power, bool two_rows, bool has_out, bool has_up, bool has_bias,
                      ffi::Result<Floats> y, ffi::RemainingRets caches) {
  const auto d = x.dimensions(), s = segments.dimensions(), c = cos.dimensions();
  const size_t count = caches.size() / 4;
  if (d.size() != 2 || s.size() != 2 || c.size() != 2 || d[0] != s[0] * s[1] ||
      c[0] != d[0] || sin.element_count() != cos.element_count() || heads < 1 ||
      d[1] % heads != 0 || 2 * c[1] > d[1] / heads || caches.size() != 4 * count ||
      knobs.element_count() != 8 * count || residual < 0 || residual > 2 ||
      y->element_count() != x.element_count())
    return Invalid("blocks: shapes disagree");
  const int64_t D = d[1];
  memoryformer::Trunk trunk{s[0], s[1], D, heads, 0};
  trunk.residual = static_cast<memoryformer::Residual>(residual);
  trunk.half = c[1], trunk.cos = cos.typed_data(), trunk.sin = sin.typed_data();
  trunk.segments = segments.typed_data();
  trunk.x = x.typed_data(), trunk.y = y->typed_data();
  trunk.blocks.resize(count);
  OperandList operands(args);
  const auto norm = [&](int64_t width, bool has_bias, float eps) {
    const float* scale = operands.Float32(width);
    const float* bias = has_bias ? operands.Float32(width) : nullptr;
    return memoryformer::NormWeights{scale, bias, eps};
  };
  trunk.final_norm = norm(D, layer_norm, eps);
  const float* knob = knobs.typed_data();
  for (size_t i = 0; i < count && operands.good(); ++i, knob += 8) {
    memoryformer::Block& block = trunk.blocks[i];
    const auto layer = [&](int64_t inputs, int which) {
      return operands.Layer(inputs, has_bias, power, two_rows, knob + 2 * which);
    };
    block.norm1 = norm(D, layer_norm, eps);
    if (residual != 2) block.norm2 = norm(D, layer_norm, eps);
    block.qkv = layer(D, 0);
    if (has_out) block.out = layer(D, 1);
    if (has_up) {
      block.up = layer(D, 2);
      block.middle = norm(block.up.features, true, middle_eps);
    }
    block.down = layer(has_up ? block.up.features : D, 3);
    operands.Skip(4);
    if (!operands.good() || block.qkv.features != 3 * D ||
        (has_out && block.out.features != D) || block.down.features != D ||
        !TakeCache(caches, i, trunk, block.cache))
      return Invalid("blocks: shapes or types disagree");
  }
  if (!operands.good() || !operands.ended()) return Invalid("blocks: operands left");
  return Guarded([&] { memoryformer::ReadBlocks(trunk, pool); });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(memoryformer_blocks, BlocksCall,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()    // x [N, D]
                                  .Arg<Floats>()    // cos [N, pairs]
                                  .Arg<Floats>()    // sin
                                  .Arg<Codes>()     // segments [B, L]
                                  .Arg<Floats>()    // beta, gamma: [blocks, 4, 2]
                                  .RemainingArgs()  // see `blocks.py`
                                  .Attr<int64_t>("heads")
                                  .Attr<int64_t>("residual")
                                  .Attr<bool>("layer_norm")
                                  .Attr<float>("eps")
                                  .Attr<float>("middle_eps")
                                  .Attr<bool>("power")
                                  .Attr<bool>("two_rows")
                                  .Attr<bool>("has_out")
                                  .Attr<bool>("has_up")
                                  .Attr<bool>("has_bias")
                                  .Ret<Floats>()       // y [N, D]
                                  .RemainingRets());   // caches, in place
