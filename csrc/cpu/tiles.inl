// Plain loops, one copy compiled for each instruction set. `omp simd` carries the reductions, so that no flag of
// -ffast-math is needed: infinities and NaN keep their meaning.
#define INLINE static inline __attribute__((always_inline))

// 2^x. float: 2^n by the exponent bits, 2^f on [-1/2, 1/2] by a degree-6 minimax polynomial, relative error < 1.5e-7;
// 0 below 2^-126, NaN for NaN.
INLINE float exp2_(float x) {
  const float y = x < -126.f ? -126.f : x > 127.f ? 127.f : x;
  const float shifted = y + 12582912.f, n = shifted - 12582912.f, f = y - n;
  float p = 1.54035304e-4f;
  p = p * f + 1.33335581e-3f;
  p = p * f + 9.61812911e-3f;
  p = p * f + 5.55041087e-2f;
  p = p * f + 2.40226507e-1f;
  p = p * f + 6.93147181e-1f;
  p = p * f + 1.f;
  int32_t bits;
  __builtin_memcpy(&bits, &shifted, 4);
  bits = (bits << 23) + 0x3f800000;
  float scale;
  __builtin_memcpy(&scale, &bits, 4);
  return x < -126.f ? 0.f : p * scale;
}
INLINE double exp2_(double x) { return __builtin_exp2(x); }

INLINE float widen(uint16_t h, bool bf16) {
  uint32_t w = uint32_t(h) << 16;
  float f;
  if (!bf16) {  // IEEE half: shift the exponent into place, rescale by 2^112; subnormals come out right
    const uint32_t sign = w & 0x80000000u, rest = (w & 0x7fff0000u) >> 3;
    __builtin_memcpy(&f, &rest, 4);
    f *= 5.192296858534828e33f;
    uint32_t u;
    __builtin_memcpy(&u, &f, 4);
    u = (h & 0x7c00) == 0x7c00 ? (rest | 0x7f800000u) : u;
    u |= sign;
    __builtin_memcpy(&f, &u, 4);
    return f;
  }
  __builtin_memcpy(&f, &w, 4);
  return f;
}

INLINE uint16_t to_bf16(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return uint16_t(x != x ? 0x7fc0u : rounded);
}
INLINE uint16_t to_half(float x) {  // round to nearest even
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  const uint32_t sign = (u >> 16) & 0x8000u;
  u &= 0x7fffffffu;
  float magnitude;
  __builtin_memcpy(&magnitude, &u, 4);
  const float denormal = magnitude + 0.5f;  // aligns the half's subnormal bits
  uint32_t d;
  __builtin_memcpy(&d, &denormal, 4);
  const uint32_t small = d - 0x3f000000u, normal = (u + 0xc8000fffu + ((u >> 13) & 1u)) >> 13;
  const uint32_t big = u > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return uint16_t(sign | (u >= 0x47800000u ? big : u < 0x38800000u ? small : normal));
}

template <typename R> static void load(Type type, const void* x, int n, R* out) {
  if (type == Type::f32) {
    const float* p = static_cast<const float*>(x);
    for (int i = 0; i < n; ++i) out[i] = p[i];
  } else if (type == Type::f64) {
    const double* p = static_cast<const double*>(x);
    for (int i = 0; i < n; ++i) out[i] = R(p[i]);
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(x);
    if (type == Type::bf16)
      for (int i = 0; i < n; ++i) out[i] = widen(p[i], true);
    else
      for (int i = 0; i < n; ++i) out[i] = widen(p[i], false);
  }
}

template <typename R> static void store(Type type, const R* x, int n, void* out) {
  if (type == Type::f32) {
    float* p = static_cast<float*>(out);
    for (int i = 0; i < n; ++i) p[i] = float(x[i]);
  } else if (type == Type::f64) {
    double* p = static_cast<double*>(out);
    for (int i = 0; i < n; ++i) p[i] = x[i];
  } else {
    uint16_t* p = static_cast<uint16_t*>(out);
    if (type == Type::bf16)
      for (int i = 0; i < n; ++i) p[i] = to_bf16(float(x[i]));
    else
      for (int i = 0; i < n; ++i) p[i] = to_half(float(x[i]));
  }
}

template <typename R> static bool peak(const R* x, int n, R* max) {
  const R inf = R(INFINITY);
  R hi = -inf, lo = inf;
#pragma omp simd reduction(max : hi) reduction(min : lo)
  for (int i = 0; i < n; ++i) {
    hi = x[i] > hi ? x[i] : hi;
    lo = x[i] < lo ? x[i] : lo;
  }
  *max = hi == -inf ? R(0) : hi;
  return lo == -inf;
}

template <typename R> static void subtract(R* x, int n, R pivot) {
  for (int i = 0; i < n; ++i) x[i] -= pivot;
}

// Dead where both logits are -inf; a zero coefficient ignores its logit. In double: the two terms may cancel, and
// reduce and spread must then agree on what is left.
template <typename R> INLINE double tilt(R u, R v, double b, double a) {
  const double x = (b != 0 ? b * u : 0.) + (a != 0 ? a * v : 0.);
  return (u == -R(INFINITY)) & (v == -R(INFINITY)) ? -INFINITY : x;
}

// 2^(b u + a v + c); one term alone needs no double.
template <typename R, bool B, bool A> INLINE R weight(R u, R v, double b, double a, double c) {
  return B && A ? exp2_(R(b * u + (a * v + c))) : exp2_((B ? R(b) * u : A ? R(a) * v : R(0)) + R(c));
}

template <typename R> static double top(const R* u, const R* v, int n, double b, double a) {
  double hi = -INFINITY;
#pragma omp simd reduction(max : hi)
  for (int i = 0; i < n; ++i) {
    const double x = tilt(u[i], v[i], b, a);
    hi = x > hi ? x : hi;
  }
  return hi;
}

template <typename R> static TileSums<R> careful_sums(const R* u, const R* v, int n, double b, double a, double m) {
  R z = 0, s = 0, t = 0;
#pragma omp simd reduction(+ : z, s, t)
  for (int i = 0; i < n; ++i) {
    const R w = exp2_(R(tilt(u[i], v[i], b, a) - m));
    z += w;
    s += w == 0 ? R(0) : w * u[i];
    t += w == 0 ? R(0) : w * v[i];
  }
  return {double(z), double(s), double(t), 0, 0, 0};
}

// Second moments in double: u^2 cancels against the squared mean.
template <typename R> static TileSums<R> second_sums(const R* u, const R* v, int n, double b, double a, double m) {
  double z = 0, s = 0, t = 0, ss = 0, st = 0, tt = 0;
#pragma omp simd reduction(+ : z, s, t, ss, st, tt)
  for (int i = 0; i < n; ++i) {
    const double w = exp2_(R(tilt(u[i], v[i], b, a) - m));
    const double x = w == 0 ? 0. : double(u[i]), y = w == 0 ? 0. : double(v[i]);
    z += w; s += w * x; t += w * y;
    ss += w * x * x; st += w * x * y; tt += w * y * y;
  }
  return {z, s, t, ss, st, tt};
}

template <typename R, bool B, bool A, bool S, bool T>
static TileSums<R> fast_sums(const R* u, const R* v, int n, double b, double a, double m) {
  R z = 0, s = 0, t = 0;
#pragma omp simd reduction(+ : z, s, t)
  for (int i = 0; i < n; ++i) {
    const R w = weight<R, B, A>(u[i], v[i], b, a, -m);
    z += w;
    if (S) s += w * u[i];
    if (T) t += w * v[i];
  }
  return {double(z), double(s), double(t), 0, 0, 0};
}

template <typename R> static TileSums<R> sums(const R* u, const R* v, int n, double b, double a, double m, int flags, bool special) {
  if (flags & SECOND) return second_sums(u, v, n, b, a, m);
  if (special) return careful_sums(u, v, n, b, a, m);
  const int kind = (b != 0) | (a != 0) << 1 | ((flags & MEAN_S) != 0) << 2 | ((flags & MEAN_T) != 0) << 3;
  switch (kind) {
#define KIND(k) case k: return fast_sums<R, (k & 1) != 0, (k & 2) != 0, (k & 4) != 0, (k & 8) != 0>(u, v, n, b, a, m);
    KIND(0) KIND(1) KIND(2) KIND(3) KIND(4) KIND(5) KIND(6) KIND(7)
    KIND(8) KIND(9) KIND(10) KIND(11) KIND(12) KIND(13) KIND(14) KIND(15)
#undef KIND
  }
  return {};
}

template <typename R> static void careful_spread(const R* u, const R* v, int n, const TilePoint<R>& p, R* out) {
  const R* c = p.c;
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const R w = exp2_(R(tilt(u[i], v[i], p.b, p.a) + p.lam)), x = u[i], y = v[i];
    R q = c[0] + (c[1] != 0 ? c[1] * x : R(0)) + (c[2] != 0 ? c[2] * y : R(0));
    q += (c[3] != 0 ? c[3] * x * x : R(0)) + (c[4] != 0 ? c[4] * x * y : R(0)) + (c[5] != 0 ? c[5] * y * y : R(0));
    out[i] += w == 0 ? R(0) : w * q;
  }
}

template <typename R, bool B, bool A, bool L>
static void fast_spread(const R* u, const R* v, int n, const TilePoint<R>& p, R* out) {
  const double b = p.b, a = p.a, lam = p.lam;
  const R c0 = p.c[0], c1 = p.c[1], c2 = p.c[2];
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const R w = weight<R, B, A>(u[i], v[i], b, a, lam);
    out[i] += w * (L ? c0 + (c1 * u[i] + c2 * v[i]) : c0);
  }
}

template <typename R>
static void spread(const R* u, const R* v, int n, const TilePoint<R>& p, bool special, R* out) {
  const bool quadratic = p.c[3] != 0 || p.c[4] != 0 || p.c[5] != 0, linear = p.c[1] != 0 || p.c[2] != 0;
  if (special || quadratic) return careful_spread(u, v, n, p, out);
  switch ((p.b != 0) | (p.a != 0) << 1 | linear << 2) {
#define KIND(k) case k: return fast_spread<R, (k & 1) != 0, (k & 2) != 0, (k & 4) != 0>(u, v, n, p, out);
    KIND(0) KIND(1) KIND(2) KIND(3) KIND(4) KIND(5) KIND(6) KIND(7)
#undef KIND
  }
}

extern const Tiles<float> f32 = {load, store, peak, subtract, top, sums, spread};
extern const Tiles<double> f64 = {load, store, peak, subtract, top, sums, spread};
