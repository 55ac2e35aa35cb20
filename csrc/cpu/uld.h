// Distance of two rows of probabilities, each sorted.
#pragma once
#include "lapsum.h"
#include "live.h"

namespace kd {

template <typename R> struct UldScratch {
  Live<R> live;
  Order<R> order[2];
  std::vector<R> p[2], slope, out;
};

// Probabilities of the live entries of a row; false if there are none.
template <typename R> bool softmax(const R* x, int64_t n, double scale, std::vector<R>& p) {
  p.resize(n);
  R top = -std::numeric_limits<R>::infinity();
  for (int64_t i = 0; i < n; ++i) top = std::max(top, x[i]);
  if (!(top > -std::numeric_limits<R>::infinity())) return false;
  for (int64_t i = 0; i < n; ++i) p[i] = R((double(x[i]) - double(top)) * scale * kLog2e);
  exp2_in_place(p.data(), n);
  const double total = tiles<R>().columns.sum(p.data(), int(n));
  for (int64_t i = 0; i < n; ++i) p[i] = R(p[i] / total);
  return true;
}

// g times the gradient by the logits of `side` goes to `out`. Of equal logits each gets the mean of their signs.
template <typename R>
double uld(const Pair<R>& z, const double* scale, int side, double g, const RowOut& out, UldScratch<R>& w) {
  const R* logits[2] = {z.s, z.t};
  bool bad = z.n == 0;
  for (int k = 0; k < 2 && !bad; ++k) bad = !softmax(logits[k], z.n, scale[k], w.p[k]);
  if (bad) {
    if (out.to) out.fill(NAN);
    return NAN;
  }
  for (int k = 0; k < 2; ++k) w.order[k].sort(logits[k], z.n);
  const Order<R>&own = w.order[side], &other = w.order[1 - side];
  const std::vector<R>&p = w.p[side], &q = w.p[1 - side];
  const auto gap = [&](int64_t r) { return double(p[own.at(r)]) - double(q[other.at(r)]); };
  double value = 0, gaps[kTile];
  for (int64_t first = 0; first < z.n; first += kTile) {
    const int count = int(std::min<int64_t>(kTile, z.n - first));
    for (int i = 0; i < count; ++i) gaps[i] = std::fabs(gap(first + i));
    value += tiles<double>().columns.sum(gaps, count);
  }
  if (!out.to) return value;
  double mean = 0;
  w.slope.resize(z.n);
  own.runs([&](int64_t first, int64_t end) {
    double signs = 0;
    for (int64_t r = first; r < end; ++r) signs += double(gap(r) > 0) - double(gap(r) < 0);
    signs /= double(end - first);
    for (int64_t r = first; r < end; ++r) w.slope[own.at(r)] = R(signs);
  });
  for (int64_t i = 0; i < z.n; ++i) mean += double(p[i]) * w.slope[i];
  out.write(z, w.out, [&](int64_t i) { return g * scale[side] * p[i] * (w.slope[i] - mean); });
  return value;
}

}  // namespace kd
