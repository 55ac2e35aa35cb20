// Pearson's correlation of two rows, of their logits or of their probabilities.
#pragma once
#include "lapsum.h"
#include "live.h"

namespace kd {

template <typename R> struct PearsonScratch {
  Live<R> live;
  std::vector<R> u, v, slopes, out;
};

// The logits, or V q_i - 1 for the probabilities q of x / T, as expm1(x_i / T - L + log V): squares of q minus 1 / V
// would cancel. Null for a constant row.
template <typename R>
const R* deviations(const R* x, int64_t n, bool probabilities, double inverse_T, std::vector<R>& u) {
  if (n < 2 || std::all_of(x + 1, x + n, [&](R other) { return other == x[0]; })) return nullptr;
  if (!probabilities) return x;  // less its mean in double: between rows that nearly agree nothing cancels
  const Columns<R>& loops = tiles<R>().columns;
  const int count = int(n);
  u.resize(n);
  R high;
  tiles<R>().peak(x, count, &high);
  Share q{inverse_T, double(high), 0};
  loops.shares(x, count, q, nullptr, u.data());
  const double scale = double(n) / loops.sum(u.data(), count);
  const R factor = R(scale);
  q.lam = std::log(scale);  // of V q_i
  loops.deviations(x, count, q, nullptr, &factor, u.data(), u.data());
  return u.data();
}

// Of floats less is left of the difference of two probabilities; the gradient is small there.
constexpr double kNearlyOne = 1 - 1. / 256;

// 1 - rho; g times its gradient by the row u (the teacher's, if `side` is 1) goes to `out`. Or what in_double() makes.
template <typename R, typename F>
double pearson(const Pair<R>& z, bool probabilities, double inverse_T, double inverse_teacher_T, int side, double g,
               const RowOut& out, PearsonScratch<R>& w, F in_double) {
  const R *u = deviations(z.s, z.n, probabilities, inverse_T, w.u);
  const R *v = deviations(z.t, z.n, probabilities, inverse_teacher_T, w.v);
  const Columns<R>& loops = tiles<R>().columns;
  const int n = int(z.n);
  double u_mean = 0, v_mean = 0;
  Products sum{};
  if (side) std::swap(u, v);
  if (u && v) {
    u_mean = loops.sum(u, n) / double(n);  // of probabilities what rounding has left
    v_mean = loops.sum(v, n) / double(n);
    sum = loops.centred(u, v, n, u_mean, v_mean);
  }
  const double noise = probabilities ? 1e-26 * double(n) : 0;  // what probabilities that are equal differ by
  if (!(sum.uu > noise && sum.vv > noise)) {  // a constant row
    if (out.to) out.fill(0);
    return 1;
  }
  const double rho = sum.uv / std::sqrt(sum.uu) / std::sqrt(sum.vv);
  if (sizeof(R) == 4 && probabilities && std::fabs(rho) > kNearlyOne) return in_double();
  if (!out.to) return 1 - rho;
  const double scale = probabilities ? g * (side ? inverse_teacher_T : inverse_T) : g;
  const double by_u = scale * rho / sum.uu, by_v = -scale / std::sqrt(sum.uu) / std::sqrt(sum.vv);
  const auto slopes = [&](int64_t first, int count, R* d) {  // the softmax's own term is 0: rho knows no scale
    loops.row_slopes(u + first, v + first, count, by_u, u_mean, by_v, v_mean, probabilities, d);
  };
  if (z.at) {
    w.slopes.resize(n);
    slopes(0, n, w.slopes.data());
    out.write(z, w.out, [&](int64_t i) { return w.slopes[i]; });
  } else {
    out.template put_tiles<R>(slopes);
  }
  return 1 - rho;
}

}  // namespace kd
