// Sums over a row at K points, in float, on the threads of a block: relative to pivots, which rise with the logits.
#pragma once
#include "../moments.h"
#include "packs.h"

namespace kd::gpu {

constexpr float kInf = INFINITY;
constexpr double kLog2e = 1.4426950408889634;

// `points` below are a group of up to K, the rest CAREFUL with coefficients 0.
// How the exponent of a point is made of u = s - pivot and v = t - pivot; points with signs or covariances are left to
// double arithmetic (careful.h).
enum Kind { CAREFUL, OF_S, OF_T, OF_BOTH };
struct Point {
  float b, a;  // to base 2
  int kind;
  bool means, exclude;

  KD_DEVICE Point() : b(0), a(0), kind(CAREFUL), means(false), exclude(false) {}
  KD_DEVICE Point(const Program& p, const double* args, int k, bool narrow) {
    const Tilt at(p, args, k);
    const int flags = p.flags(k);
    const bool careful = narrow || at.b < 0 || at.a < 0 || flags & SECOND;
    kind = careful ? CAREFUL : at.b != 0 ? (at.a != 0 ? OF_BOTH : OF_S) : at.a != 0 ? OF_T : OF_BOTH;
    b = careful ? 0 : float(at.b * kLog2e);
    a = careful ? 0 : float(at.a * kLog2e);
    means = flags & (MEAN_S | MEAN_T);
    exclude = flags & EXCLUDE;
  }
};

// c * x where a zero coefficient ignores its x, infinite or not.
KD_DEVICE float times(float c, float x) { return c == 0 ? 0 : c * x; }
template <typename R> KD_DEVICE R finite_or_0(R x) { return x > -kInf ? x : 0; }

// b u + a v + c of a pack. The branches are the same for all threads.
template <typename P>
KD_DEVICE void exponents(const P& p, float s0, float t0, float c, const float (&x)[kPack], const float (&y)[kPack],
                         float (&w)[kPack]) {
  if (p.kind == OF_S) {
#pragma unroll
    for (int e = 0; e < kPack; ++e) w[e] = fmaf(p.b, x[e] - s0, c);
  } else if (p.kind == OF_T) {
#pragma unroll
    for (int e = 0; e < kPack; ++e) w[e] = fmaf(p.a, y[e] - t0, c);
  } else {
#pragma unroll
    for (int e = 0; e < kPack; ++e) w[e] = fmaf(p.b, x[e] - s0, fmaf(p.a, y[e] - t0, c));
  }
}

KD_DEVICE bool above(float x, float companion, float than, float its) {
  return x > than || (x == than && companion > its);
}

// A warp's classes: z = sum of w, s = sum of w u, t = sum of w v with w = exp2(b u + a v), in each thread its own part.
// Pivots are the same throughout the warp: the largest logits so far, s0 and t0, and for the means of a point of one
// row's logits the other row's logit of that class, t_at_s0 and s_at_t0: a class that has nearly all of a point's weight
// then enters as an exact 0.
template <int K> struct Sums {
  float s0 = -kInf, t0 = -kInf, t_at_s0 = -kInf, s_at_t0 = -kInf;
  float z[K] = {}, s[K] = {}, t[K] = {};
  bool damaged = false;

  KD_DEVICE float s_pivot(const Point& p) const { return finite_or_0(p.kind == OF_T ? s_at_t0 : s0); }
  KD_DEVICE float t_pivot(const Point& p) const { return finite_or_0(p.kind == OF_S ? t_at_s0 : t0); }

  // Raises the pivots to the largest of the warp's; the whole warp takes part. s1, t1 and the logits beside them.
  KD_DEVICE void lift(const Point* points, float s1, float t_at, float t1, float s_at) {
    if (!any(s1 > s0 || t1 > t0)) return;
#pragma unroll
    for (int d = 16; d; d >>= 1) {
      const float s2 = shuffle_xor(s1, d), t_at2 = shuffle_xor(t_at, d);
      const float t2 = shuffle_xor(t1, d), s_at2 = shuffle_xor(s_at, d);
      if (above(s2, t_at2, s1, t_at)) { s1 = s2; t_at = t_at2; }
      if (above(t2, s_at2, t1, s_at)) { t1 = t2; s_at = s_at2; }
    }
    const Sums before = *this;
    if (s1 > s0) { s0 = s1; t_at_s0 = t_at; }
    if (t1 > t0) { t0 = t1; s_at_t0 = s_at; }
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

  // Eight classes, of which element `label` is left out of some points, or none. The whole warp takes part.
  KD_DEVICE void add(const Point* points, const float (&x)[kPack], const float (&y)[kPack], int label) {
    float s1 = x[0], t1 = y[0], total = 0;
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      s1 = fmaxf(s1, x[e]);
      t1 = fmaxf(t1, y[e]);
      total += x[e] + y[e];
    }
    const bool finite = fabsf(total) < kInf;  // or else one of them may be infinite, or NaN: that is no pivot
    if (!finite) {
      s1 = t1 = -kInf;
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        s1 = x[e] < kInf ? fmaxf(s1, x[e]) : s1;
        t1 = y[e] < kInf ? fmaxf(t1, y[e]) : t1;
      }
    }
    float t_at = -kInf, s_at = -kInf;
    if (s1 > s0 || t1 > t0) {
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        t_at = x[e] == s1 && y[e] < kInf ? fmaxf(t_at, y[e]) : t_at;
        s_at = y[e] == t1 && x[e] < kInf ? fmaxf(s_at, x[e]) : s_at;
      }
    }
    lift(points, s1, t_at, t1, s_at);
    if (finite && (label < 0 || label >= kPack)) return add_finite(points, x, y);
    for (int e = 0; e < kPack; ++e) add_class(points, pick(x, e), pick(y, e), e == label);
  }

 private:
  KD_DEVICE void add_finite(const Point* points, const float (&x)[kPack], const float (&y)[kPack]) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const Point p = points[k];
      if (p.kind == CAREFUL) continue;
      float w[kPack];
      exponents(p, s0, t0, 0, x, y, w);
#pragma unroll
      for (int e = 0; e < kPack; ++e) w[e] = fast_exp2(w[e]);
      z[k] += ((w[0] + w[1]) + (w[2] + w[3])) + ((w[4] + w[5]) + (w[6] + w[7]));
      if (!p.means) continue;
      const float u = s_pivot(p), v = t_pivot(p);
      float ds = 0, dt = 0;
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        ds = fmaf(w[e], x[e] - u, ds);
        dt = fmaf(w[e], y[e] - v, dt);
      }
      s[k] += ds;
      t[k] += dt;
    }
  }

  KD_DEVICE void add_class(const Point* points, float x, float y, bool label) {
    if (x == -kInf && y == -kInf) return;
    damaged |= !(x < kInf && y < kInf);
    if (damaged) return;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const Point p = points[k];
      if (p.kind == CAREFUL || (p.exclude && label)) continue;
      const float w = fast_exp2(times(p.b, x - finite_or_0(s0)) + times(p.a, y - finite_or_0(t0)));
      z[k] += w;
      s[k] += w == 0 ? 0 : w * (x - s_pivot(p));
      t[k] += w == 0 ? 0 : w * (y - t_pivot(p));
    }
  }
};

// Packs [first, end) of a pair of rows, dealt to the threads of a block; `label` is a class or -1.
template <int K, typename P>
KD_DEVICE void add_packs(Sums<K>& sums, const Point* points, const P& row, int first, int end, int64_t label) {
  const int step = threads();
  int pack = first + thread();
  const auto live = [&](int at) { return at < end ? row.live(at) : 0; };
  auto s = row.s.fetch(pack, live(pack)), s_next = s;
  auto t = row.t.fetch(pack, live(pack)), t_next = t;
  if constexpr (!P::kOnChip) {
    s_next = row.s.fetch(pack + step, live(pack + step));
    t_next = row.t.fetch(pack + step, live(pack + step));
  }
  for (; pack - thread() % 32 < end; pack += step) {
    float x[kPack], y[kPack];
    row.s.unpack(s, x);
    row.t.unpack(t, y);
    // Memory is asked two packs ahead: 64 bytes of each thread are on their way while one pack is added up.
    const int ahead = pack + (P::kOnChip ? step : 2 * step), bits = live(ahead);
    if constexpr (!P::kOnChip) {
      s = s_next;
      t = t_next;
    }
    (P::kOnChip ? s : s_next) = row.s.fetch(ahead, bits);
    (P::kOnChip ? t : t_next) = row.t.fetch(ahead, bits);
    sums.add(points, x, y, int(label < 0 ? -1 : label - row.first_class(pack)));
  }
}

// A record of sums in double, in shared memory: pivots, whether damaged, and z, s, t of each point.
KD_HD int record_size(int K) { return 5 + 3 * K; }
KD_DEVICE double record_pivot(const double* record, const Point& p, bool of_t) {
  const double x = record[of_t ? (p.kind == OF_S ? 2 : 1) : p.kind == OF_T ? 3 : 0];
  return x > -INFINITY ? x : 0;
}

template <typename F> KD_DEVICE double over_warp(double x, F f) {
#pragma unroll
  for (int d = 16; d; d >>= 1) x = f(x, shuffle_xor(x, d));
  return x;
}
KD_DEVICE double warp_max(double x) { return over_warp(x, [](double a, double b) { return a > b ? a : b; }); }
KD_DEVICE double warp_sum(double x) { return over_warp(x, [](double a, double b) { return a + b; }); }

// The sums of a warp's threads, to `record`.
template <int K> KD_DEVICE void write_record(const Sums<K>& sums, const Point* points, int count, double* record) {
  const bool damaged = any(sums.damaged), writes = thread() % 32 == 0;
  if (writes) {
    record[0] = sums.s0; record[1] = sums.t0; record[2] = sums.t_at_s0; record[3] = sums.s_at_t0; record[4] = damaged;
  }
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (k >= count) break;
    const bool means = points[k].means;
    const double z = warp_sum(sums.z[k]), s = means ? warp_sum(sums.s[k]) : 0, t = means ? warp_sum(sums.t[k]) : 0;
    double* to = record + 5 + 3 * k;
    if (writes) { to[0] = z; to[1] = s; to[2] = t; }
  }
}

// One warp merges up to 32 records, `stride` doubles apart, into `total`, which may be the first of them.
KD_SLOW void merge_records(const double* records, int count, int stride, const Point* points, int K, double* total) {
  const int lane = thread() % 32;
  const double *mine = records + lane * stride;
  double head[5] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY, 0};
  if (lane < count)
    for (int i = 0; i < 5; ++i) head[i] = mine[i];
  const double s0 = warp_max(head[0]), t0 = warp_max(head[1]);
  const double t_at_s0 = warp_max(head[0] == s0 ? head[2] : -INFINITY);
  const double s_at_t0 = warp_max(head[1] == t0 ? head[3] : -INFINITY);
  const double all[5] = {s0, t0, t_at_s0, s_at_t0, warp_max(head[4])};
  for (int k = 0; k < K; ++k) {
    const Point p = points[k];
    double z = 0, s = 0, t = 0;
    if (lane < count && mine[5 + 3 * k] != 0) {
      const double ds = finite_or_0(head[0]) - finite_or_0(s0), dt = finite_or_0(head[1]) - finite_or_0(t0);
      const double f = exp2(double(p.b) * ds + double(p.a) * dt), z_mine = mine[5 + 3 * k];
      z = f * z_mine;
      s = scaled(f, mine[6 + 3 * k] + z_mine * (record_pivot(head, p, false) - record_pivot(all, p, false)));
      t = scaled(f, mine[7 + 3 * k] + z_mine * (record_pivot(head, p, true) - record_pivot(all, p, true)));
    }
    z = warp_sum(z); s = warp_sum(s); t = warp_sum(t);  // and every lane has read its record of this point
    if (lane == 0) { total[5 + 3 * k] = z; total[6 + 3 * k] = s; total[7 + 3 * k] = t; }
  }
  if (lane == 0)
    for (int i = 0; i < 5; ++i) total[i] = all[i];
  sync_warp();
}

}  // namespace kd::gpu
