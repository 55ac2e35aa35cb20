// Sums over a row at K points, in float, on the threads of a block: relative to pivots, which rise with the logits.
#pragma once
#include "points.h"

namespace kd::gpu {

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

// z = sum of w, s = sum of w u, t = sum of w v at each point.
template <int K> struct Parts {
  float z[K] = {}, s[K] = {}, t[K] = {};
  int odd = 0;
};

// N classes one by one, for the points of `which`: what infinite logits need, and points without the label's class.
template <int K, int N>
KD_SLOW void add_classes(Parts<K>* to, const Point* points, int which, const Pivots* pivots, const float* x,
                         const float* y, int live, int label) {
  Parts<K> sum;
#pragma unroll 1
  for (int e = 0; e < N; ++e) {
    if (!(x[e] < kInf && y[e] < kInf)) sum.odd |= DAMAGED;
    if ((x[e] == -kInf || y[e] == -kInf) && live >> e & 1) sum.odd |= INFINITE;
    if (x[e] == -kInf && y[e] == -kInf) continue;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const Point& p = points[k];
      if (!(which >> k & 1) || p.kind == CAREFUL || (p.exclude && e == label)) continue;
      const float w = fast_exp2(times(p.b, x[e] - finite_or_0(pivots->s0)) + times(p.a, y[e] - finite_or_0(pivots->t0)));
      sum.z[k] += w;
      if (w == 0) continue;
      if (p.mean_s) sum.s[k] += w * (x[e] - pivots->s(p));
      if (p.mean_t) sum.t[k] += w * (y[e] - pivots->t(p));
    }
  }
  *to = sum;
}

// A warp's classes, in each thread its own part; pivots are the same throughout the warp.
template <int K> struct Sums {
  Pivots at;
  Parts<K> sum;
  bool looks = false;  // at every class: there are points whose sums here would not show what is odd

  KD_DEVICE explicit Sums(const Point* points) {
    for (int k = 0; k < K; ++k) looks |= points[k].careful;
  }

  // To pivots that are as high or higher.
  KD_DEVICE void rebase(const Point* points, const Pivots& to) {
    const Pivots was = at;
    at = to;
    const float ds = finite_or_0(was.s0) - finite_or_0(at.s0), dt = finite_or_0(was.t0) - finite_or_0(at.t0);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const Point p = points[k];
      const float f = sum.z[k] == 0 ? 0 : fast_exp2(p.b * ds + p.a * dt);
      sum.s[k] = times(f, sum.s[k] + sum.z[k] * (was.s(p) - at.s(p)));
      sum.t[k] = times(f, sum.t[k] + sum.z[k] * (was.t(p) - at.t(p)));
      sum.z[k] *= f;
    }
  }

  // M packs, their first classes `stride` apart, `live` of their classes in the row; class `label` is left out of points
  // that exclude it. The pivots stay as they are, or the whole warp takes part and they rise with the logits.
  template <bool kRising, typename R, typename Q, int M>
  KD_DEVICE void add(const Point* points, const Packs<R, M>& xs, const Packs<Q, M>& ys, int first, int stride, int live,
                     int label) {
    constexpr int N = M * kPack;
    if (kRising && any(xs.above(R::top(at.s0)) || ys.above(Q::top(at.t0)))) {
      Pivots to = at;
      to.lift(xs, ys, first, stride);
      to.lift_over_warp();
      rebase(points, to);
    }
    int apart = looks && odd(xs, ys) ? (1 << K) - 1 : 0;  // points to be added class by class
    label -= first;
    if (M > 1 && label >= stride) label += kPack - stride;
    else if (label >= kPack) label = N;
    if (label >= 0 && label < N)
      for (int k = 0; k < K; ++k) apart |= points[k].exclude << k;
    float u[N], v[N], w[N];
    const float s_from = finite_or_0(at.s0), t_from = finite_or_0(at.t0);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      u[e] = xs[e] - s_from;
      v[e] = ys[e] - t_from;
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const Point p = points[k];
      if (p.kind == CAREFUL) continue;
      float z = 0, s = 0, t = 0;
      if (k && p.twice) {
#pragma unroll
        for (int e = 0; e < N; ++e) w[e] *= w[e];
      } else {
        weights(p, u, v, w);
      }
      if (apart >> k & 1) continue;
#pragma unroll
      for (int e = 0; e < N; e += 4) z += (w[e] + w[e + 1]) + (w[e + 2] + w[e + 3]);
      if (p.mean_s) s = weighted(w, u, p.kind == OF_T ? at.s(p) - s_from : 0);
      if (p.mean_t) t = weighted(w, v, p.kind == OF_S ? at.t(p) - t_from : 0);
      if (fabsf(z + s + t) < kInf) {
        sum.z[k] += z; sum.s[k] += s; sum.t[k] += t;
      } else {
        apart |= 1 << k;
      }
    }
    if (!apart) return;
    float x[N], y[N];
#pragma unroll
    for (int e = 0; e < N; ++e) { x[e] = xs[e]; y[e] = ys[e]; }
    const Pivots pivots = at;
    Parts<K> part;
    add_classes<K, N>(&part, points, apart, &pivots, x, y, live, label);
#pragma unroll
    for (int k = 0; k < K; ++k) { sum.z[k] += part.z[k]; sum.s[k] += part.s[k]; sum.t[k] += part.t[k]; }
    sum.odd |= part.odd;
  }

 private:
  template <typename X, typename Y> KD_DEVICE static bool odd(const X& xs, const Y& ys) {
    float total = 0;
#pragma unroll
    for (int e = 0; e < X::kCount; ++e) total += xs[e] + ys[e];
    return !(fabsf(total) < kInf);
  }
};

// The pivots of packs [first, end), each thread's of its own; where they can be read twice.
template <typename P> KD_DEVICE Pivots pivots_of(const P& row, int first, int end) {
  using S = typename P::SReader;
  using T = typename P::TReader;
  uint32_t s_top = S::top(-kInf), t_top = T::top(-kInf);
  int by_s = -1, by_t = -1, from, to;
  row.whole(first, end, &from, &to);
  const auto fetch = [&](int at, Packs<S, 1>& x, Packs<T, 1>& y) {
    const int live = at >= from && at < to ? 255 : row.live(at);
    x.raw[0] = row.s.fetch(at, live);
    y.raw[0] = row.t.fetch(at, live);
  };
  Packs<S, 1> x;
  Packs<T, 1> y;
  for (int pack = first + thread(); pack < end; pack += threads()) {
    fetch(pack, x, y);
    const uint32_t s = S::top(x.raw[0], s_top), t = T::top(y.raw[0], t_top);
    by_s = s != s_top ? pack : by_s;
    by_t = t != t_top ? pack : by_t;
    s_top = s;
    t_top = t;
  }
  Pivots pivots;
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    const int pack = i ? by_t : by_s;
    if (pack < 0) continue;
    fetch(pack, x, y);
    pivots.lift(x, y, row.first_class(pack), 0);
  }
  return pivots;
}

// Packs [first, end) of a pair of rows, dealt to the threads of a block; `label` is a class or -1.
template <int K, typename P>
KD_DEVICE void add_packs(Sums<K>& sums, const Point* points, const P& row, int first, int end, int label) {
  constexpr int M = P::kOnChip || K < 4 ? P::kAtOnce : 1;  // as registers allow
  using S = typename P::SReader;
  using T = typename P::TReader;
  const int lane = thread() % 32, step = threads();
  int from, to;
  row.whole(first, end, &from, &to);
  const auto full = [&](int at) { return at - lane + (M - 1) * step + 32 <= to; };  // the same for a warp
  int pack = row.template stream<M>(from + thread(), step, false, full, [&](int at, const auto& x, const auto& y) {
    sums.template add<!P::kOnChip>(points, x, y, row.first_class(at), step * kPack, -1, label);
  });
  // What is left: a pack for each lane that has one.
  for (bool before = from > first && thread() < 32; before || pack - lane < end; before = false) {
    const int at = before ? first + lane : pack, live = at < (before ? from : end) ? row.live(at) : 0;
    const Packs<S, 1> x1{{row.s.fetch(at, live)}};
    const Packs<T, 1> y1{{row.t.fetch(at, live)}};
    sums.template add<!P::kOnChip>(points, x1, y1, row.first_class(at), 0, live, label);
    if (!before) pack += step;
  }
}

}  // namespace kd::gpu
