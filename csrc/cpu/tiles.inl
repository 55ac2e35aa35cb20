// One copy compiled for each instruction set, in vectors of its width. No flag of -ffast-math: infinities and NaN keep
// their meaning.
#include "vector.inl"

template <typename R> static void widen_all(Type type, const void* x, int n, R* out) {
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

// Whole lines go past the caches where the output is as wide as the arithmetic; the narrow types go through one line.
template <typename T> static void copy_out(const T* x, int n, T* out, bool stream) {
  int i = 0;
#ifdef __SSE2__
  if (stream) {
    while (i < n && uintptr_t(out + i) % 64) { out[i] = x[i]; ++i; }
    for (constexpr int step = 64 / sizeof(T); i + step <= n; i += step) {
#ifdef KD_AVX512
      _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i), _mm512_loadu_si512(x + i));
#else
      const __m128i* from = reinterpret_cast<const __m128i*>(x + i);
      __m128i* to = reinterpret_cast<__m128i*>(out + i);
      for (int j = 0; j < 4; ++j) _mm_stream_si128(to + j, _mm_loadu_si128(from + j));
#endif
    }
  }
#endif
  for (; i < n; ++i) out[i] = x[i];
}

template <typename R> static void store(Type type, const R* x, int n, void* out, bool stream) {
  if constexpr (sizeof(R) == 4) {
    if (type == Type::f32) return copy_out(x, n, static_cast<float*>(out), stream);
  }
  if (type == Type::f64) {
    for (int i = 0; i < n; ++i) static_cast<double*>(out)[i] = x[i];
  } else if (type == Type::f32) {
    for (int i = 0; i < n; ++i) static_cast<float*>(out)[i] = float(x[i]);
  } else {
    alignas(64) uint16_t half[kTile];
    if (type == Type::bf16)
      for (int i = 0; i < n; ++i) half[i] = to_bf16(float(x[i]));
    else
      for (int i = 0; i < n; ++i) half[i] = to_half(float(x[i]));
    copy_out(half, n, static_cast<uint16_t*>(out), stream);
  }
}

template <typename R> static bool peak(const R* x, int n, R* max) {
  const R inf = R(INFINITY);
  Vec<R> hi = Vec<R>{} - inf, lo = Vec<R>{} + inf;
  auto see = [&](Vec<R> v) { hi = max_<R>(v, hi); lo = min_<R>(v, lo); };
  int i = 0;
  for (; i + kLanes<R> <= n; i += kLanes<R>) see(load(x + i));
  if (i < n) see(load_some(x + i, n - i, x[i]));
  R h = -inf, l = inf;
  for (int j = 0; j < kLanes<R>; ++j) { h = hi[j] > h ? hi[j] : h; l = lo[j] < l ? lo[j] : l; }
  *max = h;
  return l == -inf;
}

// The exponent in double, from the logits themselves: its terms may cancel, and the heaviest class may be far from both
// maxima; reduce and spread must agree on what is left.
struct Raw {
  double b, a, c;
  template <typename R> Raw(const View<R>& x, const Exponent& e)
      : b(e.b), a(e.a), c(e.c - e.b * x.s_pivot - (e.a != 0 ? e.a * x.t_pivot : 0.)) {}
  template <typename R> INLINE_MEMBER double operator()(R s, R t) const {
    const double x = (b != 0 ? b * s : 0.) + ((a != 0 ? a * t : 0.) + c);
    const bool dead = (s == -R(INFINITY)) & (t == -R(INFINITY));
    return dead ? -INFINITY : x;
  }
};

template <typename R> static double top(const View<R>& x, const Exponent& e) {
  const Raw raw(x, e);
  double hi = -INFINITY;
#pragma omp simd reduction(max : hi)
  for (int i = 0; i < x.n; ++i) {
    const double y = raw(x.s[i], x.t[i]);
    hi = y > hi ? y : hi;
  }
  return hi;
}

template <typename R> static void exp2_all(const R* x, int n, R* out) {
  int i = 0;
  for (; i + kLanes<R> <= n; i += kLanes<R>) save(out + i, exp2_<R>(load(x + i)));
  for (; i < n; ++i) out[i] = exp2_<R>(Vec<R>{} + x[i])[0];
}

// A double exponent as two R: high in x[i], the rest in x[kTile + i].
template <typename R> INLINE void split(double y, R* high, R* low) {
  *high = R(y);
  *low = R(y - double(R(y)));
}
template <typename R> static void exp2_split(R* x, int n) {
  for (int i = 0; i < n; i += kLanes<R>) save(x + i, exp2_<R>(load(x + i), load(x + kTile + i)));
}

// Weights of any tile, exactly 0 where a class is dead.
template <typename R> static void weights(const View<R>& x, const Exponent& e, R* w) {
  const Raw raw(x, e);
  R* low = w + kTile;
#pragma omp simd
  for (int i = 0; i < x.n; ++i) {
    const double y = raw(x.s[i], x.t[i]);
    split(y < -1e30 ? -1e30 : y, w + i, low + i);  // far below the least exponent, and no infinity
  }
  exp2_split(w, x.n);
}

// E: the precision of u and v (see slope_at); the sums are in double, u^2 will cancel against the squared mean.
template <typename E, typename R> static TileSums<R> careful_sums(const View<R>& x, const R* w, bool second) {
  double z = 0, s = 0, t = 0, ss = 0, st = 0, tt = 0;
#pragma omp simd reduction(+ : z, s, t)
  for (int i = 0; i < x.n; ++i) {
    z += w[i];
    s += w[i] == 0 ? 0. : w[i] * double(E(x.s[i]) - x.s_pivot);
    t += w[i] == 0 ? 0. : w[i] * double(E(x.t[i]) - x.t_pivot);
  }
  if (second)
#pragma omp simd reduction(+ : ss, st, tt)
    for (int i = 0; i < x.n; ++i) {
      const double u = w[i] == 0 ? 0. : E(x.s[i]) - x.s_pivot, v = w[i] == 0 ? 0. : E(x.t[i]) - x.t_pivot;
      ss += w[i] * u * u; st += w[i] * u * v; tt += w[i] * v * v;
    }
  return {z, s, t, ss, st, tt};
}

// A single term with a positive coefficient is heaviest at the maximum and needs no double; others go through `mixed`.
enum Kind { NEITHER, STUDENT, TEACHER, MIXED };
INLINE Kind kind_of(const Exponent& e) { return is_mixture(e.b, e.a) ? MIXED : Kind((e.b != 0) | (e.a != 0) << 1); }
template <typename R> static void mix(const View<R>& x, const Exponent& e, R* out) {
  const Raw raw(x, e);
  R* low = out + kTile;
#pragma omp simd
  for (int i = 0; i < x.n; ++i) split(raw.b * x.s[i] + (raw.a * x.t[i] + raw.c), out + i, low + i);
}

template <typename R, Kind K> INLINE Vec<R> weight(Vec<R> u, Vec<R> v, const R* mixed, const Exponent& e) {
  if constexpr (K == MIXED) return exp2_<R>(load(mixed), load(mixed + kTile));  // kTile is whole vectors
  if constexpr (K == STUDENT) return exp2_<R>(u * R(e.b) + R(e.c));
  if constexpr (K == TEACHER) return exp2_<R>(v * R(e.a) + R(e.c));
  return exp2_<R>(Vec<R>{} + R(e.c));
}

template <typename R, Kind K, bool S, bool T>
static TileSums<R> fast_sums(const View<R>& view, const Exponent& exponent, const R* mixed) {
  const View<R> x = view;
  const Exponent e = exponent;
  constexpr bool U = S || K == STUDENT, V = T || K == TEACHER;
  constexpr int L = kLanes<R>;
  Vec<R> z[kSums]{}, s[kSums]{}, t[kSums]{};
  auto add = [&](int k, Vec<R> u, Vec<R> v, Vec<R> w) {
    z[k] += w;
    if (S) s[k] += w * u;
    if (T) t[k] += w * v;
  };
  auto full = [&](int k, int i) {
    if (U) __builtin_prefetch(x.s_next + i * x.s_bytes);
    if (V) __builtin_prefetch(x.t_next + i * x.t_bytes);
    const Vec<R> u = U ? load(x.s + i) - x.s_pivot : Vec<R>{}, v = V ? load(x.t + i) - x.t_pivot : Vec<R>{};
    add(k, u, v, weight<R, K>(u, v, mixed + i, e));
  };
  int i = 0;
  for (; i + kSums * L <= x.n; i += kSums * L)
    for (int k = 0; k < kSums; ++k) full(k, i + k * L);
  int k = 0;
  for (; i + L <= x.n; i += L) full(k++, i);
  if (const int n = x.n - i) {
    const Vec<R> u = U ? load_some(x.s + i, n, x.s_pivot) - x.s_pivot : Vec<R>{};
    const Vec<R> v = V ? load_some(x.t + i, n, x.t_pivot) - x.t_pivot : Vec<R>{};
    add(k, u, v, some<R>(weight<R, K>(u, v, mixed + i, e), n));
  }
  return {total<R>(z), S ? total<R>(s) : 0, T ? total<R>(t) : 0, 0, 0, 0};
}

template <typename R>
static TileSums<R> sums(const View<R>& x, const Exponent& e, int flags, bool special, R* scratch) {
  const Kind kind = kind_of(e);
  if (special || (flags & SECOND)) {
    weights(x, e, scratch);
    const bool second = flags & SECOND;
    return kind == MIXED ? careful_sums<double>(x, scratch, second) : careful_sums<R>(x, scratch, second);
  }
  if (kind == MIXED) mix(x, e, scratch);
  if (kind == MIXED && (flags & (MEAN_S | MEAN_T))) {
    exp2_split(scratch, x.n);
    return careful_sums<double>(x, scratch, false);
  }
  switch (kind << 2 | ((flags & MEAN_S) != 0) << 1 | ((flags & MEAN_T) != 0)) {
#define CASE(k) case k: return fast_sums<R, Kind((k) >> 2), ((k) >> 1 & 1) != 0, ((k) & 1) != 0>(x, e, scratch);
    CASE(0) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
    CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14) CASE(15)
#undef CASE
  }
  return {};
}

template <typename R>
static void careful_spread(const View<R>& x, const R* w, const R* c, bool first, R* out) {
#pragma omp simd
  for (int i = 0; i < x.n; ++i) {
    const R u = x.s[i] - x.s_pivot, v = x.t[i] - x.t_pivot;
    R q = c[0] + (c[1] != 0 ? c[1] * u : R(0)) + (c[2] != 0 ? c[2] * v : R(0));
    q += (c[3] != 0 ? c[3] * u * u : R(0)) + (c[4] != 0 ? c[4] * u * v : R(0)) + (c[5] != 0 ? c[5] * v * v : R(0));
    out[i] = (first ? R(0) : out[i]) + (w[i] == 0 ? R(0) : w[i] * q);
  }
}

template <typename R, Kind K, bool L, bool First>
static void fast_spread(const View<R>& view, const Exponent& exponent, const R* coefs, const R* mixed, R* out) {
  const View<R> x = view;  // copies that a store to `out` cannot change
  const Exponent e = exponent;
  const R c[3] = {coefs[0], coefs[1], coefs[2]};
  constexpr bool U = L || K == STUDENT, V = L || K == TEACHER;
  auto slope = [&](Vec<R> u, Vec<R> v, int i) {
    const Vec<R> w = weight<R, K>(u, v, mixed + i, e);
    return L ? w * (u * c[1] + (v * c[2] + c[0])) : w * c[0];
  };
  int i = 0;
  for (; i + kLanes<R> <= x.n; i += kLanes<R>) {
    if (U) __builtin_prefetch(x.s_next + i * x.s_bytes);
    if (V) __builtin_prefetch(x.t_next + i * x.t_bytes);
    const Vec<R> u = U ? load(x.s + i) - x.s_pivot : Vec<R>{}, v = V ? load(x.t + i) - x.t_pivot : Vec<R>{};
    const Vec<R> d = slope(u, v, i);
    save(out + i, First ? d : load(out + i) + d);
  }
  if (const int n = x.n - i) {
    const Vec<R> u = U ? load_some(x.s + i, n, x.s_pivot) - x.s_pivot : Vec<R>{};
    const Vec<R> v = V ? load_some(x.t + i, n, x.t_pivot) - x.t_pivot : Vec<R>{};
    const Vec<R> d = slope(u, v, i);
    save_some<R>(out + i, n, First ? d : load_some(out + i, n, R(0)) + d);
  }
}

template <typename R>
static void spread(const View<R>& x, const Exponent& e, const R* c, bool special, bool first, R* scratch, R* out) {
  if (special || c[3] != 0 || c[4] != 0 || c[5] != 0) {
    weights(x, e, scratch);
    return careful_spread(x, scratch, c, first, out);
  }
  const Kind kind = kind_of(e);
  if (kind == MIXED) mix(x, e, scratch);
  switch (kind << 2 | (c[1] != 0 || c[2] != 0) << 1 | first) {
#define CASE(k) \
  case k: return fast_spread<R, Kind((k) >> 2), ((k) >> 1 & 1) != 0, ((k) & 1) != 0>(x, e, c, scratch, out);
    CASE(0) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
    CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14) CASE(15)
#undef CASE
  }
}

extern const Tiles<float> f32 = {widen_all, store, peak, top, sums, spread, exp2_all};
extern const Tiles<double> f64 = {widen_all, store, peak, top, sums, spread, exp2_all};
