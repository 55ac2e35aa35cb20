// Rows on cores: reduce a row to its Moments and spread a slope back over it, tile by tile.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../moments.h"
#include "tiles.h"

namespace kd {

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
  View<R> view{};
  R s_max = 0, t_max = 0;  // over the finite entries; -inf if there is none
  bool special = false;    // there are special entries
  alignas(64) R scratch[2 * kTile];

  // Classes [first, first + count) of row n, where they are in memory.
  void find(const Batch& x, int64_t row, int64_t first, int count) {
    view.n = count;
    view.s_next = x.s.row(row) + (first + count) * (view.s_bytes = x.s.size());
    view.t_next = x.t.data ? x.t.row(row) + (first + count) * (view.t_bytes = x.t.size()) : view.s_next;
  }

  // The same, loaded. What needs no conversion is read where it is.
  // `look` for -inf and the maxima, or take it that there is none of the former and nobody wants the latter.
  void load(const Tiles<R>& isa, const Batch& x, int64_t row, int64_t first, int count, bool look = true) {
    const bool teacher = x.t.data;
    find(x, row, first, count);
    special = false;
    t_max = 0;
    view.s = fetch(isa, x.s, row, first, x.mask, look, u_, &s_max);
    view.t = teacher ? fetch(isa, x.t, row, first, x.mask, look, v_, &t_max) : v_;
    if (!teacher && zeros_ < count) { std::fill(v_, v_ + kTile, R(0)); zeros_ = kTile; }
    if (teacher) zeros_ = 0;
    const R dead = -std::numeric_limits<R>::infinity();
    if (x.mask) {
      for (int i = 0; i < count; ++i)
        if (!x.mask[first + i]) { u_[i] = dead; if (teacher) v_[i] = dead; }
      special = isa.peak(u_, count, &s_max);
      if (teacher) special |= isa.peak(v_, count, &t_max);
    }
    if (special && !teacher) {
      for (int i = 0; i < count; ++i) v_[i] = view.s[i] == dead ? dead : R(0);
      zeros_ = 0;
    }
  }

  // f(view, its first class) of the tile, or of the two parts around class i if it is to be left out and there.
  template <typename F> void parts(int64_t i, F f) const {
    if (i < 0 || i >= view.n) return f(view, 0);
    for (const auto& [from, n] : {std::pair{0, int(i)}, std::pair{int(i) + 1, view.n - int(i) - 1}}) {
      if (n == 0) continue;
      View<R> part = view;
      part.s += from; part.t += from; part.n = n;
      part.s_next += from * view.s_bytes; part.t_next += from * view.t_bytes;
      f(part, from);
    }
  }

 private:
  static constexpr Type own_type() { return sizeof(R) == 4 ? Type::f32 : Type::f64; }
  const R* fetch(const Tiles<R>& isa, const Logits& x, int64_t row, int64_t first, bool to_change, bool look, R* copy,
                 R* max) {
    const char* at = x.row(row) + x.size() * first;
    if (x.type == own_type() && !to_change && uintptr_t(at) % sizeof(R) == 0) {
      const R* here = reinterpret_cast<const R*>(at);
      special |= look && isa.peak(here, view.n, max);
      return here;
    }
    special |= isa.widen(x.type, at, view.n, copy, max);
    return copy;
  }
  alignas(64) R u_[kTile], v_[kTile];
  int zeros_ = 0;
};

// A segment's Moments at one point, tile by tile. Sums of tiles with the same pivots are added up as they are.
template <typename R> class PointSum {
 public:
  PointSum(const Tilt& at, int flags) : at_(at), flags_(flags), e_{at.b * kLog2e, at.a * kLog2e, 0} {}

  // `label` is relative to the tile; `ready`: the tile's sums, if they are known.
  void add(const Tiles<R>& isa, Tile<R>& x, int64_t label, const TileSums<R>* ready) {
    if (x.view.s_pivot != s_pivot_ || x.view.t_pivot != t_pivot_) {
      close();
      s_pivot_ = x.view.s_pivot;
      t_pivot_ = x.view.t_pivot;
    }
    const int64_t skip = flags_ & EXCLUDE ? label : -1;
    // Both logits are <= 0 here: 0 is an upper bound unless a coefficient is negative. It may be far above the terms of
    // a mixture: look for the true maximum then, so that the weight of a class that has nearly all is nearly exact;
    // unless the row drowns the tile already.
    const bool bounded = e_.b >= 0 && e_.a >= 0;
    if (bounded) {
      const TileSums<R> sum = ready ? *ready : sums(isa, x, skip, 0);
      if (sum.z > (is_mixture(e_.b, e_.a) ? 1e-3 : 1e-12) || sum.z * 2e4 < open_.z || sum.z != sum.z) {
        open_.z += sum.z; open_.s += sum.s; open_.t += sum.t;
        open_.ss += sum.ss; open_.st += sum.st; open_.tt += sum.tt;
        return;
      }
    }
    double top = -INFINITY;
    x.parts(skip, [&](const View<R>& part, int) { top = std::fmax(top, isa.top(part, e_)); });
    if (top == INFINITY && !bounded) {  // a negative power of an impossible class
      total_.merge({INFINITY, 1, 0, 0, 0, 0, 0});
    } else {
      const double constant = std::isfinite(top) ? -top : 0;
      total_.merge(moments(sums(isa, x, skip, constant), constant));
    }
  }

  const Exponent& exponent() const { return e_; }
  const Moments& close() {
    if (open_.z != 0) total_.merge(moments(open_, 0));
    open_ = {};
    return total_;
  }

 private:
  TileSums<R> sums(const Tiles<R>& isa, Tile<R>& x, int64_t skip, double constant) const {
    const Exponent e{e_.b, e_.a, constant};
    TileSums<R> all{};
    x.parts(skip, [&](const View<R>& part, int) {
      const TileSums<R> sum = isa.sums(part, e, flags_, x.special, x.scratch);
      all.z += sum.z; all.s += sum.s; all.t += sum.t;
      all.ss += sum.ss; all.st += sum.st; all.tt += sum.tt;
    });
    return all;
  }

  Moments moments(const TileSums<R>& sum, double constant) const {
    if (sum.z == 0) return Moments::empty();
    const double z = sum.z, du = sum.s / z, dv = sum.t / z;
    Moments out{scaled(at_.b, s_pivot_) + scaled(at_.a, t_pivot_) - constant / kLog2e, z, 0, 0, 0, 0, 0};
    if (flags_ & (MEAN_S | SECOND)) out.s = s_pivot_ + du;
    if (flags_ & (MEAN_T | SECOND)) out.t = t_pivot_ + dv;
    if (flags_ & SECOND) { out.ss = sum.ss / z - du * du; out.st = sum.st / z - du * dv; out.tt = sum.tt / z - dv * dv; }
    return out;
  }

  Tilt at_;
  int flags_;
  Exponent e_;
  double s_pivot_ = 0, t_pivot_ = 0;
  TileSums<R> open_{};
  Moments total_ = Moments::empty();
};

// A row is the sum of its segments, in order, whoever computes them: the same bits for any number of threads.
constexpr int64_t kSegment = 8 * kTile;
inline int64_t segments(int64_t vocab) { return (vocab + kSegment - 1) / kSegment; }

// stats: (K + 1) x kStats, see kdkernels/ops.py.
template <typename R>
void reduce_segment(const Tiles<R>& isa, const Batch& x, int64_t n, int64_t segment, const Program& p,
                    const double* args, double* stats) {
  const int K = p.points();
  double* last = stats + K * kStats;
  std::fill(last, last + kStats, 0.);
  const int64_t label = x.labels ? x.labels[n] : -1, end = std::min(x.vocab, (segment + 1) * kSegment);
  const bool teacher = x.t.data;
  std::vector<PointSum<R>> points;
  points.reserve(K);
  for (int k = 0; k < K; ++k)
    points.emplace_back(Tilt(p, args, k), teacher ? p.flags(k) : p.flags(k) & ~MEAN_T);
  const bool two = teacher && K > 1;
  const Exponent e[2] = {two ? points[0].exponent() : Exponent{}, two ? points[1].exponent() : Exponent{}};
  const int flags[2] = {two ? p.flags(0) : 0, two ? p.flags(1) : 0};
  Tile<R> tile;
  R s_max = -INFINITY, t_max = -INFINITY;
  bool special = false;
  for (int64_t first = segment * kSegment; first < end; first += kTile) {
    tile.load(isa, x, n, first, int(std::min<int64_t>(end - first, kTile)));
    special |= tile.special;
    s_max = std::max(s_max, tile.s_max);
    t_max = std::max(t_max, tile.t_max);
    // Pivots of the segment so far: the sums then add up without exponentials.
    tile.view.s_pivot = s_max == -INFINITY ? 0 : s_max;
    tile.view.t_pivot = t_max == -INFINITY ? 0 : t_max;
    TileSums<R> sums[2]{};
    const bool ready = two && !tile.special && isa.pair(tile.view, e, flags, sums);
    for (int k = 0; k < K; ++k) points[k].add(isa, tile, label - first, ready && k < 2 ? sums + k : nullptr);
    if (label >= first && label < first + tile.view.n) {
      last[0] = tile.view.s[label - first];
      last[1] = teacher ? double(tile.view.t[label - first]) : last[0];
    }
  }
  for (int k = 0; k < K; ++k) reinterpret_cast<Moments*>(stats)[k] = points[k].close();
  last[2] = s_max; last[3] = t_max; last[4] = 1; last[5] = special;
}

inline void merge_segments(int K, double* stats, const double* part, bool holds_label) {
  for (int k = 0; k < K; ++k)
    reinterpret_cast<Moments*>(stats)[k].merge(reinterpret_cast<const Moments*>(part)[k]);
  double* last = stats + K * kStats;
  const double* other = part + K * kStats;
  if (holds_label) { last[0] = other[0]; last[1] = other[1]; }
  last[2] = std::max(last[2], other[2]);
  last[3] = std::max(last[3], other[3]);
  last[5] = std::max(last[5], other[5]);
}

inline void finish_row(int K, double* stats) {
  for (double* max : {stats + K * kStats + 2, stats + K * kStats + 3})
    if (*max == -INFINITY) *max = 0;  // no finite entry
}

template <typename R>
void reduce_row(const Tiles<R>& isa, const Batch& x, int64_t n, const Program& p, const double* args, double* stats,
                double* part) {
  if (!x.kept(n)) {
    std::fill(stats, stats + (p.points() + 1) * kStats, 0.);
    return;
  }
  for (int64_t i = 0; i < segments(x.vocab); ++i) {
    reduce_segment(isa, x, n, i, p, args, i ? part : stats);
    if (i) merge_segments(p.points(), stats, part, x.labels && x.labels[n] / kSegment == i);
  }
  finish_row(p.points(), stats);
}

inline Row row_of(const double* last) { return {last[0], last[1], last[2], last[3], last[4], last[5]}; }

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

// out: classes [first, end) of the gradient of one side's row, of which those from vocab on are padding.
template <typename R>
void spread_part(const Tiles<R>& isa, const Batch& x, int64_t n, int K, const double* coef, double g, int side,
                 int64_t first, int64_t end, bool stream, char* out) {
  const Logits& own = side ? x.t : x.s;
  const double* last = coef + K * kCoefs;
  alignas(64) R d[kTile];
  Tile<R> tile;
  const int64_t label = x.labels ? x.labels[n] : -1;
  const bool kept = last[3] != 0 && g != 0, dead_row = last[0] != last[0];
  // Where a class may have most of a point's weight the points can cancel: it is done once more, in double.
  bool heavy = false, excludes = false;
  for (int k = 0; k < K; ++k) {
    heavy |= coef[k * kCoefs] > -0.7;  // log(1/2)
    excludes |= coef[k * kCoefs + 9] != 0;
  }
  const bool ordinary = kept && !dead_row && !heavy && !x.mask && last[5] == 0 && (!x.t.data || x.t.type == x.s.type);
  for (; first < end; first += kTile) {
    const int count = int(std::min<int64_t>(end - first, kTile));
    if (ordinary && first + count <= x.vocab && !(label >= first && label < first + count)) {
      tile.find(x, n, first, count);
      tile.view.s_pivot = R(last[1]);
      tile.view.t_pivot = R(last[2]);
      if (isa.through(own.type, tile.view, coef, K, g, stream, out + own.size() * first)) continue;
    }
    const int live = kept ? int(std::clamp<int64_t>(x.vocab - first, 0, count)) : 0;
    if (live && !dead_row) {
      tile.load(isa, x, n, first, live, heavy || last[5] != 0);
      tile.view.s_pivot = R(last[1]);
      tile.view.t_pivot = R(last[2]);
      if (excludes && label >= first && label < first + live) {
        std::fill(d, d + live, R(0));
        for (int k = 0; k < K; ++k)
          tile.parts(coef[k * kCoefs + 9] != 0 ? label - first : -1, [&](const View<R>& part, int from) {
            isa.spread(part, coef + k * kCoefs, 1, g, tile.special, false, tile.scratch, d + from);
          });
      } else {
        isa.spread(tile.view, coef, K, g, tile.special, true, tile.scratch, d);
      }
    } else {
      std::fill(d, d + live, dead_row ? std::numeric_limits<R>::quiet_NaN() : R(0));
    }
    std::fill(d + live, d + count, R(0));
    if (label >= first && label < first + live) d[label - first] += R(last[0] * g);
    if (live && heavy && !dead_row)
      for (const bool by_t : {false, true}) {
        const R* at = by_t ? tile.view.t : tile.view.s;
        if ((by_t && !x.t.data) || double(by_t ? tile.t_max : tile.s_max) != last[1 + by_t]) continue;
        const int64_t i = std::find(at, at + live, R(last[1 + by_t])) - at;
        if (i == live) continue;
        const R s = tile.view.s[i], t = tile.view.t[i], s_max = R(last[1]), t_max = R(last[2]);
        const Deviation exact{double(s) - s_max, double(t) - t_max}, rounded{double(s - s_max), double(t - t_max)};
        d[i] = R(g * slope_at(coef, K, exact, rounded, label == first + i));
      }
    isa.store(own.type, d, count, out + own.size() * first, stream);
  }
}

}  // namespace kd
