// Rows on cores: reduce a row to its Moments and spread a slope back over it, tile by tile.
#pragma once
#include <cmath>
#include <limits>
#include <vector>

#include "../moments.h"
#include "tiles.h"

namespace kd {

constexpr double kLog2e = 1.4426950408889634;

// Logits (A, B, W) with unit stride along W; row n is (n / B, n % B).
struct Logits {
  const char* data = nullptr;
  Type type = Type::f32;
  int64_t inner = 1, stride0 = 0, stride1 = 0;
  int size() const { return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2; }
  const char* row(int64_t n) const { return data + size() * ((n / inner) * stride0 + (n % inner) * stride1); }
};

struct Batch {
  Logits s, t;
  const int64_t* labels = nullptr;
  const bool* mask = nullptr;
  int64_t rows = 0, vocab = 0, ignore = -100;
  bool kept(int64_t n) const { return !labels || labels[n] != ignore; }
};

template <typename R> class Tile {
 public:
  alignas(64) R u[kTile], v[kTile];
  R s_pivot = 0, t_pivot = 0;
  bool special = false;

  // Classes [first, first + n) of row n, relative to the given pivots or, without them, to the tile's own maxima.
  void load(const Tiles<R>& isa, const Batch& x, int64_t row, int64_t first, int count, const R* pivots = nullptr) {
    n = count;
    isa.load(x.s.type, x.s.row(row) + x.s.size() * first, n, u);
    if (x.t.data) isa.load(x.t.type, x.t.row(row) + x.t.size() * first, n, v);
    else for (int i = 0; i < n; ++i) v[i] = 0;
    if (x.mask)
      for (int i = 0; i < n; ++i)
        if (!x.mask[first + i]) u[i] = v[i] = -std::numeric_limits<R>::infinity();
    special = isa.peak(u, n, &s_pivot);
    if (x.t.data) special |= isa.peak(v, n, &t_pivot);
    else t_pivot = 0;
    if (special && !x.t.data)
      for (int i = 0; i < n; ++i) v[i] = u[i] == -std::numeric_limits<R>::infinity() ? u[i] : R(0);
    s_max = s_pivot; t_max = t_pivot;
    if (pivots) { s_pivot = pivots[0]; t_pivot = pivots[1]; }
    isa.subtract(u, n, s_pivot);
    if (x.t.data) isa.subtract(v, n, t_pivot);
  }

  // Runs f with the class left out of the tile, if it is there.
  template <typename F> void without(int64_t i, F f) {
    if (i < 0 || i >= n) return f(special);
    const R a = u[i], b = v[i];
    u[i] = v[i] = -std::numeric_limits<R>::infinity();
    f(true);
    u[i] = a; v[i] = b;
  }

  int n = 0;
  R s_max = 0, t_max = 0;
};

// Moments of one tile at one point; `label` is relative to the tile.
template <typename R>
Moments tile_moments(const Tiles<R>& isa, Tile<R>& x, const Tilt& at, int flags, int64_t label, bool teacher) {
  Moments out = Moments::empty();
  x.without(flags & EXCLUDE ? label : -1, [&](bool special) {
    const double b = at.b * kLog2e, a = at.a * kLog2e;
    double m = 0;  // both logits are <= 0 here: an upper bound unless a coefficient is negative
    if (b < 0 || a < 0) m = isa.top(x.u, x.v, x.n, b, a);
    if (m == INFINITY) {  // a negative power of an impossible class
      out.m = m; out.z = 1;
      return;
    }
    TileSums<R> sum = isa.sums(x.u, x.v, x.n, b, a, m, flags, special);
    if (!(sum.z > 1e-12)) {  // the bound is far above the terms
      m = isa.top(x.u, x.v, x.n, b, a);
      if (m == -INFINITY) {
        if (sum.z == 0) return;  // no class is left
        m = 0;
      }
      sum = isa.sums(x.u, x.v, x.n, b, a, m, flags, special);
    }
    const double z = sum.z, du = sum.s / z, dv = sum.t / z;
    out.m = m / kLog2e + scaled(at.b, x.s_pivot) + scaled(at.a, x.t_pivot);
    out.z = z;
    if (flags & (MEAN_S | SECOND)) out.s = double(x.s_pivot) + du;
    if (teacher && (flags & (MEAN_T | SECOND))) out.t = double(x.t_pivot) + dv;
    if (flags & SECOND) {
      out.ss = sum.ss / z - du * du;
      if (teacher) { out.st = sum.st / z - du * dv; out.tt = sum.tt / z - dv * dv; }
    }
  });
  return out;
}

// stats: (K + 1) x kStats, see kdkernels/ops.py.
template <typename R>
void reduce_row(const Tiles<R>& isa, const Batch& x, int64_t n, const Program& p, const double* args, double* stats) {
  const int K = p.points();
  double* last = stats + K * kStats;
  for (int i = 0; i < (K + 1) * kStats; ++i) stats[i] = 0;
  if (!x.kept(n)) return;
  const int64_t label = x.labels ? x.labels[n] : -1;
  Moments* total = reinterpret_cast<Moments*>(stats);
  for (int k = 0; k < K; ++k) total[k] = Moments::empty();
  Tile<R> tile;
  double s_max = -INFINITY, t_max = -INFINITY;
  for (int64_t first = 0; first < x.vocab; first += kTile) {
    tile.load(isa, x, n, first, int(x.vocab - first < kTile ? x.vocab - first : kTile));
    s_max = std::fmax(s_max, tile.s_max);
    t_max = std::fmax(t_max, tile.t_max);
    for (int k = 0; k < K; ++k)
      total[k].merge(tile_moments(isa, tile, Tilt(p, args, k), p.flags(k), label - first, x.t.data != nullptr));
    if (label >= first && label < first + tile.n) {
      last[0] = double(tile.u[label - first]) + tile.s_pivot;
      last[1] = x.t.data ? double(tile.v[label - first]) + tile.t_pivot : last[0];
    }
  }
  last[2] = s_max; last[3] = t_max; last[4] = 1;
}

inline Row row_of(const double* last) { return {last[0], last[1], last[2], last[3], last[4]}; }

// value and, for each side, coef (K + 1) x kCoefs; reg: 2 x registers() doubles of scratch.
inline double value_and_coefs(const Program& p, const double* args, const double* stats, int sides, int64_t side_stride,
                              double* reg, double* coef) {
  const int K = p.points();
  const Moments* x = reinterpret_cast<const Moments*>(stats);
  const Row row = row_of(stats + K * kStats);
  if (row.keep == 0) {
    for (int side = 0; side < sides; ++side)
      for (int i = 0; i < (K + 1) * kCoefs; ++i) coef[side * side_stride + i] = 0;
    return 0;
  }
  double* adj = reg + p.registers();
  const double value = row_value(p, args, x, row, reg);
  differentiate(p, reg, adj);
  for (int side = 0; side < sides; ++side)
    row_coefs(p, args, x, row, adj, side, value != value ? NAN : 0, coef + side * side_stride);
  return value;
}

// out: the gradient of one side's row, `width` classes of which those from vocab on are padding.
template <typename R>
void spread_row(const Tiles<R>& isa, const Batch& x, int64_t n, int K, const double* coef, double g, int side,
                int64_t width, char* out) {
  const Logits& own = side ? x.t : x.s;
  const double* last = coef + K * kCoefs;
  alignas(64) R d[kTile];
  Tile<R> tile;
  const int64_t label = x.labels ? x.labels[n] : -1;
  const R pivots[2] = {R(last[1]), R(last[2])};
  const bool kept = last[3] != 0, dead_row = last[0] != last[0];
  for (int64_t first = 0; first < width; first += kTile) {
    const int count = int(width - first < kTile ? width - first : kTile);
    const int live = kept ? int(x.vocab - first < count ? (x.vocab > first ? x.vocab - first : 0) : count) : 0;
    const R fill = dead_row ? std::numeric_limits<R>::quiet_NaN() : R(0);
    for (int i = 0; i < count; ++i) d[i] = i < live ? fill : R(0);
    if (live && !dead_row) {
      tile.load(isa, x, n, first, live, pivots);
      for (int k = 0; k < K; ++k) {
        const double* c = coef + k * kCoefs;
        TilePoint<R> p{c[1] * kLog2e, c[2] * kLog2e, c[0] * kLog2e, {}};
        bool any = false;
        for (int j = 0; j < 6; ++j) { p.c[j] = R(c[3 + j] * g); any |= p.c[j] != 0; }
        if (any)
          tile.without(c[9] != 0 ? label - first : -1,
                       [&](bool special) { isa.spread(tile.u, tile.v, tile.n, p, special, d); });
      }
      if (label >= first && label < first + live) d[label - first] += R(last[0] * g);
    }
    isa.store(own.type, d, count, out + own.size() * first);
  }
}

}  // namespace kd
