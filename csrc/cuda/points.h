// A point of the log-partition as a thread sees it, and what its sums are relative to.
#pragma once
#include "../moments.h"
#include "packs.h"

namespace kd::gpu {

constexpr float kInf = INFINITY;
constexpr float kLowest = -1e30f;  // stands for -inf where a weight of 0 will meet it
constexpr float kHuge = 1e20f;     // what such a stand-in makes where the weight is not 0
constexpr double kLog2e = 1.4426950408889634;

// c * x where a zero coefficient ignores its x, infinite or not.
KD_DEVICE float times(float c, float x) { return c == 0 ? 0 : c * x; }
template <typename R> KD_DEVICE R finite_or_0(R x) { return x > -kInf ? x : 0; }
KD_DEVICE bool above(float x, float companion, float than, float its) {
  return x > than || (x == than && companion > its);
}

// How the exponent of a point is made of u = s - pivot and v = t - pivot. Points with signs or covariances are left to
// double arithmetic (careful.h), and so are the rest of a group of K.
enum Kind { CAREFUL, OF_S, OF_T, OF_BOTH };
struct Point {
  float b = 0, a = 0;  // to base 2
  int kind = CAREFUL;
  int index = 0;        // in the program
  bool twice = false;  // the point before this one, in the exponent: its weights are the squares of that one's
  bool mean_s = false, mean_t = false, exclude = false, careful = false;  // careful, and not only the rest of a group

  KD_DEVICE Point() {}
  KD_DEVICE Point(const Program& p, const double* args, int k, bool narrow) {
    const Tilt at(p, args, k);
    const int flags = p.flags(k);
    index = k;
    careful = narrow || at.b < 0 || at.a < 0 || flags & SECOND;
    kind = careful ? CAREFUL : at.b != 0 && at.a == 0 ? OF_S : at.a != 0 && at.b == 0 ? OF_T : OF_BOTH;
    b = careful ? 0 : float(at.b * kLog2e);
    a = careful ? 0 : float(at.a * kLog2e);
    mean_s = flags & MEAN_S || uniform();
    mean_t = flags & MEAN_T || uniform();
    exclude = flags & EXCLUDE;
  }
  // Sorted by kind and coefficients, a point comes right after the one it may be twice.
  KD_DEVICE bool before(const Point& o) const {
    const int mine = kind == CAREFUL ? 9 : kind, its = o.kind == CAREFUL ? 9 : o.kind;
    return mine != its ? mine < its : b + a != o.b + o.a ? b + a < o.b + o.a : index < o.index;
  }
  KD_DEVICE bool is_twice(const Point& o) const {
    return kind == o.kind && (kind == OF_S || kind == OF_T) && b == 2 * o.b && a == 2 * o.a;
  }
  // The same weight for all classes: its means show where there are dead ones.
  KD_DEVICE bool uniform() const { return kind == OF_BOTH && b == 0 && a == 0; }
};

// The largest logits so far, and for the means of a point of one row's logits the other row's logit of that class, t_at
// and s_at: a class that has nearly all of a point's weight then enters its sums as an exact 0.
struct Pivots {
  float s0 = -kInf, t0 = -kInf, t_at = -kInf, s_at = -kInf;
  int s_class = -1, t_class = -1;  // where they are from

  KD_DEVICE float s(const Point& p) const { return finite_or_0(p.kind == OF_T ? s_at : s0); }
  KD_DEVICE float t(const Point& p) const { return finite_or_0(p.kind == OF_S ? t_at : t0); }
  KD_DEVICE void lift(float x, float y, int c) { lift({x, y, y, x, c, c}); }
  KD_DEVICE void lift(const Pivots& o) {
    if (above(o.s0, o.t_at, s0, t_at)) { s0 = o.s0; t_at = o.t_at; s_class = o.s_class; }
    if (above(o.t0, o.s_at, t0, s_at)) { t0 = o.t0; s_at = o.s_at; t_class = o.t_class; }
  }
  // To those of N classes that are numbers, the first of each pack `stride` from the last's.
  template <typename X, typename Y> KD_DEVICE void lift(const X& xs, const Y& ys, int first, int stride) {
#pragma unroll
    for (int e = 0; e < X::kCount; ++e)
      if (xs[e] < kInf && ys[e] < kInf) lift(xs[e], ys[e], first + e % kPack + e / kPack * stride);
  }
  KD_DEVICE void lift_over_warp() {
#pragma unroll
    for (int d = 16; d; d >>= 1)
      lift(Pivots{shuffle_xor(s0, d), shuffle_xor(t0, d), shuffle_xor(t_at, d), shuffle_xor(s_at, d),
                  shuffle_xor(s_class, d), shuffle_xor(t_class, d)});
  }
};
enum Odd { INFINITE = 1, DAMAGED = 2 };  // -inf among the logits; NaN or +inf

}  // namespace kd::gpu
