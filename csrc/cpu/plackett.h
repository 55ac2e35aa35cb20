// The Plackett-Luce likelihood of the teacher's order under the student's scores.
#pragma once
#include "lapsum.h"
#include "live.h"

namespace kd {

template <typename R> struct PlackettScratch {
  Live<R> live;
  Order<R> order;
  std::vector<R> power, pivot_of, slope, out;
  std::vector<double> pivot, denominator, weight;
};

// weights (of the runs of equal teacher logits, each entry's): softmax of the teacher, or 1 / n.
template <typename R>
void plackett_weights(const Pair<R>& z, bool teacher, double inverse_T, PlackettScratch<R>& w) {
  w.weight.clear();
  double total = 0;
  w.order.runs([&](int64_t first, int64_t end) {
    const double top = z.t[w.order.at(z.n - 1)];
    w.weight.push_back(teacher ? std::exp((z.t[w.order.at(first)] - top) * inverse_T) : 1);
    total += double(end - first) * w.weight.back();
  });
  for (double& x : w.weight) x /= total;
}

// -sum_i w_i (s_i - log D_i), D_i the sum of e^s over the classes ranked no higher than i (Breslow's ties).
// D is kept relative to the largest score so far: at least 1, whatever the scores are. g times the gradient by s goes
// to `out`.
template <typename R>
double plackett_luce(const Pair<R>& z, bool teacher, double inverse_T, double inverse_teacher_T, double g,
                     const RowOut& out, PlackettScratch<R>& w) {
  const int64_t n = z.n;
  if (n < 2) {
    if (out.to) out.fill(0);
    return 1;
  }
  w.order.sort(z.t, n);
  plackett_weights(z, teacher, inverse_teacher_T, w);
  w.power.resize(n);
  w.pivot.clear();
  w.denominator.clear();
  double top = -INFINITY;
  w.order.runs([&](int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) top = std::max(top, z.s[w.order.at(i)] * inverse_T);
    for (int64_t i = first; i < end; ++i) w.power[i] = R((z.s[w.order.at(i)] * inverse_T - top) * kLog2e);
    w.pivot.push_back(top);
  });
  exp2_in_place(w.power.data(), n);
  double value = 0, D = 0;
  size_t b = 0;
  w.order.runs([&](int64_t first, int64_t end) {
    if (b && w.pivot[b] > w.pivot[b - 1]) D *= std::exp(w.pivot[b - 1] - w.pivot[b]);
    double scores = 0;
    for (int64_t i = first; i < end; ++i) { D += w.power[i]; scores += z.s[w.order.at(i)] * inverse_T - w.pivot[b]; }
    w.denominator.push_back(D);
    value += w.weight[b] * (double(end - first) * std::log(D) - scores);
    ++b;
  });
  if (out.to) plackett_gradient(z, inverse_T * g, out, w);
  return value;
}

// dL / ds_i = e^{s_i} sum over the runs b from i's on of W_b / D_b, minus w_i.
template <typename R>
void plackett_gradient(const Pair<R>& z, double scale, const RowOut& out, PlackettScratch<R>& w) {
  w.slope.resize(z.n);
  double C = 0;
  int64_t end = z.n;
  for (size_t b = w.weight.size(); b-- > 0;) {
    int64_t first = end;
    if (b + 1 < w.weight.size() && w.pivot[b + 1] > w.pivot[b]) C *= std::exp(w.pivot[b] - w.pivot[b + 1]);
    while (first > 0 && w.order.same(first - 1, end - 1)) --first;
    C += double(end - first) * w.weight[b] / w.denominator[b];
    for (int64_t i = first; i < end; ++i) w.slope[w.order.at(i)] = R(scale * (w.power[i] * C - w.weight[b]));
    end = first;
  }
  out.write(z, w.out, [&](int64_t i) { return w.slope[i]; });
}

}  // namespace kd
