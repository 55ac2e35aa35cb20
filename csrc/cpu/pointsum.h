// The statistics of a segment of a row at one point, from the sums of its tiles.
#pragma once
#include "../moments.h"
#include "tile.h"

namespace kd {

// A segment's Moments at one point, tile by tile. Sums of tiles with the same pivots are added up as they are.
template <typename R> class PointSum {
 public:
  PointSum(const Tilt& at, int flags) : at_(at), flags_(flags), e_{at.b * kLog2e, at.a * kLog2e, 0} {}

  // Sums relative to the pivots and a constant of 0. Both logits are <= 0 here: 0 is an upper bound unless a coefficient
  // is negative. It may be far above the terms of a mixture: look for the true maximum then (false), so that the weight
  // of a class that has nearly all is nearly exact; unless the row drowns the tile already.
  bool take(const View<R>& x, const TileSums<R>& sum) {
    move_to(x);
    if (sum.z <= (is_mixture(e_.b, e_.a) ? 1e-3 : 1e-12) && sum.z * 2e4 >= open_.z) return false;
    add_to(open_, sum);
    return true;
  }

  // `label` is relative to the tile.
  void add(const Tiles<R>& isa, Tile<R>& x, int64_t label) {
    const int64_t skip = flags_ & EXCLUDE ? label : -1;
    const bool bounded = e_.b >= 0 && e_.a >= 0;
    if (bounded && take(x.view, sums(isa, x, skip, 0))) return;
    move_to(x.view);
    double top = -INFINITY;
    x.parts(skip, [&](const View<R>& part, int) { top = std::fmax(top, isa.top(part, e_)); });
    const bool mixture = is_mixture(e_.b, e_.a);
    if (!mixture) top = R(top);  // what the sums will take for it
    if (top == INFINITY && !bounded) {  // a negative power of an impossible class
      total_.merge({INFINITY, 1, 0, 0, 0, 0, 0});
    } else {
      const TileSums<R> sum = top > (mixture ? -kFarMixed : -kFar) ? sums(isa, x, skip, -top) : TileSums<R>{};
      if (sum.z != 0) total_.merge(moments(sum, -top));
      else add_far(isa, x, skip, top);
    }
  }

  void move_to(const View<R>& x) {
    if (x.s_pivot == s_pivot_ && x.t_pivot == t_pivot_) return;
    close();
    s_pivot_ = x.s_pivot;
    t_pivot_ = x.t_pivot;
  }
  const Exponent& exponent() const { return e_; }
  int flags() const { return flags_; }
  bool single() const {  // of one row's logits, all of them, and no more than their means
    return !is_mixture(e_.b, e_.a) && (e_.b != 0 || e_.a != 0) && !(flags_ & (SECOND | EXCLUDE));
  }
  const Moments& close() {
    if (open_.z != 0) total_.merge(moments(open_, 0));
    open_ = {};
    return total_;
  }

 private:
  TileSums<R> sums(const Tiles<R>& isa, Tile<R>& x, int64_t skip, double constant, bool special = false) const {
    const Exponent e{e_.b, e_.a, constant};
    TileSums<R> all{};
    x.parts(skip, [&](const View<R>& part, int) {
      add_to(all, isa.sums(part, e, flags_, special || x.special, x.scratch));
    });
    return all;
  }

  // All classes are far below the pivots, as where a finite number stands for a mask: a constant of that size would round
  // more than the exponents may. Nothing is left of them beside what there is, or their heaviest class is the pivot.
  void add_far(const Tiles<R>& isa, Tile<R>& x, int64_t skip, double top) {
    const double base = scaled(at_.b, s_pivot_) + scaled(at_.a, t_pivot_);
    if (total_.z != 0 && std::fmax(base + top / kLog2e, -1e30) < total_.m - 800) return;
    double best = -INFINITY, s = s_pivot_, t = t_pivot_;
    x.parts(skip, [&](const View<R>& part, int) {
      for (int i = 0; i < part.n; ++i) {
        const double here = at_(part.s[i], part.t[i]);
        if (!(here > best)) continue;
        best = here;
        s = std::isfinite(part.s[i]) ? part.s[i] : s_pivot_;
        t = std::isfinite(part.t[i]) ? part.t[i] : t_pivot_;
      }
    });
    if (best == -INFINITY) return;
    const View<R> usual = x.view;
    x.view.s_pivot = R(s);
    x.view.t_pivot = R(t);
    move_to(x.view);
    total_.merge(moments(sums(isa, x, skip, 0, true), 0));
    x.view = usual;
    move_to(usual);
  }

  static void add_to(TileSums<R>& all, const TileSums<R>& sum) {
    all.z += sum.z; all.s += sum.s; all.t += sum.t;
    all.ss += sum.ss; all.st += sum.st; all.tt += sum.tt;
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

}  // namespace kd
