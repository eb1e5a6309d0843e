// XLA's side of the native code: the FFI handlers and the settings, over plain C++; those of
// attention, blocks, integer products and training are in files of their own, included below.
// ops/lookup/native.py compiles this file on first use and loads it.

#include "attention_native.h"
#include "backward_native.h"
#include "block_native.h"
#include "decode_native.h"
#include "head_native.h"
#include "lookup_native.h"
#include "screen_search_native.h"
#include "update_native.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using memoryformer::BFloat16;
using memoryformer::Operands;

using Codes = ffi::Buffer<ffi::DataType::S32>;
using Floats = ffi::Buffer<ffi::DataType::F32>;

template <class T>
Operands<T> MakeOperands(const ffi::AnyBuffer& tables, const Codes& codes,
                         const Floats& scores, const float* scales = nullptr) {
  const auto d = tables.dimensions();
  return {{codes.dimensions()[0], d[0], d[1], d[2]},
          static_cast<const T*>(tables.untyped_data()),
          scales,
          codes.typed_data(),
          scores.typed_data()};
}

bool ShapesAgree(const ffi::AnyBuffer& tables, const Codes& codes, const Floats& scores,
                 const Floats& y) {
  const auto t = tables.dimensions(), c = codes.dimensions(), s = scores.dimensions(),
             o = y.dimensions();
  return t.size() == 3 && c.size() == 2 && s.size() == 2 && o.size() == 2 &&
         c[0] == s[0] && c[1] == s[1] && c[1] == t[0] && o[0] == c[0] && o[1] == t[2];
}

template <class Function>
ffi::Error Guarded(const Function& function) {
  try {
    function();
    return ffi::Error::Success();
  } catch (const std::exception& error) {
    return ffi::Error(ffi::ErrorCode::kInternal, error.what());
  }
}

ffi::Error Invalid(const char* what) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, what);
}

ffi::Error ForwardCall(ffi::ThreadPool pool, ffi::AnyBuffer tables, Codes codes,
                       Floats scores, Floats scales, ffi::Result<Floats> y) {
  if (!ShapesAgree(tables, codes, scores, *y)) return Invalid("lookup: shapes disagree");
  const auto run = [&](const auto& operands) {
    return Guarded([&] { memoryformer::Forward(operands, y->typed_data(), pool); });
  };
  switch (tables.element_type()) {
    case ffi::DataType::F32:
      return run(MakeOperands<float>(tables, codes, scores));
    case ffi::DataType::BF16:
      return run(MakeOperands<BFloat16>(tables, codes, scores));
    case ffi::DataType::S8: {
      const auto t = tables.dimensions(), s = scales.dimensions();
      if (s.size() != 2 || s[0] != t[0] || s[1] != t[1])
        return Invalid("lookup: int8 tables need one scale per row, [K, C]");
      return run(MakeOperands<int8_t>(tables, codes, scores, scales.typed_data()));
    }
    default:
      return Invalid("lookup: tables must be float32, bfloat16 or int8");
  }
}

ffi::Error BackwardCall(ffi::ThreadPool pool, ffi::AnyBuffer tables, Codes codes,
                        Floats scores, Floats dy, ffi::Result<ffi::AnyBuffer> dtables,
                        ffi::Result<Floats> dscores) {
  if (!ShapesAgree(tables, codes, scores, dy)) return Invalid("lookup: shapes disagree");
  if (dtables->element_type() != tables.element_type() ||
      dtables->element_count() != tables.element_count() ||
      dscores->element_count() != scores.element_count())
    return Invalid("lookup: a gradient has another shape or type than its value");
  const auto run = [&](auto operands) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(operands.tables)>>;
    auto* drows = static_cast<T*>(dtables->untyped_data());
    return Guarded([&] {
      memoryformer::Backward(operands, dy.typed_data(), drows, dscores->typed_data(),
                             pool);
    });
  };
  switch (tables.element_type()) {
    case ffi::DataType::F32:
      return run(MakeOperands<float>(tables, codes, scores));
    case ffi::DataType::BF16:
      return run(MakeOperands<BFloat16>(tables, codes, scores));
    default:
      return Invalid("lookup: only float32 and bfloat16 tables have gradients");
  }
}

const float* OrNull(const Floats& floats) {
  return floats.element_count() == 0 ? nullptr : floats.typed_data();
}

ffi::Error LayerCall(ffi::ThreadPool pool, Floats x, ffi::AnyBuffer tables, Floats scales,
                     Floats bias, Floats knobs, bool power, bool two_rows,
                     ffi::Result<Floats> y) {
  const auto d = x.dimensions(), t = tables.dimensions(), o = y->dimensions();
  const int64_t rows = t.size() == 3 ? t[0] * t[1] : -1;
  if (t.size() != 3 || d.size() != 2 || o.size() != 2 || o[0] != d[0] || o[1] != t[2] ||
      t[0] == 0 || d[1] % t[0] != 0 || knobs.element_count() != 2 ||
      (bias.element_count() != 0 && static_cast<int64_t>(bias.element_count()) != t[2]))
    return Invalid("memory layer: shapes disagree");
  const int64_t bits = d[1] / t[0];
  if (bits < 1 || bits > memoryformer::kMaxCodeBits || int64_t{1} << bits != t[1])
    return Invalid("memory layer: tables must have 2^tau rows, tau <= 16");
  const float* beta_gamma = knobs.typed_data();
  const memoryformer::Hash hash{bits, power, beta_gamma[0], beta_gamma[1], two_rows};
  const memoryformer::Shape shape{d[0], t[0], t[1], t[2]};
  const auto run = [&](auto* rows, const float* row_scales) {
    return Guarded([&] {
      memoryformer::MemoryLayer(shape, rows, row_scales, x.typed_data(), OrNull(bias), hash,
                                y->typed_data(), pool);
    });
  };
  const void* data = tables.untyped_data();
  switch (tables.element_type()) {
    case ffi::DataType::F32:
      return run(static_cast<const float*>(data), nullptr);
    case ffi::DataType::BF16:
      return run(static_cast<const BFloat16*>(data), nullptr);
    case ffi::DataType::S8:
      if (static_cast<int64_t>(scales.element_count()) != rows)
        return Invalid("memory layer: int8 tables need one scale per row, [K, C]");
      return run(static_cast<const int8_t*>(data), scales.typed_data());
    default:
      return Invalid("memory layer: tables must be float32, bfloat16 or int8");
  }
}

ffi::Error ProductCall(ffi::ThreadPool pool, Floats x, ffi::AnyBuffer weights,
                       Floats scales, ffi::Result<Floats> y) {
  using memoryformer::Int4Pair, memoryformer::Matrix;
  const auto d = x.dimensions(), w = weights.dimensions(), o = y->dimensions();
  const bool pairs = weights.element_type() == ffi::DataType::U8;
  if (d.size() != 2 || w.size() != 2 || o.size() != 2 || o[0] != d[0] || o[1] != w[0] ||
      d[1] != w[1] * (pairs ? 2 : 1) || (pairs && d[1] % memoryformer::kInt4Group != 0))
    return Invalid("matrix product: shapes disagree");
  const auto run = [&](auto* data, int64_t num_scales) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
    if (static_cast<int64_t>(scales.element_count()) != num_scales)
      return Invalid("matrix product: scales of another number");
    return Guarded([&] {
      memoryformer::MatrixProduct(Matrix<T>{w[0], d[1], data, OrNull(scales)},
                                  x.typed_data(), d[0], y->typed_data(), pool);
    });
  };
  const void* data = weights.untyped_data();
  switch (weights.element_type()) {
    case ffi::DataType::F32:
      return run(static_cast<const float*>(data), 0);
    case ffi::DataType::BF16:
      return run(static_cast<const BFloat16*>(data), 0);
    case ffi::DataType::S8:
      return run(static_cast<const int8_t*>(data), w[0]);
    case ffi::DataType::U8:
      return run(static_cast<const Int4Pair*>(data),
                 w[0] * (d[1] / memoryformer::kInt4Group));
    default:
      return Invalid("matrix product: weights must be float32, bfloat16, int8 or uint8");
  }
}

ffi::Error LargestCall(ffi::ThreadPool pool, Floats y, ffi::Result<Codes> places) {
  const int64_t rows = places->element_count(), size = y.element_count();
  if (rows == 0 || size == 0 || size % rows != 0) return Invalid("largest: no values");
  return Guarded([&] {
    memoryformer::FirstLargest(y.typed_data(), rows, size / rows, places->typed_data(),
                               pool);
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(memoryformer_first_largest, LargestCall,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()     // y [.., V]
                                  .Ret<Codes>());    // [..]

XLA_FFI_DEFINE_HANDLER_SYMBOL(memoryformer_memory_layer, LayerCall,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()          // x [N, K tau]
                                  .Arg<ffi::AnyBuffer>()  // tables [K, C, F]
                                  .Arg<Floats>()          // scales [K, C], or empty
                                  .Arg<Floats>()          // bias [F], or empty
                                  .Arg<Floats>()          // beta, gamma
                                  .Attr<bool>("power")
                                  .Attr<bool>("two_rows")
                                  .Ret<Floats>());        // y [N, F]

XLA_FFI_DEFINE_HANDLER_SYMBOL(memoryformer_matrix_product, ProductCall,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()          // x [N, D]
                                  .Arg<ffi::AnyBuffer>()  // [V, D], or uint8 [V, D / 2]
                                  .Arg<Floats>()          // scales, or empty
                                  .Ret<Floats>());        // y [N, V]

XLA_FFI_DEFINE_HANDLER_SYMBOL(memoryformer_lookup_forward, ForwardCall,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // tables [K, C, F]
                                  .Arg<Codes>()           // [N, K]
                                  .Arg<Floats>()          // scores [N, K]
                                  .Arg<Floats>()          // scales [K, C], or empty
                                  .Ret<Floats>());        // y [N, F]

XLA_FFI_DEFINE_HANDLER_SYMBOL(memoryformer_lookup_backward, BackwardCall,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()     // tables [K, C, F]
                                  .Arg<Codes>()              // [N, K]
                                  .Arg<Floats>()             // scores [N, K]
                                  .Arg<Floats>()             // dy [N, F]
                                  .Ret<ffi::AnyBuffer>()     // dtables [K, C, F]
                                  .Ret<Floats>());           // dscores [N, K]

#include "attention_native_calls.h"
#include "block_native_calls.h"
#include "integer_native_calls.h"
#include "training_native_calls.h"

extern "C" void memoryformer_configure(int threads, int instructions, int64_t reuse) {
  memoryformer::max_threads = threads;
  memoryformer::instruction_set = instructions;
  memoryformer::packing_reuse = reuse;
}
