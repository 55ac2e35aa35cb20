// Probabilities of a tile of classes in one row, relative to what each class has over all rows (columns.cpp).

template <typename R> static void highest(const R* x, int n, const Share& q, double* top) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const double y = q(x[i]);
    top[i] = y > top[i] ? y : top[i];
  }
}

template <typename R> static void shares(const R* x, int n, const Share& q, const double* pivot, R* e) {
  constexpr double least = sizeof(R) == 4 ? -1e6 : -1e9;  // -inf is not taken
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const double y = (q(x[i]) - pivot[i]) * kLog2e;
    e[i] = R(y > least ? y : least);
  }
  exp2_all(e, n, e);
}

// factor e - 1 to full precision: of what is close to 1 the logarithm d is known, and expm1(d) is d times a series.
template <typename R>
static void deviations(const R* x, int n, const Share& q, const double* mean, const R* factor, const R* e, R* u) {
  constexpr bool single = sizeof(R) == 4;
  constexpr R near = single ? R(0.25) : R(0.1);
  constexpr R c[] = {R(1), R(1. / 2), R(1. / 6), R(1. / 24), R(1. / 120), R(1. / 720), R(1. / 5040), R(1. / 40320),
                     R(1. / 362880), R(1. / 3628800), R(1. / 39916800)};
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const R d = R(q(x[i]) - mean[i]);
    R series = c[single ? 6 : 10];
#pragma GCC unroll 12
    for (int k = single ? 5 : 9; k >= 0; --k) series = series * d + c[k];
    u[i] = std::fabs(d) < near ? d * series : e[i] * factor[i] - 1;
  }
}

// Sums over the rows, of a class each: u, v, u^2, u v, v^2, `step` apart.
template <typename R> static void products(const R* u, const R* v, int n, int step, double* sums) {
  double *s = sums, *t = s + step, *ss = t + step, *st = ss + step, *tt = st + step;
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const double a = u[i], b = v[i];
    s[i] += a;
    t[i] += b;
    ss[i] += a * a;
    st[i] += a * b;
    tt[i] += b * b;
  }
}

template <typename R> static void add_up(const R* e, int n, double* sums) {
#pragma omp simd
  for (int i = 0; i < n; ++i) sums[i] += e[i];
}

// The sum of (1 + u) (by_u u + by_v v + constant).
template <typename R> static double slope_sum(const R* u, const R* v, int n, const ClassTerms<R>& by) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < n; ++i) sum += (1 + u[i]) * (by.u[i] * u[i] + (by.v[i] * v[i] + by.constant[i]));
  return sum;
}

// u becomes g e (by_u u + by_v v + constant - mean all).
template <typename R>
static void class_slopes(const R* e, const R* v, int n, const ClassTerms<R>& by, double all, double g, R* u) {
  const R less = R(all), factor = R(g);
#pragma omp simd
  for (int i = 0; i < n; ++i)
    u[i] = factor * e[i] * (by.u[i] * u[i] + (by.v[i] * v[i] + (by.constant[i] - by.mean[i] * less)));
}
