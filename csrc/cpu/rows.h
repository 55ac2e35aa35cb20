// Rows on cores: reduce a row to its Moments and spread a slope back over it, tile by tile.
#pragma once
#include <vector>

#include "elements.h"
#include "pointsum.h"

namespace kd {

// A row is the sum of its segments, in order, whoever computes them: the same bits for any number of threads.
constexpr int64_t kSegment = 8 * kTile;
inline int64_t segments(int64_t vocab) { return (vocab + kSegment - 1) / kSegment; }

template <typename R> double entry(const Tiles<R>& isa, const Batch& x, const Logits& logits, int64_t n, int64_t i) {
  const char* at = logits.row(n) + logits.size() * i;
  R value, max;
  if (logits.type == Type::f32) value = *reinterpret_cast<const float*>(at);
  else isa.widen(logits.type, at, 1, &value, &max);
  return x.mask && !x.mask[i] ? -INFINITY : value;
}

// A row's points, and what kernels want to know of them; kept from row to row, narrow ones would feel the allocation.
template <typename R> struct Points {
  std::vector<PointSum<R>> points;
  std::vector<Exponent> e;
  std::vector<int> flags;
  std::vector<TileSums<R>> sums;
  bool single = true;

  void set(const Program& p, const double* args, bool teacher) {
    points.clear(); e.clear(); flags.clear();
    sums.resize(p.points());
    single = true;
    for (int k = 0; k < p.points(); ++k) {
      points.emplace_back(Tilt(p, args, k), teacher ? p.flags(k) : p.flags(k) & ~MEAN_T);
      e.push_back(points[k].exponent());
      flags.push_back(points[k].flags());
      single &= points[k].single();
    }
  }
};
struct Scratch {
  std::vector<double> part;
  Points<float> narrow;
  Points<double> wide;
  template <typename R> Points<R>& points() {
    if constexpr (sizeof(R) == 4) return narrow;
    else return wide;
  }
};

// stats: (K + 1) x kStats, see kdkernels/ops.py.
template <typename R>
void reduce_segment(const Tiles<R>& isa, const Batch& x, int64_t n, int64_t segment, const Program& p,
                    const double* args, double* stats, Points<R>& w) {
  const int K = p.points();
  const int64_t label = x.labels ? x.labels[n] : -1, end = std::min(x.vocab, (segment + 1) * kSegment);
  const bool teacher = x.t.data;
  w.set(p, args, teacher);
  const bool in_memory = w.single && Tile<R>::can_stay(x);
  Tile<R> tile;
  R s_max = -INFINITY, t_max = -INFINITY;
  // Pivots are the maxima of the segment so far: the sums then add up without exponentials.
  const auto raise = [&](R s, R t) {
    s_max = std::max(s_max, s);
    t_max = std::max(t_max, t);
    tile.view.s_pivot = s_max == -INFINITY ? 0 : s_max;
    tile.view.t_pivot = t_max == -INFINITY ? 0 : t_max;
  };
  bool special = false;
  for (int64_t first = segment * kSegment; first < end; first += kTile) {
    const int count = int(std::min<int64_t>(end - first, kTile));
    R s = 0, t = 0;
    bool loaded = false, ready = false;
    if (in_memory && tile.look(isa, x, n, first, count, &s, &t)) {
      raise(s, t);
      isa.sums_through(x.s.type, tile.view, w.e.data(), w.flags.data(), K, w.sums.data());
      ready = true;
    }
    for (int k = 0; k < K; ++k) {
      if (ready && w.points[k].take(tile.view, w.sums[k])) continue;
      if (!loaded) {
        tile.load(isa, x, n, first, count);
        raise(tile.s_max, tile.t_max);
        special |= tile.special;
        loaded = true;
      }
      w.points[k].add(isa, tile, label - first);
    }
  }
  double* last = stats + K * kStats;
  std::fill(last, last + kStats, 0.);
  if (label >= segment * kSegment && label < end) {
    last[0] = entry(isa, x, x.s, n, label);
    last[1] = teacher ? entry(isa, x, x.t, n, label) : last[0];
  }
  for (int k = 0; k < K; ++k) reinterpret_cast<Moments*>(stats)[k] = w.points[k].close();
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
                Scratch& w) {
  if (!x.kept(n)) {
    std::fill(stats, stats + (p.points() + 1) * kStats, 0.);
    return;
  }
  for (int64_t i = 0; i < segments(x.vocab); ++i) {
    w.part.resize((p.points() + 1) * kStats);
    reduce_segment(isa, x, n, i, p, args, i ? w.part.data() : stats, w.points<R>());
    if (i) merge_segments(p.points(), stats, w.part.data(), x.labels && x.labels[n] / kSegment == i);
  }
  finish_row(p.points(), stats);
}

// out: classes [first, end) of the gradient of one side's row, of which those from vocab on are padding.
template <typename R>
void spread_part(const Tiles<R>& isa, const Batch& x, int64_t n, int K, const double* coef, double g, int side,
                 int64_t first, int64_t end, bool stream, char* out, const ElementSlopes<R>* more = nullptr) {
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
  const bool ordinary = kept && !more && !dead_row && !heavy && last[5] == 0 && Tile<R>::can_stay(x);
  const double factor = more ? more->factor() : 0;
  for (; first < end; first += kTile) {
    const R* slopes = nullptr;
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
      if (more && factor * g != 0) {
        slopes = more->at(isa, tile.view, first);
        const R by = R(factor * g);
        for (int i = 0; i < live; ++i) d[i] += by * slopes[i];
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
        const double own = slopes ? factor * slopes[i] : 0;
        d[i] = R(g * (slope_at(coef, K, exact, rounded, label == first + i) + own));
      }
    isa.store(own.type, d, count, out + own.size() * first, stream);
  }
}

}  // namespace kd
