// Deviations and their products: of the probabilities of a tile of classes in one row, relative to what each class has
// over all rows (columns.cpp); of a row relative to its mean (correlation.h).

// log q_i less a number of each class, or of all.
template <typename R> struct LogShare {
  const R* x;
  Share q;
  const double* less;
  INLINE_MEMBER double operator()(int i) const { return q(x[i]) - less[i]; }
};
template <typename R> struct LogShareOfRow {
  const R* x;
  Share q;
  INLINE_MEMBER double operator()(int i) const { return q(x[i]); }
};

template <typename R> static void highest(const R* x, int n, const Share& q, double* top) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const double y = q(x[i]);
    top[i] = y > top[i] ? y : top[i];
  }
}

template <typename R, typename F> INLINE void exponentials(F log_share, int n, R* e) {
  constexpr double least = sizeof(R) == 4 ? -1e6 : -1e9;  // -inf is not taken
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const double y = log_share(i) * kLog2e;
    e[i] = R(y > least ? y : least);
  }
  exp2_all(e, n, e);
}
template <typename R> static void shares(const R* x, int n, const Share& q, const double* pivot, R* e) {
  if (pivot) exponentials(LogShare<R>{x, q, pivot}, n, e);
  else exponentials(LogShareOfRow<R>{x, q}, n, e);
}

// e = the lesser of both rows' probabilities.
template <typename R> static void lesser(const R* x, const Share& q, const R* y, const Share& p, int n, R* e) {
  const LogShareOfRow<R> one{x, q}, other{y, p};
  const auto least = [=](int i) INLINE_LAMBDA {
    const double a = one(i), b = other(i);
    return a < b ? a : b;
  };
  exponentials(least, n, e);
}

// factor e - 1 to full precision: of what is close to 1 the logarithm d is known, and expm1(d) is d times a series.
template <typename R, typename F, typename G> INLINE void less_1(F log_share, int n, G ratio, R* u) {
  constexpr bool single = sizeof(R) == 4;
  constexpr R near = single ? R(0.25) : R(0.1);
  constexpr R c[] = {R(1), R(1. / 2), R(1. / 6), R(1. / 24), R(1. / 120), R(1. / 720), R(1. / 5040), R(1. / 40320),
                     R(1. / 362880), R(1. / 3628800), R(1. / 39916800)};
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const R d = R(log_share(i));
    R series = c[single ? 6 : 10];
#pragma GCC unroll 12
    for (int k = single ? 5 : 9; k >= 0; --k) series = series * d + c[k];
    u[i] = std::fabs(d) < near ? d * series : ratio(i) - 1;
  }
}
template <typename R>
static void deviations(const R* x, int n, const Share& q, const double* mean, const R* factor, const R* e, R* u) {
  if (mean) return less_1(LogShare<R>{x, q, mean}, n, [=](int i) INLINE_LAMBDA { return e[i] * factor[i]; }, u);
  const R by = *factor;
  less_1(LogShareOfRow<R>{x, q}, n, [=](int i) INLINE_LAMBDA { return e[i] * by; }, u);
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

// f(first, count) of parts whose sums lose no digits worth mentioning: one running sum of many alike numbers would.
template <typename F> INLINE void in_parts(int n, F f) {
  constexpr int part = 4096;
  for (int first = 0; first < n; first += part) f(first, n - first < part ? n - first : part);
}
// In double, as four sums that do not wait for each other.
template <typename F> INLINE double sum_of_all(int n, F f) {
  double total = 0;
  in_parts(n, [&](int first, int count) INLINE_LAMBDA {
    const int part = count / 4, end = first + count;
    double a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
    for (int i = first; i < first + part; ++i) {
      a += f(i);
      b += f(i + part);
      c += f(i + 2 * part);
      d += f(i + 3 * part);
    }
    for (int i = first + 4 * part; i < end; ++i) a += f(i);
    total += (a + b) + (c + d);
  });
  return total;
}

// The sum of (1 + u) (by_u u + by_v v + constant).
template <typename R> static double slope_sum(const R* u, const R* v, int n, const ClassTerms<R>& terms) {
  const ClassTerms<R> by = terms;
  return sum_of_all(n, [=](int i) INLINE_LAMBDA {
    return double((1 + u[i]) * (by.u[i] * u[i] + (by.v[i] * v[i] + by.constant[i])));
  });
}

// u becomes g e (by_u u + by_v v + constant - mean all).
template <typename R>
static void class_slopes(const R* e, const R* v, int n, const ClassTerms<R>& by, double all, double g, R* u) {
  const R less = R(all), factor = R(g);
#pragma omp simd
  for (int i = 0; i < n; ++i)
    u[i] = factor * e[i] * (by.u[i] * u[i] + (by.v[i] * v[i] + (by.constant[i] - by.mean[i] * less)));
}

template <typename R> static double sum_of(const R* x, int n) {
  return sum_of_all(n, [=](int i) INLINE_LAMBDA { return double(x[i]); });
}
// The sums of squares and products of u less its mean and v less its: two of each, that do not wait for each other.
template <typename R> static Products centred(const R* u, const R* v, int n, double u_mean, double v_mean) {
  Products sum{};
  in_parts(n, [&](int first, int count) INLINE_LAMBDA {
    double uu[2]{}, uv[2]{}, vv[2]{};
    const int half = count / 2;
    const auto add = [&](int k, int i) INLINE_LAMBDA {
      const double a = u[i] - u_mean, b = v[i] - v_mean;
      uu[k] += a * a;
      uv[k] += a * b;
      vv[k] += b * b;
    };
#pragma omp simd reduction(+ : uu[:2], uv[:2], vv[:2])
    for (int i = first; i < first + half; ++i) {
      add(0, i);
      add(1, i + half);
    }
    if (count % 2) add(0, first + count - 1);
    sum = {sum.uu + uu[0] + uu[1], sum.uv + uv[0] + uv[1], sum.vv + vv[0] + vv[1]};
  });
  return sum;
}
// d = by_u (u - u_mean) + by_v (v - v_mean), times 1 + u if it is of probabilities.
template <typename R>
static void row_slopes(const R* u, const R* v, int n, double by_u, double u_mean, double by_v, double v_mean,
                       bool probabilities, R* d) {
  const double one = probabilities ? 1 : 0;
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const double slope = by_u * (u[i] - u_mean) + by_v * (v[i] - v_mean);
    d[i] = R(slope + one * u[i] * slope);
  }
}

// sum_i |x_i - y_i|
template <typename R> static double apart(const R* x, const R* y, int n) {
  constexpr int L = kLanes<R>;
  Vec<R> sum[4]{};
  const auto distance = [](Vec<R> a, Vec<R> b) INLINE_LAMBDA { return max_<R>(a - b, b - a); };
  int i = 0;
  for (; i + 4 * L <= n; i += 4 * L)
    EACH(4) sum[k] += distance(load(x + i + k * L), load(y + i + k * L));
  for (; i + L <= n; i += L) sum[0] += distance(load(x + i), load(y + i));
  if (i < n) sum[1] += distance(load_some(x + i, n - i, R(0)), load_some(y + i, n - i, R(0)));
  return total<R>(sum);
}
// d_i += g sign(x_i - y_i)
template <typename R> static void signs(const R* x, const R* y, int n, double g, R* d) {
  const R up = R(g);
#pragma omp simd
  for (int i = 0; i < n; ++i) d[i] += x[i] > y[i] ? up : x[i] < y[i] ? -up : R(0);
}
