// Pearson's correlation of two rows, of their logits or of their probabilities.
#pragma once
#include "lapsum.h"
#include "live.h"

namespace kd {

template <typename R> struct PearsonScratch {
  Live<R> live;
  std::vector<R> u, v, out;
};

// The row relative to its mean: the logits minus theirs, or V q_i - 1 for the probabilities q of x / T, as
// expm1(x_i / T - L + log V). Squares of q minus 1 / V would cancel. False for a constant row.
template <typename R> bool deviations(const R* x, int64_t n, bool probabilities, double inverse_T, std::vector<R>& u) {
  double low = INFINITY, high = -INFINITY, sum = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
    sum += x[i];
  }
  u.resize(n);
  if (n < 2 || !(high > low)) return false;
  if (!probabilities) {
    const double mean = sum / double(n);
    for (int64_t i = 0; i < n; ++i) u[i] = R(x[i] - mean);
    return true;
  }
  for (int64_t i = 0; i < n; ++i) u[i] = R((x[i] - high) * inverse_T * kLog2e);
  exp2_in_place(u.data(), n);
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += u[i];
  const double scale = double(n) / total, shift = std::log(scale), near = sizeof(R) == 4 ? 0.35 : 0.1;
  for (int64_t i = 0; i < n; ++i) {
    const double d = (x[i] - high) * inverse_T + shift;  // log(V q_i)
    if (std::fabs(d) < near) {
      double series = 1;
      for (int k = 11; k > 1; --k) series = 1 + d * (1. / k) * series;
      u[i] = R(d * series);
    } else {
      u[i] = R(u[i] * scale - 1);
    }
  }
  return true;
}

// 1 - rho; g times its gradient by the row u (the teacher's, if `side` is 1) goes to `out`.
template <typename R>
double pearson(const Pair<R>& z, bool probabilities, double inverse_T, double inverse_teacher_T, int side, double g,
               const RowOut& out, PearsonScratch<R>& w) {
  const bool s = deviations(z.s, z.n, probabilities, inverse_T, w.u);
  const bool t = deviations(z.t, z.n, probabilities, inverse_teacher_T, w.v);
  double u_mean = 0, v_mean = 0, uu = 0, uv = 0, vv = 0;
  const R *u = w.u.data(), *v = w.v.data();
  if (s && t) {
#pragma omp simd reduction(+ : u_mean, v_mean)
    for (int64_t i = 0; i < z.n; ++i) { u_mean += u[i]; v_mean += v[i]; }
    u_mean /= double(z.n);  // what rounding has left
    v_mean /= double(z.n);
#pragma omp simd reduction(+ : uu, uv, vv)
    for (int64_t i = 0; i < z.n; ++i) {
      const double a = u[i] - u_mean, b = v[i] - v_mean;
      uu += a * a; uv += a * b; vv += b * b;
    }
  }
  const bool constant = !(uu > 0 && vv > 0);
  const double rho = constant ? 0 : uv / std::sqrt(uu) / std::sqrt(vv);
  if (!out.to) return 1 - rho;
  if (side) { std::swap(u, v); std::swap(u_mean, v_mean); std::swap(uu, vv); }
  const double scale = probabilities ? g * (side ? inverse_teacher_T : inverse_T) : g;
  const double by_u = constant ? 0 : scale * rho / uu, by_v = constant ? 0 : -scale / std::sqrt(uu) / std::sqrt(vv);
  out.write(z, w.out, [&](int64_t i) {
    const double slope = by_u * (u[i] - u_mean) + by_v * (v[i] - v_mean);
    return probabilities ? slope * (1 + double(u[i])) : slope;  // the softmax's own term is 0: rho knows no scale
  });
  return 1 - rho;
}

}  // namespace kd
