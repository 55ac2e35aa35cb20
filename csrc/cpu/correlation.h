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
  R low = INFINITY, high = -INFINITY;
#pragma omp simd reduction(min : low) reduction(max : high)
  for (int64_t i = 0; i < n; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
  }
  u.resize(n);
  if (n < 2 || !(high > low)) return false;
  if (!probabilities) {
    double mean = 0;
#pragma omp simd reduction(+ : mean)
    for (int64_t i = 0; i < n; ++i) mean += x[i];
    mean /= double(n);
    for (int64_t i = 0; i < n; ++i) u[i] = R(x[i] - mean);
    return true;
  }
  const R unit = R(inverse_T * kLog2e);
  for (int64_t i = 0; i < n; ++i) u[i] = (x[i] - high) * unit;
  exp2_in_place(u.data(), n);
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += u[i];
  const double scale = double(n) / total, shift = std::log(scale);
  constexpr bool single = sizeof(R) == 4;
  constexpr R near = single ? R(0.25) : R(0.1);
  constexpr R c[] = {R(1), R(1. / 2), R(1. / 6), R(1. / 24), R(1. / 120), R(1. / 720), R(1. / 5040), R(1. / 40320),
                     R(1. / 362880), R(1. / 3628800), R(1. / 39916800)};  // of expm1(d) / d
  const R factor = R(scale);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const R d = R((double(x[i]) - high) * inverse_T + shift);  // log(V q_i)
    R series = c[single ? 6 : 10];
#pragma GCC unroll 12
    for (int k = single ? 5 : 9; k >= 0; --k) series = series * d + c[k];
    u[i] = std::fabs(d) < near ? d * series : u[i] * factor - 1;
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
  const double noise = probabilities ? 1e-26 * double(z.n) : 0;  // what probabilities that are equal differ by
  const bool constant = !(uu > noise && vv > noise);
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
