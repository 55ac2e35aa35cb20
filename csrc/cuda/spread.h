// The gradient of a row, pack by pack: in float, and in double where classes or points ask for it.
#pragma once
#include "points.h"

namespace kd::gpu {

// A point in the gradient: exp2(b u + a v + shift) (c0 + c1 u + c2 v + c3 u^2 + c4 u v + c5 v^2), u and v relative to the
// row's maxima. Or, where every point is of one row's logits and has only c0, of the logits themselves, in one rounding:
// `shift` then stands for lam - b max, and what it was rounded by is in c0. CAREFUL: a point without a slope here.
struct alignas(16) Term {
  float b, a, shift, c[6];
  int kind;
  bool affine, second, twice;  // twice: the weights are the squares of the term's before

  KD_DEVICE static bool curved(const double* coef) { return coef[6] != 0 || coef[7] != 0 || coef[8] != 0; }
  KD_DEVICE static bool sloped(const double* coef) { return curved(coef) || coef[4] != 0 || coef[5] != 0; }
  KD_DEVICE static bool relative(const double* coef, int K) {
    bool found = false;
    for (int k = 0; k < K; ++k, coef += kCoefs) found |= sloped(coef) || ((coef[1] != 0) == (coef[2] != 0));
    return found;
  }
  KD_DEVICE static bool flat(const double* coef) { return !sloped(coef) && coef[3] == 0; }
  KD_DEVICE static double exponent(const double* coefs, int K, int k) {
    const double *coef = coefs + k * kCoefs, *last = coefs + K * kCoefs;
    const double b = float(coef[1] * kLog2e), a = float(coef[2] * kLog2e);
    return coef[0] * kLog2e - (relative(coefs, K) ? 0 : scaled(b, last[1]) + scaled(a, last[2]));
  }
  // Of point k, from the coefficients of all K. `points`, if there are any, are in the order of the terms, this one's last.
  KD_DEVICE Term(const double* coefs, int K, int k, double g, const Point* points = nullptr, int place = 0) {
    const double* coef = coefs + k * kCoefs;
    b = float(coef[1] * kLog2e);
    a = float(coef[2] * kLog2e);
    second = curved(coef);
    affine = sloped(coef);
    kind = flat(coef) ? CAREFUL : b != 0 && a == 0 ? OF_S : a != 0 && b == 0 ? OF_T : OF_BOTH;
    int first = place;  // whose exponent this one is a multiple of
    while (points && points[first].twice && !flat(coefs + points[first - 1].index * kCoefs)) --first;
    twice = first < place;
    const double exact = exponent(coefs, K, k);
    shift = float(twice ? exponent(coefs, K, points[first].index) : exact);
    const double f = coef[0] > -INFINITY ? g * exp2(exact - double(shift) * (1 << (place - first))) : g;
    for (int i = 0; i < 6; ++i) c[i] = float(coef[3 + i] * f);
  }
};

// What a row's packs need to know. `doubles`: all of it in double. `heavy`: a class may have most of a point's weight; the
// points can cancel there, and the classes at the maxima are done in double. `odd`: there may be logits of -inf, or so low
// that their distance to the maximum matters and is not held in float.
struct Slope {
  const double* coef;
  const Term* terms;
  int K;
  double g;
  float s_max, t_max;
  bool nothing, damaged, heavy, doubles, odd, relative;

  KD_DEVICE Slope(const double* coef, const Term* terms, int K, double g, bool narrow)
      : coef(coef), terms(terms), K(K), g(g) {
    const double* last = coef + K * kCoefs;
    s_max = float(last[1]);
    t_max = float(last[2]);
    nothing = last[3] == 0 || g == 0;
    damaged = last[0] != last[0];
    odd = last[5] != 0;
    heavy = false;
    relative = Term::relative(coef, K);
    doubles = narrow;
    for (int k = 0; k < K; ++k) {
      const double* c = coef + k * kCoefs;
      heavy |= c[0] > -0.7;  // log(1/2)
      doubles |= c[1] < 0 || c[2] < 0 || (c[1] != 0 && c[2] != 0 && c[0] > 4);
      doubles |= fabs(c[1] * s_max) > 65536 || fabs(c[2] * t_max) > 65536;
      doubles |= c[0] > 32;  // the label, which the point leaves out, is so far above its classes
      // z-scores of logits so large that kLowest is no distance.
      for (int side = 1; side <= 2; ++side) doubles |= relative && c[side] != 0 && fabs(c[side] * kLowest) < 1000;
      // The sums of such points do not show it; and slopes grow without end where no weight falls.
      odd |= Term::curved(c) || (c[1] == 0 && c[2] == 0 && Term::sloped(c));
    }
  }
};

KD_SLOW float slope_in_double(const double* coef, int K, double g, float s, float t, float s_max, float t_max,
                              bool label) {
  if (s == -kInf && t == -kInf) return 0;
  const Deviation exact{double(s) - s_max, double(t) - t_max};
  return float(g * slope_at(coef, K, exact, exact, label));
}

// One point's part of the slopes of N classes, in float; u, v are deviations or the logits themselves, w the weights of
// the term before and then of this one.
template <int N>
KD_DEVICE void add_term(const Term& p, const float (&u)[N], const float (&v)[N], float (&w)[N], float (&d)[N]) {
  if (p.twice) {
#pragma unroll
    for (int e = 0; e < N; ++e) w[e] *= w[e];
  } else if (p.kind == OF_S) {
#pragma unroll
    for (int e = 0; e < N; ++e) w[e] = fast_exp2(fmaf(p.b, u[e], p.shift));
  } else if (p.kind == OF_T) {
#pragma unroll
    for (int e = 0; e < N; ++e) w[e] = fast_exp2(fmaf(p.a, v[e], p.shift));
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e) w[e] = fast_exp2(fmaf(p.b, u[e], fmaf(p.a, v[e], p.shift)));
  }
  if (!p.affine) {
#pragma unroll
    for (int e = 0; e < N; ++e) d[e] = fmaf(w[e], p.c[0], d[e]);
    return;
  }
#pragma unroll
  for (int e = 0; e < N; ++e) {
    float h = fmaf(p.c[1], u[e], fmaf(p.c[2], v[e], p.c[0]));
    if (p.second) h += p.c[3] * u[e] * u[e] + p.c[4] * u[e] * v[e] + p.c[5] * v[e] * v[e];
    d[e] = fmaf(w[e], h, d[e]);
  }
}

// d of M packs, `live` of their classes in the row; but for the label's own slope, which Redo sees to. `odd`: there may be
// logits of -inf; `search` for the classes at the maxima.
template <typename X, typename Y, int N>
KD_DEVICE void slopes(const Slope& row, const X& xs, const Y& ys, int live, bool odd, bool search, float (&d)[N]) {
  uint32_t again = row.doubles ? ~0u : 0;
#pragma unroll
  for (int e = 0; e < N; ++e) d[e] = 0;
  if (!row.doubles) {
    float u[N], v[N], w[N];
#pragma unroll
    for (int e = 0; e < N; ++e) {
      u[e] = xs[e];
      v[e] = ys[e];
    }
    if (row.relative) {  // slopes, of which the largest finite logits would make infinite ones
#pragma unroll
      for (int e = 0; e < N; ++e) {
        u[e] = fmaxf(u[e] - row.s_max, kLowest);
        v[e] = fmaxf(v[e] - row.t_max, kLowest);
      }
    }
    for (int k = 0; k < row.K; ++k) {
      const Term& p = row.terms[k];
      if (p.kind != CAREFUL) add_term(p, u, v, w, d);
    }
  }
  if (odd || search) {
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const float x = xs[e], y = ys[e];
      const bool low = (x > -kInf && x - row.s_max <= kLowest) || (y > -kInf && y - row.t_max <= kLowest);
      if (!(fabsf(d[e]) < kHuge) || low || (search && (x == row.s_max || y == row.t_max))) again |= 1u << e;
    }
  }
#pragma unroll 1
  for (again &= uint32_t(live) & (1ull << N) - 1; again; again &= again - 1) {
    int e = 0;
    while (!(again >> e & 1)) ++e;
    put(d, e, slope_in_double(row.coef, row.K, row.g, xs.at(e), ys.at(e), row.s_max, row.t_max, false));
  }
  if (odd) {
#pragma unroll
    for (int e = 0; e < N; ++e) d[e] = live >> e & 1 && !(xs[e] == -kInf && ys[e] == -kInf) ? d[e] : 0;
  }
}

// A gradient's row in the packs of its logits; classes from the vocabulary on get 0.
template <typename O> struct Writer {
  O* base;  // position 0 of pack 0
  int head, width;
  bool wide, accumulate;

  KD_DEVICE Writer(const Output& out, int64_t n, int head)
      : base(static_cast<O*>(out.data) + n * out.width - head), head(head), width(int(out.width)), wide(aligned(base)),
        accumulate(out.accumulate) {}
  KD_DEVICE int packs() const { return (width + head + kPack - 1) / kPack; }
  // A pack that is `whole`, or as much of it as there is.
  KD_DEVICE void store(int pack, const float* d, bool whole) const {
    O* to = base + int64_t(pack) * kPack;
    if (!(whole && wide) || accumulate) {
      for (int e = 0; e < kPack; ++e) {
        const int at = pack * kPack - head + e;
        if (at >= 0 && at < width) narrow(accumulate ? d[e] + widen(to[e]) : d[e], to + e);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < int(kPack * sizeof(O) / 16); ++i) {
      Bytes16 part;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if constexpr (sizeof(O) == 4) part.word[j] = float_bits(d[i * 4 + j]);
        else part.word[j] = narrow2(d[j * 2], d[j * 2 + 1], static_cast<O*>(nullptr));
      }
      store16(reinterpret_cast<Bytes16*>(to) + i, part);
    }
  }
};

// Packs [first, end), M at a time, the last ones first: they are the ones a sweep has left in the cache.
template <int M, typename P, typename O>
KD_DEVICE void spread_packs(const P& row, const Slope& slope, const Writer<O>& out, int first, int end, bool search) {
  const int step = threads();
  if (slope.nothing || slope.damaged) {
    float d[kPack];
    for (int pack = end - 1 - thread(); pack >= first; pack -= step) {
#pragma unroll
      for (int e = 0; e < kPack; ++e)
        d[e] = !slope.nothing && row.first_class(pack) + e < row.vocab ? bits_float(0x7fc00000) : 0;
      out.store(pack, d, false);
    }
    return;
  }
  using S = typename P::SReader;
  using T = typename P::TReader;
  int from, to;
  row.whole(first, end, &from, &to);
  int pack = end - 1 - thread();
  const int left = pack - to;  // whole packs begin below
  if (left >= 0) pack -= (left / step + 1) * step;
  const int begin = pack;
  const auto all = [&](int at) { return at - (M - 1) * step >= from; };
  pack = row.template stream<M>(pack, -step, true, all, [&](int at, const auto& x, const auto& y) {
    float d[M * kPack];
    slopes(slope, x, y, -1, slope.odd, search, d);
#pragma unroll
    for (int i = 0; i < M; ++i) out.store(at - i * step, d + i * kPack, true);
  });
  for (int at = end - 1 - thread(); at >= first; at -= step) {  // what is left
    if (at == begin) at = pack;
    if (at < first) break;
    const int live = row.live(at);
    float d[kPack];
    const Packs<S, 1> x1{{row.s.fetch(at, live, true)}};
    const Packs<T, 1> y1{{row.t.fetch(at, live, true)}};
    slopes(slope, x1, y1, live, slope.odd || live != 255, search, d);
    out.store(at, d, live == 255);
  }
}

}  // namespace kd::gpu
