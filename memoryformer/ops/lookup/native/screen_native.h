// The k largest products of a vector with the rows of an int8 matrix, without reading most
// rows: those of `MatrixProduct` bit for bit. Start at `ScreenedTop`.
//
// Let w_v be row v, with its scale, and B [D, D] any matrix with an inverse. With x' = B^T x
// and W'_v = B^-1 w_v, x . w_v = x' . W'_v. B is such that the first columns of W' hold most.
// `narrow.pack_screened` stores for each row
//
//     lead   A_v ~ W'_v there, in 8 bits       a_v >= |A_v|,  e_v >= |W'_v - A_v|
//     rest   n_vb >= |W'_vb|, the norm of each block b of 16 columns, in 7 bits
//
// Here x' is known as z, off by the rounding of floats, and its lead is q + r, q integers of 8
// bits times a scale for each 64. By Cauchy and Schwarz, block by block,
//
//     |x . w_v - q . A_v| <= |r| a_v + |z_lead| e_v + sum_b |z_b| n_vb + S |x|.
//
// S |x| bounds the rounding of z, of today's product and of the sums here. So each row has an
// upper bound. A few rows with the highest ones are computed; the k-th largest result t is at
// most the k-th largest of all. Rows with an upper bound below t are none of the k, nor
// equal to one. The others are computed, in the arithmetic of today's int8 product. Where many
// remain, seen at a sixteenth of the rows or at the end, all are.

#pragma once

#include <atomic>
#include <limits>

#include "integer_native.h"

namespace memoryformer {

constexpr int64_t kBlock = 16;    // columns of a norm
constexpr int64_t kGroup = 64;    // columns that share a scale of activations
constexpr int64_t kStreams = 16;  // vectors that share a pass over the tiles
constexpr int64_t kExtra = 3;     // rows computed first, besides k

struct Screen {
  Matrix<int8_t> rows;       // [V, D], the reference
  Matrix<int8_t> rotation;   // [D, D], B by column
  int64_t lead;              // columns, a multiple of 4
  const uint8_t* tiles;      // [V / 16, TileBytes()]
  float slack;               // S
  float most_rows;           // share of V above which all are read

  int64_t Rest() const { return std::max<int64_t>(0, rows.width - lead); }
  int64_t Blocks() const { return CeilDivide(CeilDivide(Rest(), kBlock), 4) * 4; }
  int64_t Groups() const { return CeilDivide(lead, kGroup); }
  int64_t TileBytes() const {  // lead, norms, and scales of both, a and e as floats
    return kTileRows * (lead + Blocks() + 4 * int64_t{sizeof(float)});
  }
};

// Vectors seen, rows read for one of them, vectors for which all were, bytes read.
struct ScreenCounts {
  std::atomic<int64_t> vectors{0}, rows{0}, whole{0}, bytes{0};
};
inline ScreenCounts screen_counts;

// A vector, rotated and rounded. The factor on each bound is for the sums of floats.
constexpr double kInflate = 1 + 1e-5;

struct Query {
  int8_t *lead, *norms;  // [lead], [Blocks()]
  float* scales;         // [Groups()]
  int32_t* totals;       // [Groups() + 1], the last of the norms
  float norm_scale, rounding, length, slack;  // of the norms; |r|, |z_lead|, S |x|

  bool Prepare(const Screen& screen, const float* x, const float* z) {
    const int64_t D = screen.rows.width, within = std::min(D, screen.lead);
    double squares = 0, lead_squares = 0, rounding_squares = 0;
    for (int64_t d = 0; d < D; ++d) squares += double{x[d]} * x[d];
    std::memset(lead, 0, screen.lead);
    std::memset(norms, 0, screen.Blocks());
    for (int64_t g = 0; g < screen.Groups(); ++g) {
      const int64_t begin = g * kGroup, count = std::min(kGroup, within - begin);
      scales[g] = count <= 0 ? 0 : RoundVector(z + begin, count, lead + begin);
      totals[g] = Total(lead + begin, std::max<int64_t>(0, count));
      for (int64_t d = begin; d < begin + count; ++d) {
        const double r = z[d] - double{scales[g]} * lead[d];
        rounding_squares += r * r, lead_squares += double{z[d]} * z[d];
      }
    }
    double largest = 0;
    const auto norm = [&](int64_t b) {
      double sum = 0;
      for (int64_t d = within + b * kBlock; d < std::min(D, within + (b + 1) * kBlock); ++d)
        sum += double{z[d]} * z[d];
      return std::sqrt(sum) * kInflate;
    };
    const int64_t blocks = CeilDivide(screen.Rest(), kBlock);
    for (int64_t b = 0; b < blocks; ++b) largest = std::max(largest, norm(b));
    norm_scale = static_cast<float>(largest / 127 * kInflate);
    for (int64_t b = 0; b < blocks && norm_scale > 0; ++b)
      norms[b] = static_cast<int8_t>(std::min(127.0, std::ceil(norm(b) / norm_scale)));
    totals[screen.Groups()] = Total(norms, screen.Blocks());
    norm_scale = static_cast<float>(norm_scale * kInflate);
    rounding = static_cast<float>(std::sqrt(rounding_squares) * kInflate);
    length = static_cast<float>(std::sqrt(lead_squares) * kInflate);
    slack = static_cast<float>(std::sqrt(squares) * kInflate * screen.slack);
    // Outside, numbers too small for a normal float may count: all rows are read.
    const double size = std::sqrt(squares);
    return size > 0x1p-60 && size < 0x1p60 && slack > 0x1p-60 && slack < 0x1p60;
  }
};

// upper[16] of each of `queries`, from one tile.
inline void UpperBounds(const Screen& screen, const IntegerKernels& kernels,
                        const uint8_t* tile, const std::vector<Query>& queries,
                        const std::vector<int32_t>& totals, float* upper) {
  const int64_t tokens = queries.size(), groups = screen.Groups();
  const uint8_t* norms = tile + kTileRows * screen.lead;
  float floats[4][kTileRows];  // scales of the lead and of the norms, a, e
  std::memcpy(floats, norms + kTileRows * screen.Blocks(), sizeof(floats));
  int32_t sums[kStreams * kTileRows];
  float approximate[kStreams][kTileRows] = {};
  const Query& first = queries[0];  // the others lie behind it, a stride apart
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t columns = std::min(kGroup, screen.lead - g * kGroup);
    kernels.eight_bits(tile + kTileRows * g * kGroup, columns, first.lead + g * kGroup,
                       screen.lead, totals.data() + g * tokens, tokens, sums);
    for (int64_t t = 0; t < tokens; ++t)
      kernels.add_times(sums + t * kTileRows, queries[t].scales[g], approximate[t]);
  }
  kernels.eight_bits(norms, screen.Blocks(), first.norms, screen.Blocks(),
                     totals.data() + groups * tokens, tokens, sums);
  for (int64_t t = 0; t < tokens; ++t) {
    const Query& query = queries[t];
    float* out = upper + t * kTileRows;
    float rest[kTileRows] = {};
    kernels.add_times(sums + t * kTileRows, query.norm_scale, rest);
    kernels.combine(floats[0], approximate[t], floats[2], query.rounding, floats[3],
                    query.length, query.slack, out);
    kernels.combine(floats[1], rest, out, 1, out, 0, 0, out);
  }
}

// Larger first, of equals the lower index; NaN is larger than any number, as in argmax.
struct Found {
  float value;
  int32_t index;
  bool operator<(const Found& other) const {
    const bool nan = std::isnan(value), other_nan = std::isnan(other.value);
    if (nan != other_nan) return nan;
    if (!nan && value != other.value) return value > other.value;
    return index < other.index;
  }
};

inline void Keep(std::vector<Found>& found, int64_t k, float* values, int32_t* indices) {
  std::partial_sort(found.begin(), found.begin() + k, found.end());
  for (int64_t i = 0; i < k; ++i) values[i] = found[i].value, indices[i] = found[i].index;
}
}  // namespace memoryformer
