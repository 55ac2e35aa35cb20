// Soft ranks of numbers that stand in ascending bins, the loss 1 - rho, and its gradient as a line in each bin.
#pragma once
#include <cmath>
#include <vector>

#include "../softrank.h"
#include "parallel.h"

namespace kd {

// y becomes 2^y; y below the smallest exponent gives 0.
template <typename R> void exp2_in_place(R* y, int64_t n) {
  constexpr R least = sizeof(R) == 4 ? R(-1e6) : R(-1e9);
  for (int64_t i = 0; i < n; i += kTile) {
    const int count = int(std::min<int64_t>(kTile, n - i));
    for (int j = 0; j < count; ++j) y[i + j] = y[i + j] > least ? y[i + j] : least;  // -inf is not taken
    tiles<R>().exp2(y + i, count, y + i);
  }
}

// LapSum [Struski et al. 2025]: R_i = sum_j F((x_i - x_j) / a), F the Laplace distribution function, a = tau std(x).
// Here in units of n: M bins of x (ascending), masses c / n, and S, the sum over a bin of the teacher's ranks.
class LapSum {
 public:
  std::vector<double> x, mass, ranks;  // a caller's: position, count, sum of doubled centred ranks of each bin
  std::vector<Line> line;              // out
  double own_share = 0;                // of the kernel's sum at an entry, what its own bin contributes: the mean

  void clear() { x.clear(); mass.clear(); ranks.clear(); }
  void add(double value, double count, double sum) {
    x.push_back(value);
    mass.push_back(count);
    ranks.push_back(sum);
  }

  // n entries, teacher's squares = the sum of its squared doubled centred ranks; g scales the gradient.
  double loss(double n, double tau, double mean, double variance, double squares, double g, bool gradient) {
    const int64_t M = int64_t(x.size());
    line.assign(gradient ? M : 0, Line{0, 0});
    if (n < 2 || M < 2 || !(variance > 0) || !(squares > 0)) return 1;
    const double a = tau * std::sqrt(variance);
    for (int64_t m = 0; m < M; ++m) { mass[m] /= n; ranks[m] /= 2 * n * n; }
    soft_ranks(a);
    double own = 0, joint = 0;
    own_share = 0;
    for (int64_t m = 0; m < M; ++m) {
      own += mass[m] * R_[m] * R_[m];
      joint += R_[m] * ranks[m];
      own_share += mass[m] * mass[m] / K_[m];
    }
    if (!(own > 0)) return 1;
    const Correlation z(n, a, own, joint, squares);
    if (gradient) lines(z, n, mean, variance, g);
    return 1 - z.rho;
  }

 private:
  // R: centred soft ranks; K: sum of the kernel e^(-|x_i - x_j| / a), both over n. The sums from below and from above
  // take turns: each of their steps waits for the one before.
  void soft_ranks(double a) {
    const int64_t M = int64_t(x.size());
    for (auto* v : {&decay_, &R_, &K_, &G_, &above_}) v->resize(M);
    decay_[0] = 0;
    for (int64_t m = 1; m < M; ++m) decay_[m] = (x[m - 1] - x[m]) / a * kLog2e;
    exp2_in_place(decay_.data() + 1, M - 1);
    double below = 0, above = 0, count = 0, beyond = 0;
    for (int64_t m = 0, k = M - 1; m < M; ++m, --k) {
      below *= decay_[m];
      R_[m] = count - below;
      K_[m] = below;
      count += mass[m];
      below += mass[m];
      above_[k] = above;
      G_[k] = beyond - above;
      beyond += mass[k];
      above = (above + mass[k]) * decay_[k];
    }
    for (int64_t m = 0; m < M; ++m) {
      R_[m] = soft_rank(R_[m], G_[m]);
      K_[m] += mass[m] + above_[m];
    }
  }

  void lines(const Correlation& z, double n, double mean, double variance, double g) {
    const int64_t M = int64_t(x.size());
    slope_.resize(M);
    for (int64_t m = 0; m < M; ++m) slope_[m] = z.slope(mass[m], ranks[m], R_[m]);
    double below = 0, above = 0, radial = 0;
    for (int64_t m = 0, k = M - 1; m < M; ++m, --k) {
      below *= decay_[m];
      G_[m] = below;
      below += slope_[m];
      above_[k] = above;
      above = (above + slope_[k]) * decay_[k];
    }
    for (int64_t m = 0; m < M; ++m) {
      line[m] = z.line(R_[m], K_[m], G_[m] + slope_[m] + above_[m]);
      radial += (x[m] - mean) * (line[m].slope * ranks[m] + mass[m] * line[m].offset);
    }
    for (int64_t m = 0; m < M; ++m) line[m] = finished(line[m], n, g, radial / variance, x[m] - mean);
  }

  std::vector<double> decay_, R_, K_, G_, above_, slope_;
};

}  // namespace kd
