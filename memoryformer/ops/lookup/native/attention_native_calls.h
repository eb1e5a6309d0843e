// XLA's side of attention_native.h: a part of lookup_native.cc.

using Indices = ffi::Buffer<ffi::DataType::S32>;

template <class A, class B>
bool SameShape(const A& a, const B& b) {
  const auto x = a.dimensions(), y = b.dimensions();
  return std::equal(x.begin(), x.end(), y.begin(), y.end());
}

ffi::Error AttentionCall(ffi::ThreadPool pool, Floats q, ffi::AnyBuffer keys,
                         ffi::AnyBuffer values, Indices index, Indices segments,
                         Indices key_segments, Indices filled, ffi::Result<Floats> y) {
  const auto d = q.dimensions(), k = keys.dimensions();
  const auto i = index.dimensions(), m = key_segments.dimensions();
  if (d.size() != 4 || k.size() != 4 || !SameShape(keys, values) || !SameShape(q, *y) ||
      i.size() != 2 || !SameShape(index, segments) || m.size() != 2 || i[0] != d[0] ||
      i[1] != d[1] || m[0] != d[0] || m[1] != k[2] || k[0] != d[0] || k[1] != d[2] ||
      k[3] != d[3] || filled.element_count() != 1 ||
      keys.element_type() != values.element_type())
    return Invalid("attention: shapes disagree");
  const auto run = [&](auto* key_data) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(key_data)>>;
    const memoryformer::Attention<T> op{d[0],
                                        d[1],
                                        d[2],
                                        d[3],
                                        k[2],
                                        q.typed_data(),
                                        key_data,
                                        static_cast<const T*>(values.untyped_data()),
                                        index.typed_data(),
                                        segments.typed_data(),
                                        key_segments.typed_data(),
                                        *filled.typed_data(),
                                        y->typed_data()};
    return Guarded([&] { memoryformer::Attend(op, pool); });
  };
  switch (keys.element_type()) {
    case ffi::DataType::F32:
      return run(static_cast<const float*>(keys.untyped_data()));
    case ffi::DataType::BF16:
      return run(static_cast<const BFloat16*>(keys.untyped_data()));
    default:
      return Invalid("attention: caches must be float32 or bfloat16");
  }
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(memoryformer_cache_attention, AttentionCall,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()          // q [B, L, H, E]
                                  .Arg<ffi::AnyBuffer>()  // keys [B, H, M, E]
                                  .Arg<ffi::AnyBuffer>()  // values
                                  .Arg<Indices>()         // index of queries [B, L]
                                  .Arg<Indices>()         // their segments [B, L]
                                  .Arg<Indices>()         // segments of keys [B, M]
                                  .Arg<Indices>()         // filled, []
                                  .Ret<Floats>());        // [B, L, H, E]
