// Row statistics, their monoid, and what a loss's slope at them means for every element. Host and device.
//
// At a point (b, a) of a row, x_i = b s_i + a t_i. `Moments` stands for the measure sum_i exp(x_i) delta(s_i, t_i):
// max, mass relative to the max, means and central covariances. Merging two is exact and never overflows; it serves
// vector lanes, tiles, threads and vocabulary shards alike.
#pragma once
#include "tape.h"

namespace kd {

constexpr int kStats = 7, kCoefs = 10;
constexpr int64_t kElsewhere = -(int64_t(1) << 62);  // a label of a class that another vocabulary shard has
enum Flags { RAW = 1, FROZEN = 2, EXCLUDE = 4, MEAN_S = 8, MEAN_T = 16, SECOND = 32, GIVEN = 64 };

// c * x where a zero coefficient ignores its x, infinite or not.
KD_HD double scaled(double c, double x) { return c == 0 ? 0 : c * x; }

struct Moments {
  double m, z, s, t, ss, st, tt;

  KD_HD static Moments empty() { return {-INFINITY, 0, 0, 0, 0, 0, 0}; }

  // Chan, Golub & LeVeque 1983 for the covariances, Milakov & Gimelshein 2018 for the mass.
  KD_HD void merge(const Moments& o) {
    if (o.z == 0) return;
    if (z == 0) { *this = o; return; }
    const double top = m > o.m ? m : o.m;
    // exp(0) = 1, so of the two only one is computed; a NaN maximum stays NaN.
    const double zo = o.z * (o.m == top ? 1 : exp(o.m - top)), zm = z * (m == top ? 1 : exp(m - top));
    const double total = zm + zo, f = zo / total;
    m = top; z = total;
    if (f == 0) return;
    const double e = zm / total, d = o.s - s, h = o.t - t, ef = e * f;
    s = e == 0 ? o.s : e * s + f * o.s;
    t = e == 0 ? o.t : e * t + f * o.t;
    if (e == 0) { ss = o.ss; st = o.st; tt = o.tt; return; }
    ss = e * ss + f * o.ss + ef * d * d;
    st = e * st + f * o.st + ef * d * h;
    tt = e * tt + f * o.tt + ef * h * h;
  }
};

// What a row needs besides its K Moments.
struct Row { double s_y, t_y, s_max, t_max, keep, special; };  // special: there are -inf logits

// Coefficients of point k, of the scaled logits or, for a raw point, of the logits themselves.
struct Tilt {
  double b, a, r, rt;
  KD_HD Tilt(const Program& p, const double* args, int k) {
    const bool raw = p.flags(k) & RAW;
    r = raw ? 1 : args[0];
    rt = raw ? 1 : args[1];
    b = args[3 + 2 * k] * r;
    a = args[4 + 2 * k] * rt;
  }
  KD_HD double operator()(double s, double t) const { return scaled(b, s) + scaled(a, t); }
};

KD_HD double lse(const Moments& x) { return x.z == 0 ? -INFINITY : x.m + log(x.z); }
// The logarithm of a weight from that of its share: at - lse(x), of which much may cancel.
KD_HD double log_weight(double at, const Moments& x) { return x.z == 0 ? -INFINITY : at - x.m - log(x.z); }

// The tape's inputs from point k. True where the value is NaN whatever the tape makes of them: of a sum that is, and where
// the point has no class left to sum over, unless it is a mixture: two rows may have no class in common.
KD_HD bool point_inputs(const Program& p, const double* args, int k, const Moments& x, const Row& row, double* reg) {
  const Tilt at(p, args, k);
  double* in = reg + 6 * k;
  in[0] = lse(x);
  in[1] = at.r * x.s; in[2] = at.rt * x.t;
  const bool infinite = std::isinf(x.s) || std::isinf(x.t);  // the mean already says so
  in[3] = infinite ? 0 : at.r * at.r * x.ss;
  in[4] = infinite ? 0 : at.r * at.rt * x.st;
  in[5] = infinite ? 0 : at.rt * at.rt * x.tt;
  if (p.flags(k) & GIVEN) { in[3] = args[3 + 2 * k]; in[4] = args[4 + 2 * k]; }
  if (x.z != x.z) return true;
  if (x.z != 0 || (at.b != 0 && at.a != 0 && !(p.flags(k) & FROZEN))) return false;
  const bool label = row.s_y > -INFINITY || row.t_y > -INFINITY;  // a class of the row, not a deleted one
  return !((p.flags(k) & EXCLUDE) && label && at(row.s_y, row.t_y) > -INFINITY);
}
KD_HD void label_inputs(const Program& p, const double* args, const Row& row, double* reg) {
  double* in = reg + 6 * p.points();
  in[0] = scaled(args[0], row.s_y); in[1] = scaled(args[1], row.t_y); in[2] = row.s_y; in[3] = args[2];
}

// coef: (K + 1) x kCoefs. The gradient of this side's logits is
//   d_i = sum_k pi_ki (c0 + c1 u + c2 v + c3 u^2 + c4 u v + c5 v^2),  u = s_i - max s, v = t_i - max t,
// pi_ki = exp(b u + a v + lam); the label adds its own slope. adj: the slope of the value at reg. Line k of coef;
// returns the point's part of d value / d log scale of this side.
KD_HD double point_coefs(const Program& p, const double* args, int k, const Moments& o, const Row& row,
                         const double* adj, int side, double poison, double* coef) {
  const Tilt at(p, args, k);
  const double* g = adj + 6 * k;
  const double gE = g[0], gs = at.r * g[1], gt = at.rt * g[2];
  const double second = p.flags(k) & GIVEN ? 0 : 1;  // coefficients that are given have no slope
  const double gss = scaled(second, at.r * at.r * g[3]), gst = scaled(second, at.r * at.rt * g[4]);
  const double gtt = scaled(second, at.rt * at.rt * g[5]);
  const double B = p.flags(k) & FROZEN ? 0 : side ? at.a : at.b;
  double c0 = scaled(B, gE - scaled(gss, o.ss) - scaled(gst, o.st) - scaled(gtt, o.tt)) + (side ? gt : gs);
  const double top = at(row.s_max, row.t_max), lam = log_weight(top, o);
  // Where neighbouring numbers are further apart than exp reaches, a class that has all the weight of one row's logits
  // is the mean: what it gets would be lost in terms that cancel.
  const bool alone = fabs(top) > 1e16 && lam == 0 && (at.b == 0 || at.a == 0);
  const double off = alone ? 0 : 1;
  double c1 = scaled(off, B * gs + (side ? gst : 2 * gss)), c2 = scaled(off, B * gt + (side ? 2 * gtt : gst));
  const double c3 = scaled(off, B * gss), c4 = scaled(off, B * gst), c5 = scaled(off, B * gtt);
  double log_scale = 0;
  if (!(p.flags(k) & RAW)) {
    const double own = side ? o.t : o.s, own2 = side ? o.tt : o.ss;
    const double g1 = side ? gt : gs, g2 = side ? gs : gt, g11 = side ? gtt : gss;
    log_scale = scaled(B * gE, own) + scaled(g1, own + scaled(B, own2)) + scaled(g2 * B, o.st) +
                2 * scaled(g11, own2) + scaled(gst, o.st);
  }
  // From deviations of the means to deviations of the maxima.
  const double d = row.s_max - o.s, e = row.t_max - o.t;
  c0 += scaled(c1, d) + scaled(c2, e) + scaled(c3, d * d) + scaled(c4, d * e) + scaled(c5, e * e);
  c1 += 2 * scaled(c3, d) + scaled(c4, e);
  c2 += scaled(c4, d) + 2 * scaled(c5, e);
  const double out[kCoefs] = {lam, at.b, at.a, c0 + poison, c1, c2, c3, c4, c5, double((p.flags(k) & EXCLUDE) != 0)};
  for (int j = 0; j < kCoefs; ++j) coef[k * kCoefs + j] = out[j];
  return log_scale;
}
KD_HD void label_coefs(const Program& p, const double* args, const Row& row, const double* adj, int side, double poison,
                       double log_scale, double* coef) {
  const double* g = adj + 6 * p.points();
  const double label = side ? scaled(args[1], g[1]) : scaled(args[0], g[0]) + g[2];
  log_scale += side ? scaled(g[1], args[1] * row.t_y) : scaled(g[0], args[0] * row.s_y);
  const double out[kCoefs] = {label + poison, row.s_max, row.t_max, row.keep, log_scale, row.special, 0, 0, 0, 0};
  for (int j = 0; j < kCoefs; ++j) coef[p.points() * kCoefs + j] = out[j];
}

KD_HD Row row_of(const double* last) { return {last[0], last[1], last[2], last[3], last[4], last[5]}; }

// Value of a row and, for each side, coef (K + 1) x kCoefs, from its statistics (kdkernels/ops.py); registers: 2 x
// p.registers() doubles of scratch. A row that is not kept (0) has neither; one of NaN (-1) has no gradient.
KD_HD double value_and_coefs(const Program& p, const double* args, const double* stats, int sides, int64_t side_stride,
                             double* registers, double* coef) {
  const int K = p.points();
  const Row row = row_of(stats + K * kStats);
  if (row.keep <= 0) {
    for (int side = 0; side < sides; ++side)
      for (int i = 0; i < (K + 1) * kCoefs; ++i) coef[side * side_stride + i] = 0;
    return row.keep < 0 ? NAN : 0;
  }
  const Moments* x = reinterpret_cast<const Moments*>(stats);
  double* adjoints = registers + p.registers();
  bool nothing = row.s_y == INFINITY || row.t_y == INFINITY;  // which points without the label's class do not see
  for (int k = 0; k < K; ++k) nothing |= point_inputs(p, args, k, x[k], row, registers);
  label_inputs(p, args, row, registers);
  const double value = evaluate(p, registers), poison = nothing || value != value ? NAN : 0;
  differentiate(p, registers, adjoints);
  for (int side = 0; side < sides; ++side, coef += side_stride) {
    double log_scale = 0;
    for (int k = 0; k < K; ++k) log_scale += point_coefs(p, args, k, x[k], row, adjoints, side, poison, coef);
    label_coefs(p, args, row, adjoints, side, poison, log_scale, coef);
  }
  return value + poison;
}

// The gradient at one class, in double: what the vectors of a backend compute, term by term. The means of a point of
// one term are of `rounded` deviations (u, v), those of a mixture of `exact` ones; a mean and its deviations cancel.
struct Deviation { double u, v; };
// The logarithm of a weight, which is at most 1: of logits of 1e17 and more the rounding of a sum of them is not small.
KD_HD double not_above_0(double x) { return x > 0 && x < INFINITY ? 0 : x; }
KD_HD bool is_mixture(double b, double a) { return b < 0 || a < 0 || (b != 0 && a != 0); }
KD_HD double slope_at(const double* coef, int K, Deviation exact, Deviation rounded, bool label) {
  double d = label ? coef[K * kCoefs] : 0;
  for (int k = 0; k < K; ++k, coef += kCoefs) {
    if (label && coef[9] != 0) continue;
    const double* c = coef + 3;
    const auto [u, v] = is_mixture(coef[1], coef[2]) ? exact : rounded;
    const double q = c[0] + scaled(c[1], u) + scaled(c[2], v) + scaled(c[3], u * u) + scaled(c[4], u * v) +
                     scaled(c[5], v * v);
    const double w = exp(not_above_0(scaled(coef[1], exact.u) + scaled(coef[2], exact.v) + coef[0]));
    if (w != 0) d += scaled(w, q);
  }
  return d;
}

}  // namespace kd
