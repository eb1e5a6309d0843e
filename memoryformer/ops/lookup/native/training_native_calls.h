// XLA's side of update_native.h and head_native.h: a part of lookup_native.cc.

namespace {

// The gradients of parameters, then their values and both moments where `stored` has them.
ffi::ErrorOr<std::vector<memoryformer::Leaf>> MakeLeaves(ffi::RemainingArgs gradients,
                                                         ffi::RemainingRets* stored) {
  const size_t count = stored == nullptr ? gradients.size() : stored->size() / 3;
  std::vector<memoryformer::Leaf> leaves(count);
  for (size_t i = 0; i < count; ++i) {
    const auto gradient = gradients.get<Floats>(i);
    if (!gradient) return ffi::Unexpected(gradient.error());
    memoryformer::Leaf& leaf = leaves[i];
    leaf.gradient = gradient->typed_data();
    leaf.size = gradient->element_count();
    float** arrays[] = {&leaf.param, &leaf.first, &leaf.second};
    for (size_t a = 0; stored != nullptr && a < 3; ++a) {
      auto array = stored->get<Floats>(a * count + i);
      if (!array) return ffi::Unexpected(array.error());
      if (static_cast<int64_t>((*array)->element_count()) != leaf.size)
        return ffi::Unexpected(Invalid("update: a moment has another size than its value"));
      *arrays[a] = (*array)->typed_data();
    }
  }
  return leaves;
}

ffi::Error NormCall(ffi::ThreadPool pool, ffi::RemainingArgs gradients,
                    ffi::Result<Floats> norm) {
  const auto leaves = MakeLeaves(gradients, nullptr);
  if (!leaves) return leaves.error();
  return Guarded([&] { *norm->typed_data() = memoryformer::Norm(*leaves, pool); });
}

ffi::Error UpdateCall(ffi::ThreadPool pool, ffi::Buffer<ffi::DataType::PRED> wanted,
                      Floats knobs, Floats rates, Floats decays, ffi::RemainingArgs args,
                      ffi::RemainingRets stored) {
  auto leaves = MakeLeaves(args, &stored);
  if (!leaves) return leaves.error();
  const size_t count = leaves->size();
  if (knobs.element_count() * sizeof(float) != sizeof(memoryformer::Adam) ||
      rates.element_count() != count || decays.element_count() != count ||
      args.size() != 4 * count || stored.size() != 3 * count)
    return Invalid("update: shapes disagree");
  // What is stored came in by the same places: XLA copied it there if it had to.
  if (!*wanted.typed_data()) return ffi::Error::Success();
  memoryformer::Adam adam;
  std::memcpy(&adam, knobs.typed_data(), sizeof(adam));
  for (size_t i = 0; i < count; ++i) {
    (*leaves)[i].rate = rates.typed_data()[i];
    (*leaves)[i].decay = decays.typed_data()[i];
  }
  return Guarded([&] { memoryformer::AdamW(*leaves, adam, pool); });
}

ffi::Error HeadCall(ffi::ThreadPool pool, Floats x, Floats kernel, Codes targets,
                    Floats weights, ffi::Result<Floats> nats, ffi::Result<Floats> dx,
                    ffi::Result<Floats> dkernel) {
  const auto d = x.dimensions(), k = kernel.dimensions();
  if (d.size() != 2 || k.size() != 2 || k[0] != d[1] ||
      static_cast<int64_t>(targets.element_count()) != d[0] ||
      static_cast<int64_t>(weights.element_count()) != d[0])
    return Invalid("head: shapes disagree");
  const memoryformer::Head head{d[0],
                                d[1],
                                k[1],
                                x.typed_data(),
                                kernel.typed_data(),
                                targets.typed_data(),
                                weights.typed_data(),
                                dx->typed_data(),
                                dkernel->typed_data()};
  return Guarded([&] { *nats->typed_data() = memoryformer::HeadNats(head, pool); });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(memoryformer_head_nats, HeadCall,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()       // x [N, D]
                                  .Arg<Floats>()       // kernel [D, V]
                                  .Arg<Codes>()        // targets [N]
                                  .Arg<Floats>()       // weights [N]
                                  .Ret<Floats>()       // []
                                  .Ret<Floats>()       // dx [N, D]
                                  .Ret<Floats>());     // dkernel [D, V]

XLA_FFI_DEFINE_HANDLER_SYMBOL(memoryformer_gradient_norm, NormCall,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .RemainingArgs()     // gradients
                                  .Ret<Floats>());     // []

XLA_FFI_DEFINE_HANDLER_SYMBOL(memoryformer_adamw, UpdateCall,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::DataType::PRED>>()  // []
                                  .Arg<Floats>()       // `Adam`, [9]
                                  .Arg<Floats>()       // learning rate of each leaf
                                  .Arg<Floats>()       // decay of each leaf
                                  .RemainingArgs()     // gradients, p, m, v
                                  .RemainingRets());   // p, m, v, in place
