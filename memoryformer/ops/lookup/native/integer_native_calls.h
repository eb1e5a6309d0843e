// XLA's side of integer_native.h and screen_search_native.h: a part of lookup_native.cc, behind
// its helpers. No include guard, for that reason.

namespace {

using Bytes = ffi::Buffer<ffi::DataType::U8>;
using SignedBytes = ffi::Buffer<ffi::DataType::S8>;

ffi::Error IntegerProductCall(ffi::ThreadPool pool, Floats x, Bytes tiles, Floats scales,
                              bool four_bits, ffi::Result<Floats> y) {
  using memoryformer::CeilDivide, memoryformer::kTileRows, memoryformer::kInt4Group;
  const auto d = x.dimensions(), t = tiles.dimensions(), o = y->dimensions();
  if (d.size() != 2 || t.size() != 4 || o.size() != 2 || o[0] != d[0] ||
      t[0] != CeilDivide(o[1], kTileRows) || t[1] * (four_bits ? 8 : 4) != d[1] ||
      t[2] != kTileRows || t[3] != 4 || (four_bits && d[1] % kInt4Group != 0) ||
      static_cast<int64_t>(scales.element_count()) !=
          t[0] * kTileRows * (four_bits ? d[1] / kInt4Group : 1))
    return Invalid("integer product: shapes disagree");
  return Guarded([&] {
    memoryformer::IntegerProduct(
        memoryformer::IntegerMatrix{o[1], d[1], four_bits, tiles.typed_data(),
                                    scales.typed_data()},
        x.typed_data(), d[0], y->typed_data(), pool);
  });
}

ffi::Error ScreenedTopCall(ffi::ThreadPool pool, Floats x, SignedBytes rows, Floats scales,
                           SignedBytes rotation, Floats rotation_scales, Bytes tiles,
                           Floats slack, int64_t lead, float most_rows,
                           ffi::Result<Floats> values,
                           ffi::Result<ffi::Buffer<ffi::DataType::S32>> indices) {
  const auto d = x.dimensions(), w = rows.dimensions(), b = rotation.dimensions(),
             o = values->dimensions(), t = tiles.dimensions();
  if (d.size() != 2 || w.size() != 2 || b.size() != 2 || o.size() != 2 || t.size() != 2 ||
      w[1] != d[1] || b[0] != d[1] || b[1] != d[1] || o[0] != d[0] || o[1] < 1 ||
      o[1] > w[0] || indices->element_count() != values->element_count() ||
      static_cast<int64_t>(scales.element_count()) != w[0] ||
      static_cast<int64_t>(rotation_scales.element_count()) != d[1] ||
      slack.element_count() != 1 || lead < 4 || lead % 4 != 0)
    return Invalid("screened product: shapes disagree");
  const memoryformer::Screen screen{
      {w[0], d[1], rows.typed_data(), scales.typed_data()},
      {d[1], d[1], rotation.typed_data(), rotation_scales.typed_data()},
      lead, tiles.typed_data(), slack.typed_data()[0], most_rows};
  if (t[0] != memoryformer::CeilDivide(w[0], memoryformer::kTileRows) ||
      t[1] != screen.TileBytes())
    return Invalid("screened product: tiles of another size");
  return Guarded([&] {
    memoryformer::ScreenedTop(screen, x.typed_data(), d[0], o[1], values->typed_data(),
                              indices->typed_data(), pool);
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(memoryformer_integer_product, IntegerProductCall,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()  // x [N, D]
                                  .Arg<Bytes>()   // tiles [V / 16, D / 4 or 8, 16, 4]
                                  .Arg<Floats>()  // scales [V / 16, (D / 64,) 16]
                                  .Attr<bool>("four_bits")
                                  .Ret<Floats>());  // y [N, V]

XLA_FFI_DEFINE_HANDLER_SYMBOL(memoryformer_screened_top, ScreenedTopCall,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()       // x [N, D]
                                  .Arg<SignedBytes>()  // rows [V, D]
                                  .Arg<Floats>()       // scales [V]
                                  .Arg<SignedBytes>()  // rotation [D, D]
                                  .Arg<Floats>()       // scales [D]
                                  .Arg<Bytes>()        // tiles [V / 16, bytes]
                                  .Arg<Floats>()       // slack [1]
                                  .Attr<int64_t>("lead")
                                  .Attr<float>("most_rows")
                                  .Ret<Floats>()  // the k largest [N, k]
                                  .Ret<ffi::Buffer<ffi::DataType::S32>>());  // where

// Copies what was counted: vectors, rows read, vectors with all rows read, bytes.
extern "C" void memoryformer_screen_counts(int64_t* counts) {
  counts[0] = memoryformer::screen_counts.vectors;
  counts[1] = memoryformer::screen_counts.rows;
  counts[2] = memoryformer::screen_counts.whole;
  counts[3] = memoryformer::screen_counts.bytes;
}
