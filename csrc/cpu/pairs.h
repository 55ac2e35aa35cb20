// Kendall's loss: pairs of classes, softened by tanh, all of them or those that cyclic shifts bring together.
#pragma once
#include "lapsum.h"
#include "live.h"

namespace kd {

template <typename R> struct PairsScratch {
  Live<R> live;
  std::vector<double> gradient;
  std::vector<R> out;
};

// Sums of sgn(t_i - t_j) tanh(d), d = (s_i - s_j) / a, and of its slopes by the s_i, times a.
template <typename R> class PairSum {
 public:
  PairSum(const Pair<R>& z, double a, std::vector<double>& gradient) : z_(z), scale_(2 * kLog2e / a), to_(gradient) {}
  double total = 0;

  // The pairs (i, i + by) for i in [first, end).
  void shifted(int64_t first, int64_t end, int64_t by) {
    for (; first < end; first += kTile) tile(first, std::min<int64_t>(kTile, end - first), by);
  }

 private:
  void tile(int64_t first, int64_t count, int64_t by) {
    const R *s = z_.s + first, *t = z_.t + first;
    for (int64_t i = 0; i < count; ++i) {
      const double y = (double(s[i]) - double(s[i + by])) * scale_;
      e_[i] = R(y > 80 ? 80 : y < -80 ? -80 : y);
    }
    exp2_in_place(e_, count);  // e^{2 d}: tanh d = 1 - 2 / (1 + e), its slope 4 e / (1 + e)^2
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) {
      const double sign = double(t[i] > t[i + by]) - double(t[i] < t[i + by]), r = 1 / (1 + double(e_[i]));
      sum += sign * (1 - 2 * r);
      slope_[i] = sign * 4 * r * (1 - r);
    }
    total += sum;
    double *here = to_.data() + first, *there = here + by;
    for (int64_t i = 0; i < count; ++i) here[i] += slope_[i];
    for (int64_t i = 0; i < count; ++i) there[i] -= slope_[i];
  }

  const Pair<R>& z_;
  double scale_;
  std::vector<double>& to_;
  R e_[kTile];
  double slope_[kTile];
};

// 1 - the mean over pairs. shifts: K positions in [0, 1), each a shift of 1 to n - 1 places; K = 0 takes every pair.
template <typename R>
double kendall(const Pair<R>& z, double tau, const double* shifts, int64_t K, double g, const RowOut& out,
               PairsScratch<R>& w) {
  const int64_t n = z.n;
  double mean = 0, variance = 0, high = -INFINITY, low = INFINITY;
  for (int64_t i = 0; i < n; ++i) {
    mean += z.s[i];
    high = std::max<double>(high, z.s[i]);
    low = std::min<double>(low, z.s[i]);
  }
  mean /= double(n);
  for (int64_t i = 0; i < n; ++i) variance += (z.s[i] - mean) * (z.s[i] - mean);
  variance /= double(n);
  if (n < 2 || !(high > low) || !(variance > 0)) {
    if (out.to) out.fill(0);
    return 1;
  }
  const double a = tau * std::sqrt(variance);
  w.gradient.assign(n, 0);
  PairSum<R> sum(z, a, w.gradient);
  for (int64_t k = 0; k < K; ++k) {
    const int64_t by = 1 + std::min<int64_t>(n - 2, int64_t(shifts[k] * double(n - 1)));
    sum.shifted(0, n - by, by);
    sum.shifted(n - by, n, by - n);
  }
  for (int64_t by = 1; K == 0 && by < n; ++by) sum.shifted(0, n - by, by);
  const double pairs = K ? double(K) * double(n) : double(n) * double(n - 1) / 2;
  if (out.to) {
    double radial = 0;  // through a, which follows the deviation
    for (int64_t i = 0; i < n; ++i) radial += (z.s[i] - mean) * w.gradient[i];
    radial /= double(n) * variance;
    out.write(z, w.out, [&](int64_t i) {
      return -g / (pairs * a) * (w.gradient[i] - radial * (z.s[i] - mean));
    });
  }
  return 1 - sum.total / pairs;
}

}  // namespace kd
