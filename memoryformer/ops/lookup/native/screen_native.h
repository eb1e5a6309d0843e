// The k largest products of a vector with the rows of an int8 matrix, without reading most
// rows: those of `MatrixProduct` bit for bit. Start at `ScreenedTop`.
//
// Let w_v be row v, with its scale, and B [D, D] any matrix with an inverse. With x' = B^T x
// and W'_v = B^-1 w_v, x . w_v = x' . W'_v. B is such that the first columns of W' hold most.
// `screened.pack` stores A_v ~ W'_v for each row:
//
//     lead   the first columns, in 8 bits     a_v >= |A_v|,  e_v >= |W'_v - A_v|  there
//     rest   all others, in 2 bits            c_v >= |A_v|,  n_vb >= |W'_vb - A_vb|
//
// n_vb is a norm of 7 bits for each block b of 16 columns. Here x' is known as z, off by the
// rounding of floats, and z is q + r, q integers of 8 bits times a scale for each 64 columns. By
// Cauchy and Schwarz, block by block,
//
//     |x . w_v - q . A_v| <= |r_lead| a_v + |z_lead| e_v + |r_rest| c_v + sum_b |z_b| n_vb + S |x|.
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

  int64_t Blocks() const {
    return CeilDivide(std::max<int64_t>(0, rows.width - lead), kBlock);
  }
  int64_t Norms() const { return CeilDivide(Blocks(), 4) * 4; }
  int64_t Columns() const { return lead + kBlock * Blocks(); }  // those after D are zeros
  int64_t LeadGroups() const { return CeilDivide(lead, kGroup); }
  int64_t Groups() const { return LeadGroups() + CeilDivide(kBlock * Blocks(), kGroup); }
  int64_t Begin(int64_t group) const {  // its first column
    return group < LeadGroups() ? group * kGroup : lead + (group - LeadGroups()) * kGroup;
  }
  int64_t End(int64_t group) const {
    return std::min(Begin(group) + kGroup, group < LeadGroups() ? lead : Columns());
  }
  int64_t TileBytes() const {  // lead, rest, norms, and the kFloats of each row
    return kTileRows * (lead + kBlock * Blocks() / 4 + Norms()) + int64_t{sizeof(Floats)};
  }
  struct Floats {  // of 16 rows: scales of lead, of rest / 2 and of norms; a, e and c
    float lead[kTileRows], rest[kTileRows], norms[kTileRows];
    float a[kTileRows], e[kTileRows], c[kTileRows];
  };
};

// Vectors seen, rows read for one of them, vectors for which all were, bytes read.
struct ScreenCounts {
  std::atomic<int64_t> vectors{0}, rows{0}, whole{0}, bytes{0};
};
inline ScreenCounts screen_counts;

// A vector, rotated and rounded. The factor on each bound is for the sums of floats.
constexpr double kInflate = 1 + 1e-5;

struct Query {
  int8_t *integers, *norms;  // q [Columns()], |z_b| [Norms()]
  float* scales;             // [Groups()]
  int32_t* totals;           // [Groups() + 1], the last of the norms
  float norm_scale, lead_rounding, rest_rounding, lead_length, slack;

  bool Prepare(const Screen& screen, const float* x, const float* z) {
    const int64_t D = screen.rows.width;
    double squares = 0, lead_squares = 0, roundings[2] = {0, 0};
    for (int64_t d = 0; d < D; ++d) squares += double{x[d]} * x[d];
    std::memset(integers, 0, screen.Columns());
    std::memset(norms, 0, screen.Norms());
    for (int64_t g = 0; g < screen.Groups(); ++g) {
      const int64_t begin = std::min(D, screen.Begin(g)), end = std::min(D, screen.End(g));
      scales[g] = RoundVector(z + begin, end - begin, integers + begin);
      totals[g] = Total(integers + begin, end - begin);
      const bool rest = g >= screen.LeadGroups();
      for (int64_t d = begin; d < end; ++d) {
        const double r = z[d] - double{scales[g]} * integers[d];
        roundings[rest] += r * r;
        lead_squares += rest ? 0 : double{z[d]} * z[d];
      }
    }
    double largest = 0;
    const auto norm = [&](int64_t b) {
      double sum = 0;
      const int64_t begin = screen.lead + b * kBlock;
      for (int64_t d = begin; d < std::min(D, begin + kBlock); ++d)
        sum += double{z[d]} * z[d];
      return std::sqrt(sum) * kInflate;
    };
    for (int64_t b = 0; b < screen.Blocks(); ++b) largest = std::max(largest, norm(b));
    norm_scale = static_cast<float>(largest / 127 * kInflate);
    for (int64_t b = 0; b < screen.Blocks() && norm_scale > 0; ++b)
      norms[b] = static_cast<int8_t>(std::min(127.0, std::ceil(norm(b) / norm_scale)));
    totals[screen.Groups()] = Total(norms, screen.Norms());
    const auto up = [](double bound) { return static_cast<float>(bound * kInflate); };
    norm_scale = up(norm_scale);
    lead_rounding = up(std::sqrt(roundings[0])), rest_rounding = up(std::sqrt(roundings[1]));
    lead_length = up(std::sqrt(lead_squares)), slack = up(std::sqrt(squares) * screen.slack);
    // Outside, numbers too small for a normal float may count: all rows are read.
    const double size = std::sqrt(squares);
    return size > 0x1p-60 && size < 0x1p60 && slack > 0x1p-60 && slack < 0x1p60;
  }
};

// What the kernels ask of some vectors, side by side: [Groups() + 1, tokens] each, the last of
// the norms.
struct Together {
  std::vector<int32_t> totals;
  std::vector<float> scales;

  Together(const Screen& screen, const std::vector<Query>& queries) {
    for (int64_t g = 0; g <= screen.Groups(); ++g)
      for (const Query& query : queries) {
        totals.push_back(query.totals[g]);
        scales.push_back(g < screen.Groups() ? query.scales[g] : query.norm_scale);
      }
  }
};

// upper[16] of each of `queries`, from one tile.
inline void UpperBounds(const Screen& screen, const IntegerKernels& kernels,
                        const uint8_t* tile, const std::vector<Query>& queries,
                        const Together& together, float* upper) {
  const int64_t tokens = queries.size(), rest_columns = screen.Columns() - screen.lead;
  const Query& first = queries[0];  // the others lie behind it, a stride apart
  float lead[kStreams * kTileRows], rest[kStreams * kTileRows], norms[kStreams * kTileRows];
  const auto sums = [&](auto kernel, int64_t columns, int64_t group, const int8_t* x,
                        int64_t stride, int64_t first_group, float* out) {
    const int64_t at = first_group * tokens;
    kernel(tile, columns, group, x, stride, together.totals.data() + at,
           together.scales.data() + at, tokens, tokens, out);
  };
  sums(kernels.screen_lead, screen.lead, kGroup, first.integers, screen.Columns(), 0, lead);
  tile += kTileRows * screen.lead;
  sums(kernels.screen_rest, rest_columns, kGroup, first.integers + screen.lead,
       screen.Columns(), screen.LeadGroups(), rest);
  tile += kTileRows * rest_columns / 4;
  sums(kernels.screen_lead, screen.Norms(), screen.Norms() + 1, first.norms, screen.Norms(),
       screen.Groups(), norms);
  Screen::Floats floats;
  std::memcpy(&floats, tile + kTileRows * screen.Norms(), sizeof(floats));
  for (int64_t t = 0; t < tokens; ++t) {
    const Query& query = queries[t];
    const int64_t at = t * kTileRows;
    float* out = upper + at;
    kernels.combine(floats.lead, lead + at, floats.a, query.lead_rounding, floats.e,
                    query.lead_length, query.slack, out);
    kernels.combine(floats.rest, rest + at, floats.c, query.rest_rounding, out, 1, 0, out);
    kernels.combine(floats.norms, norms + at, out, 1, out, 0, 0, out);
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
