// Sums over a row at K points, in float, on the threads of a block: relative to pivots, which rise with the logits.
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
  bool mean_s = false, mean_t = false, exclude = false, careful = false;  // careful, and not only the rest of a group

  KD_DEVICE Point() {}
  KD_DEVICE Point(const Program& p, const double* args, int k, bool narrow) {
    const Tilt at(p, args, k);
    const int flags = p.flags(k);
    careful = narrow || at.b < 0 || at.a < 0 || flags & SECOND;
    kind = careful ? CAREFUL : at.b != 0 && at.a == 0 ? OF_S : at.a != 0 && at.b == 0 ? OF_T : OF_BOTH;
    b = careful ? 0 : float(at.b * kLog2e);
    a = careful ? 0 : float(at.a * kLog2e);
    mean_s = flags & MEAN_S || uniform();
    mean_t = flags & MEAN_T || uniform();
    exclude = flags & EXCLUDE;
  }
  // The same weight for all classes: its means show where there are dead ones.
  KD_DEVICE bool uniform() const { return kind == OF_BOTH && b == 0 && a == 0; }
};

// Weights of N classes. The branches are the same for all threads.
template <int N>
KD_DEVICE void weights(const Point& p, const float (&u)[N], const float (&v)[N], float (&w)[N]) {
  if (p.kind == OF_S) {
#pragma unroll
    for (int e = 0; e < N; ++e) w[e] = fast_exp2(p.b * u[e]);
  } else if (p.kind == OF_T) {
#pragma unroll
    for (int e = 0; e < N; ++e) w[e] = fast_exp2(p.a * v[e]);
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e) w[e] = fast_exp2(fmaf(p.b, u[e], p.a * v[e]));
  }
}

// sum of w (x - from), two chains of additions long.
template <int N> KD_DEVICE float weighted(const float (&w)[N], const float (&x)[N], float from) {
  float a = 0, b = 0;
  if (from == 0) {
#pragma unroll
    for (int e = 0; e < N; e += 2) {
      a = fmaf(w[e], x[e], a);
      b = fmaf(w[e + 1], x[e + 1], b);
    }
  } else {
#pragma unroll
    for (int e = 0; e < N; e += 2) {
      a = fmaf(w[e], x[e] - from, a);
      b = fmaf(w[e + 1], x[e + 1] - from, b);
    }
  }
  return a + b;
}

// A warp's classes: z = sum of w, s = sum of w u, t = sum of w v, in each thread its own part. Pivots are the same
// throughout the warp: the largest logits so far, and for the means of a point of one row's logits the other row's logit
// of that class, t_at and s_at: a class that has nearly all of a point's weight then enters as an exact 0.
enum Odd { INFINITE = 1, DAMAGED = 2 };  // -inf among the logits; NaN or +inf
template <int K> struct Sums {
  float s0 = -kInf, t0 = -kInf, t_at = -kInf, s_at = -kInf;
  int s_class = -1, t_class = -1;  // where the pivots are from
  float z[K] = {}, s[K] = {}, t[K] = {};
  int odd = 0;
  bool looks = false;  // at every class: there are points whose sums here would not show what is odd

  KD_DEVICE explicit Sums(const Point* points) {
    for (int k = 0; k < K; ++k) looks |= points[k].careful;
  }
  KD_DEVICE float s_pivot(const Point& p) const { return finite_or_0(p.kind == OF_T ? s_at : s0); }
  KD_DEVICE float t_pivot(const Point& p) const { return finite_or_0(p.kind == OF_S ? t_at : t0); }

  // Raises the pivots to the largest of the warp's; the whole warp takes part.
  template <int N>
  KD_DEVICE void lift(const Point* points, const float (&x)[N], const float (&y)[N], int first, int stride) {
    float s1 = s0, t1 = t0, ta = t_at, sa = s_at;
    int sc = s_class, tc = t_class;
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const int at = first + e % kPack + e / kPack * stride;
      const bool numbers = x[e] < kInf && y[e] < kInf;
      if (numbers && x[e] > s0 && above(x[e], y[e], s1, ta)) { s1 = x[e]; ta = y[e]; sc = at; }
      if (numbers && y[e] > t0 && above(y[e], x[e], t1, sa)) { t1 = y[e]; sa = x[e]; tc = at; }
    }
#pragma unroll
    for (int d = 16; d; d >>= 1) {
      const float s2 = shuffle_xor(s1, d), ta2 = shuffle_xor(ta, d), t2 = shuffle_xor(t1, d), sa2 = shuffle_xor(sa, d);
      const int sc2 = shuffle_xor(sc, d), tc2 = shuffle_xor(tc, d);
      if (above(s2, ta2, s1, ta)) { s1 = s2; ta = ta2; sc = sc2; }
      if (above(t2, sa2, t1, sa)) { t1 = t2; sa = sa2; tc = tc2; }
    }
    const Sums before = *this;
    if (s1 > s0) { s0 = s1; t_at = ta; s_class = sc; }
    if (t1 > t0) { t0 = t1; s_at = sa; t_class = tc; }
    const float ds = finite_or_0(before.s0) - finite_or_0(s0), dt = finite_or_0(before.t0) - finite_or_0(t0);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const Point p = points[k];
      const float f = z[k] == 0 ? 0 : fast_exp2(p.b * ds + p.a * dt);
      s[k] = times(f, s[k] + z[k] * (before.s_pivot(p) - s_pivot(p)));
      t[k] = times(f, t[k] + z[k] * (before.t_pivot(p) - t_pivot(p)));
      z[k] *= f;
    }
  }

  // M packs, their first classes `stride` apart, `live` of their classes in the row; class `label` is left out of points
  // that exclude it. The whole warp takes part.
  template <typename R, typename Q, int M>
  KD_DEVICE void add(const Point* points, const Packs<R, M>& xs, const Packs<Q, M>& ys, int first, int stride, int live,
                     int label) {
    constexpr int N = M * kPack;
    label -= first;
    if (M > 1 && label >= stride) label = label < stride + kPack ? label - stride + kPack : N;
    else if (label >= kPack) label = N;
    if (any(xs.above(R::top(s0)) || ys.above(Q::top(t0)))) {
      float x[N], y[N];
#pragma unroll
      for (int e = 0; e < N; ++e) { x[e] = xs[e]; y[e] = ys[e]; }
      lift(points, x, y, first, stride);
    }
    if (looks) look(xs, ys, live);
    int left = (1 << K) - 1, apart = 0;  // points to be added; points to be added class by class
    if (label >= 0 && label < N)
      for (int k = 0; k < K; ++k) apart |= points[k].exclude << k;
    const float s_from = finite_or_0(s0), t_from = finite_or_0(t0);
    // Once more with -inf replaced where a sum is not finite: its classes have the weight 0, or they go apart.
#pragma unroll 1
    for (int again = 0; again < 2 && left & ~apart; ++again) {
      float u[N], v[N];
#pragma unroll
      for (int e = 0; e < N; ++e) {
        u[e] = xs[e] - s_from;
        v[e] = ys[e] - t_from;
      }
      if (again) {
        look(xs, ys, live);
#pragma unroll
        for (int e = 0; e < N; ++e) { u[e] = fmaxf(u[e], kLowest); v[e] = fmaxf(v[e], kLowest); }
      }
      left = add_all(points, u, v, left & ~apart, again) | (left & apart);
      if (again) apart = left;
    }
    if (!left || odd & DAMAGED) return;
#pragma unroll 1
    for (int e = 0; e < N; ++e) add_class(points, left, xs.at(e), ys.at(e), e == label);
  }

 private:
  template <typename X, typename Y> KD_DEVICE void look(const X& xs, const Y& ys, int live) {
#pragma unroll
    for (int e = 0; e < int(sizeof xs.raw / sizeof xs.raw[0]) * kPack; ++e) {
      const float x = xs[e], y = ys[e];
      if (!(x < kInf && y < kInf)) odd |= DAMAGED;
      if ((x == -kInf || y == -kInf) && live >> e & 1) odd |= INFINITE;
    }
  }

  // Adds to the points of `which`; returns those whose sums are not finite, or not with stand-ins for infinite logits.
  template <int N>
  KD_DEVICE int add_all(const Point* points, const float (&u)[N], const float (&v)[N], int which, int stand_ins) {
    int not_finite = 0;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const Point p = points[k];
      if (p.kind == CAREFUL || !(which >> k & 1)) continue;
      float w[N], dz = 0, ds = 0, dt = 0;
      weights(p, u, v, w);
#pragma unroll
      for (int e = 0; e < N; e += 4) dz += (w[e] + w[e + 1]) + (w[e + 2] + w[e + 3]);
      if (p.mean_s) ds = weighted(w, u, p.kind == OF_T ? finite_or_0(s_at) - finite_or_0(s0) : 0);
      if (p.mean_t) dt = weighted(w, v, p.kind == OF_S ? finite_or_0(t_at) - finite_or_0(t0) : 0);
      if (fabsf(dz + ds + dt) < (stand_ins ? kHuge : kInf) && !(stand_ins && p.uniform())) {
        z[k] += dz; s[k] += ds; t[k] += dt;
      } else {
        not_finite |= 1 << k;
      }
    }
    return not_finite;
  }

  KD_DEVICE void add_class(const Point* points, int which, float x, float y, bool label) {
    if (x == -kInf && y == -kInf) return;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const Point p = points[k];
      if (!(which >> k & 1) || p.kind == CAREFUL || (p.exclude && label)) continue;
      const float w = fast_exp2(times(p.b, x - finite_or_0(s0)) + times(p.a, y - finite_or_0(t0)));
      z[k] += w;
      s[k] += w == 0 || !p.mean_s ? 0 : w * (x - s_pivot(p));
      t[k] += w == 0 || !p.mean_t ? 0 : w * (y - t_pivot(p));
    }
  }
};

// Packs [first, end) of a pair of rows, dealt to the threads of a block; `label` is a class or -1.
template <int K, typename P>
KD_DEVICE void add_packs(Sums<K>& sums, const Point* points, const P& row, int first, int end, int label) {
  constexpr int M = P::kOnChip || K < 6 ? P::kAtOnce : 1;  // as registers allow
  using S = typename P::SReader;
  using T = typename P::TReader;
  const int lane = thread() % 32, step = threads();
  int from, to;
  row.whole(first, end, &from, &to);
  int pack = from + thread();
  const auto fetch = [&](int at, Packs<S, M>& x, Packs<T, M>& y) {
#pragma unroll
    for (int i = 0; i < M; ++i) {
      x.raw[i] = row.s.fetch(at + i * step, 255);
      y.raw[i] = row.t.fetch(at + i * step, 255);
    }
  };
  const auto full = [&](int at) { return at - lane + (M - 1) * step + 32 <= to; };  // the same for a warp
  Packs<S, M> x, x_next;
  Packs<T, M> y, y_next;
  if (full(pack)) fetch(pack, x, y);
  while (full(pack)) {
    // Memory is asked M packs ahead; shared memory answers at once.
    const int next = pack + M * step;
    if (!P::kOnChip && full(next)) fetch(next, x_next, y_next);
    sums.add(points, x, y, row.first_class(pack), step * kPack, -1, label);
    if (P::kOnChip) {
      if (full(next)) fetch(next, x, y);
    } else {
      x = x_next;
      y = y_next;
    }
    pack = next;
  }
  // What is left: a pack for each lane that has one.
  for (bool before = from > first && thread() < 32; before || pack - lane < end; before = false) {
    const int at = before ? first + lane : pack, live = at < (before ? from : end) ? row.live(at) : 0;
    const Packs<S, 1> x1{{row.s.fetch(at, live)}};
    const Packs<T, 1> y1{{row.t.fetch(at, live)}};
    sums.add(points, x1, y1, row.first_class(at), 0, live, label);
    if (!before) pack += step;
  }
}

}  // namespace kd::gpu
