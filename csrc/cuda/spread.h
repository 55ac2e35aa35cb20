// The gradient of a row, pack by pack: in float, and in double where classes or points ask for it.
#pragma once
#include "sums.h"

namespace kd::gpu {

// A point in the gradient: exp2(b u + a v + lam) (c0 + c1 u + c2 v + c3 u^2 + c4 u v + c5 v^2), u and v relative to the
// row's maxima. CAREFUL stands for a point without a slope here.
struct Term {
  float b, a, lam, c[6];
  int kind;
  bool affine, second, exclude;

  KD_DEVICE Term(const double* coef, double g) {
    b = float(coef[1] * kLog2e);
    a = float(coef[2] * kLog2e);
    lam = float(coef[0] * kLog2e);
    for (int i = 0; i < 6; ++i) c[i] = float(coef[3 + i] * g);
    second = c[3] != 0 || c[4] != 0 || c[5] != 0;
    affine = second || c[1] != 0 || c[2] != 0;
    exclude = coef[9] != 0;
    kind = !affine && c[0] == 0 ? CAREFUL : b != 0 && a == 0 ? OF_S : a != 0 && b == 0 ? OF_T : OF_BOTH;
  }
};

// What a row's packs need to know. `doubles`: all of it in double. `heavy`: a class may have most of a point's weight;
// the points can cancel there, and the classes at the maxima are done in double.
struct Slope {
  const double* coef;
  const Term* terms;
  int K;
  double g;
  int label;  // a class of the row, or out of reach
  float s_max, t_max, at_label;
  bool nothing, damaged, heavy, doubles;

  KD_DEVICE Slope(const double* coef, const Term* terms, int K, double g, int64_t label, bool narrow)
      : coef(coef), terms(terms), K(K), g(g), label(label < 0 || label > 0x7fffffff - kPack ? 0x7fffffff : int(label)) {
    const double* last = coef + K * kCoefs;
    s_max = float(last[1]);
    t_max = float(last[2]);
    at_label = float(last[0] * g);
    nothing = last[3] == 0 || g == 0;
    damaged = last[0] != last[0];
    heavy = false;
    doubles = narrow;
    for (int k = 0; k < K; ++k) {
      const double* c = coef + k * kCoefs;
      heavy |= c[0] > -0.7;  // log(1/2)
      doubles |= c[1] < 0 || c[2] < 0 || (c[1] != 0 && c[2] != 0 && c[0] > 4);
    }
  }
};

KD_SLOW float slope_in_double(const double* coef, int K, double g, float s, float t, float s_max, float t_max,
                              bool label) {
  if (s == -kInf && t == -kInf) return 0;
  const Deviation exact{double(s) - s_max, double(t) - t_max};
  return float(g * slope_at(coef, K, exact, exact, label));
}

// d of eight classes, `live` of them in the row; element `at` is the label, if it is one of them.
KD_DEVICE void slopes(const Slope& row, const float (&x)[kPack], const float (&y)[kPack], int live, int at,
                      float (&d)[kPack]) {
  int again = row.doubles ? 255 : 0;
#pragma unroll
  for (int e = 0; e < kPack; ++e) d[e] = 0;
  if (!row.doubles) {
    for (int k = 0; k < row.K; ++k) {
      const Term p = row.terms[k];
      if (p.kind == CAREFUL) continue;
      float w[kPack];
      exponents(p, row.s_max, row.t_max, p.lam, x, y, w);
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        w[e] = fast_exp2(w[e]);
        if (p.exclude && e == at) w[e] = 0;
        if (!p.affine) d[e] = fmaf(w[e], p.c[0], d[e]);
      }
      if (!p.affine) continue;
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        const float u = x[e] - row.s_max, v = y[e] - row.t_max;
        float h = fmaf(p.c[1], u, fmaf(p.c[2], v, p.c[0]));
        if (p.second) h += p.c[3] * u * u + p.c[4] * u * v + p.c[5] * v * v;
        d[e] = fmaf(w[e], h, d[e]);
      }
    }
    float check = 0;
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      if (e == at) d[e] += row.at_label;
      check += d[e];
      if (row.heavy && (x[e] == row.s_max || y[e] == row.t_max)) again |= 1 << e;
    }
    if (!(fabsf(check) < kInf)) again = 255;  // infinite logits: a weight of 0 met them, or what they make is infinite
  }
  for (again &= live; again; again &= again - 1) {
    int e = 0;
    while (!(again >> e & 1)) ++e;
    put(d, e, slope_in_double(row.coef, row.K, row.g, pick(x, e), pick(y, e), row.s_max, row.t_max, e == at));
  }
  if (live != 255) {
#pragma unroll
    for (int e = 0; e < kPack; ++e) d[e] = live >> e & 1 ? d[e] : 0;
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
  KD_DEVICE void store(int pack, float (&d)[kPack]) const {
    const int first = pack * kPack - head;
    const bool whole = first >= 0 && first + kPack <= width;
    O* to = base + int64_t(pack) * kPack;
    union { Bytes16 part[kPack * sizeof(O) / 16]; O x[kPack]; } all;
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      const bool inside = whole || (first + e >= 0 && first + e < width);
      if (accumulate && inside) d[e] += widen(to[e]);
      narrow(d[e], &all.x[e]);
      if (!(whole && wide) && inside) to[e] = all.x[e];
    }
    if (!(whole && wide)) return;
#pragma unroll
    for (int i = 0; i < int(sizeof all / 16); ++i) store16(reinterpret_cast<Bytes16*>(to) + i, all.part[i]);
  }
};

// Packs [first, end), the last ones first: they are the ones a sweep has left in the cache.
template <typename P, typename O>
KD_DEVICE void spread_packs(const P& row, const Slope& slope, const Writer<O>& out, int first, int end) {
  float d[kPack];
  if (slope.nothing || slope.damaged) {
    for (int pack = end - 1 - thread(); pack >= first; pack -= threads()) {
#pragma unroll
      for (int e = 0; e < kPack; ++e)
        d[e] = !slope.nothing && row.first_class(pack) + e < row.vocab ? bits_float(0x7fc00000) : 0;
      out.store(pack, d);
    }
    return;
  }
  int pack = end - 1 - thread();
  if (pack < first) return;
  int live = row.live(pack);
  auto s = row.s.fetch(pack, live, true);
  auto t = row.t.fetch(pack, live, true);
  for (; pack >= first; pack -= threads()) {
    float x[kPack], y[kPack];
    row.s.unpack(s, x);
    row.t.unpack(t, y);
    const int now = live, next = pack - threads();
    if (next >= first) {
      live = row.live(next);
      s = row.s.fetch(next, live, true);
      t = row.t.fetch(next, live, true);
    }
    slopes(slope, x, y, now, slope.label - row.first_class(pack), d);
    out.store(pack, d);
  }
}

}  // namespace kd::gpu
