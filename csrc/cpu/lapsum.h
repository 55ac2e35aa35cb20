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
  std::vector<Line> line;  // out
  double own_share = 0;    // of the kernel's sum at an entry, what its own bin contributes: the mean

  // Bins of n entries together, and the position, count and sum of the doubled centred ranks of each.
  void resize(int64_t bins, int64_t n) {
    n_ = double(n);
    for (auto* v : {&x_, &mass_, &ranks_}) v->resize(bins);
  }
  void set(int64_t m, double x, double count, double sum) {
    x_[m] = x;
    mass_[m] = count / n_;
    ranks_[m] = sum / (2 * n_ * n_);
  }
  MeanVariance moments() { return tiles<double>().bin_moments(bins()); }

  // Teacher's squares = the sum of its squared doubled centred ranks; g scales the gradient.
  double loss(double tau, const MeanVariance& of, double squares, double g, bool gradient) {
    const int64_t M = int64_t(x_.size());
    line.resize(gradient ? M : 0);
    own_share = 0;
    const auto constant = [&] {
      std::fill(line.begin(), line.end(), Line{0, 0});
      return 1.;
    };
    if (n_ < 2 || M < 2 || !(of.variance > 0) || !(squares > 0)) return constant();
    for (auto& v : scratch_) v.resize(M + 1);
    const Bins z = bins();
    const double a = tau * std::sqrt(of.variance);
    const BinSums sums = tiles<double>().soft_ranks(z, a);
    own_share = sums.share;
    if (!(sums.own > 0)) return constant();
    const Correlation c(n_, a, sums.own, sums.joint, squares);
    if (gradient) tiles<double>().rank_lines(z, c, n_, of, g);
    return 1 - c.rho;
  }

 private:
  double n_ = 0;
  std::vector<double> x_, mass_, ranks_;
  std::array<std::vector<double>, 6> scratch_;

  Bins bins() {
    auto& [decay, R, K, below, above, slope] = scratch_;
    return {int64_t(x_.size()), x_.data(),    mass_.data(), ranks_.data(), decay.data(), R.data(),
            K.data(),           below.data(), above.data(), slope.data(),  line.data()};
  }
};

}  // namespace kd
