// Sums over the classes of a row of a separable loss, and its slopes at them. Formats: kdkernels/elements.py, and
// kdkernels/separable.py for where the sums stand among a row's statistics.
#pragma once
#include <vector>

#include "../moments.h"
#include "tile.h"

namespace kd {

template <typename R> size_t work_of(const Elements& e) {
  return size_t(2 + e.scratch()) * kStretch + size_t(e.constants()) * 64 / sizeof(R);
}

// From a row's statistics and arguments, and from its coefficients: the same numbers.
inline LogWeights log_weights(const double* args, const double* stats, int points) {
  const Moments* x = reinterpret_cast<const Moments*>(stats);
  const double* last = stats + points * kStats;
  const double b = args[0] * args[3], a = args[1] * args[6];  // the student's coefficient at q, the teacher's at p
  return {b, log_weight(b * last[2], x[0]), a, log_weight(a * last[3], x[1])};
}
inline LogWeights log_weights(const double* coef) {
  return {coef[1], coef[0], coef[kCoefs + 2], coef[kCoefs]};
}

// Over classes [first, end) of row n. slope: of the student's side, for all classes of the row, or null.
template <typename R>
ElementSums element_sums(const Tiles<R>& isa, const Batch& x, int64_t n, int64_t first, int64_t end, const Elements& e,
                         const LogWeights& w, const double* last, bool both, std::vector<R>& work, R* slope) {
  work.resize(work_of<R>(e));
  Tile<R> tile;
  ElementSums all{};
  for (; first < end; first += kTile) {
    tile.load(isa, x, n, first, int(std::min<int64_t>(end - first, kTile)), false);
    tile.view.s_pivot = R(last[2]);
    tile.view.t_pivot = R(last[3]);
    all.add(isa.elements(tile.view, e, w, both, 0, work.data(), slope ? slope + first : nullptr));
  }
  return all;
}

// stats: `points` points and the last row -> one point more, whose place the sums take.
inline void put_sums(const ElementSums& sum, const LogWeights& w, int points, double* stats) {
  double *at = stats + points * kStats, *last = at + kStats;
  std::copy_n(at, kStats, last);
  const auto finite = [](double x) { return std::isfinite(x) ? x : 0; };  // else there is no slope
  const double lse_q = w.b * last[2] - w.log_q, lse_p = w.a * last[3] - w.log_p;
  const double q = finite(sum.q), p = finite(sum.p);
  const double to[kStats] = {INFINITY, 1, q, p, sum.total, finite(sum.xq) + q * lse_q, sum.total};
  std::copy_n(to, kStats, at);
  last[6] = finite(sum.xp) + p * lse_p;
}

// d value / d logit through phi itself, class by class.
template <typename R> class ElementSlopes {
 public:
  // ready: the slopes of phi at all classes, if there are any yet.
  ElementSlopes(const Elements& e, const double* coef, int K, int side, const R* ready, std::vector<R>& work)
      : e_(e), w_(log_weights(coef)), side_(side), ready_(ready), work_(work),
        factor_(coef[(K - 1) * kCoefs + 4 + side] * (side ? w_.a : w_.b)) {
    if (!ready_) work_.resize(work_of<R>(e) + kTile);
  }
  double factor() const { return factor_; }
  const R* at(const Tiles<R>& isa, const View<R>& x, int64_t first) const {
    if (ready_) return ready_ + first;
    R* to = work_.data() + work_of<R>(e_);
    isa.elements(x, e_, w_, side_ == 1, side_, work_.data(), to);
    return to;
  }

 private:
  Elements e_;
  LogWeights w_;
  int side_;
  const R* ready_;
  std::vector<R>& work_;
  double factor_;
};

}  // namespace kd
