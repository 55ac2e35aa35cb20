// Vectors of one instruction set in gcc's vector extensions, and the exponential that every kernel uses.
#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))
#define EACH(n) _Pragma("GCC unroll 8") for (int k = 0; k < (n); ++k)

#if defined(KD_AVX512)
constexpr int kBytes = 64;
#elif defined(KD_AVX2)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

template <typename R> struct VectorOf;
template <> struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kBytes)));
  typedef int32_t bits __attribute__((vector_size(kBytes)));
  typedef double wide __attribute__((vector_size(2 * kBytes)));
};
template <> struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kBytes)));
  typedef int64_t bits __attribute__((vector_size(kBytes)));
  typedef double wide __attribute__((vector_size(kBytes)));
};
template <typename R> using Vec = typename VectorOf<R>::type;
template <typename R> constexpr int kLanes = kBytes / sizeof(R);

template <typename R> INLINE Vec<R> load(const R* p) {
  Vec<R> v;
  __builtin_memcpy(&v, p, kBytes);
  return v;
}
template <typename R> INLINE void save(R* p, Vec<R> v) { __builtin_memcpy(p, &v, kBytes); }
// The first n < kLanes entries, then `fill`; and the first n lanes of v to p.
template <typename R> INLINE Vec<R> load_some(const R* p, int n, R fill) {
#ifdef KD_AVX512
  if constexpr (sizeof(R) == 4) return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), __mmask16((1u << n) - 1), p);
  else return _mm512_mask_loadu_pd(_mm512_set1_pd(fill), __mmask8((1u << n) - 1), p);
#else
  R part[kLanes<R>];
  for (int i = 0; i < kLanes<R>; ++i) part[i] = i < n ? p[i] : fill;
  return load(part);
#endif
}
template <typename R> INLINE void save_some(R* p, int n, Vec<R> v) {
#ifdef KD_AVX512
  if constexpr (sizeof(R) == 4) _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), v);
  else _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), v);
#else
  for (int i = 0; i < n; ++i) p[i] = v[i];
#endif
}
// Past the caches, to a line's start.
template <typename R> INLINE void save_past(R* p, Vec<R> v) {
#if defined(KD_AVX512)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), __m512i(v));
#elif defined(KD_AVX2)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), __m256i(v));
#else
  save(p, v);
#endif
}
template <typename R> INLINE Vec<R> some(Vec<R> v, int n) {  // 0 from lane n on
  R part[kLanes<R>]{};
  save_some<R>(part, n, v);
  return load(part);
}
// The lanes of v, folded in halves: few of them wait for each other.
template <typename R, typename V, typename F> INLINE R folded(const V& v, F f) {
  constexpr int n = sizeof(V) / sizeof(R);
  R lanes[n];
  __builtin_memcpy(lanes, &v, sizeof v);
  for (int half = n / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = f(lanes[i], lanes[i + half]);
  return lanes[0];
}
// Several accumulators: short sums then hardly round, and long ones do not wait for each other.
constexpr int kSums = kBytes >= 32 ? 4 : 8;
template <typename R, int N> INLINE double total(const Vec<R> (&v)[N]) {
  typename VectorOf<R>::wide sum{};
  for (const Vec<R>& x : v) sum += __builtin_convertvector(x, typename VectorOf<R>::wide);
  return folded<double>(sum, [](double a, double b) { return a + b; });
}

// v > w ? v : w and v < w ? v : w (so a NaN in v is passed over), for which gcc would need -ffast-math to find the
// instruction.
template <typename R> INLINE Vec<R> max_(Vec<R> v, Vec<R> w) {
#if defined(KD_AVX512)
  if constexpr (sizeof(R) == 4) return _mm512_max_ps(v, w); else return _mm512_max_pd(v, w);
#elif defined(KD_AVX2)
  if constexpr (sizeof(R) == 4) return _mm256_max_ps(v, w); else return _mm256_max_pd(v, w);
#else
  return v > w ? v : w;
#endif
}
template <typename R> INLINE Vec<R> min_(Vec<R> v, Vec<R> w) {
#if defined(KD_AVX512)
  if constexpr (sizeof(R) == 4) return _mm512_min_ps(v, w); else return _mm512_min_pd(v, w);
#elif defined(KD_AVX2)
  if constexpr (sizeof(R) == 4) return _mm256_min_ps(v, w); else return _mm256_min_pd(v, w);
#else
  return v < w ? v : w;
#endif
}

// 2^x = 2^n 2^f with n = round(x), |f| <= 1/2 and 2^f by a minimax polynomial with p(0) = 1: relative error 2.6e-9 in
// float and 1.8e-17 in double before rounding; after it at most 1.1 ulp, 1.4 ulp without fused multiply-add. Below the
// smallest normal number 0 or gradual underflow, NaN for NaN; x <= 127 (1023) and x > -infinity are the caller's business: every weight
// is relative to a maximum.
template <typename R> INLINE Vec<R> power_of_two(Vec<R> n) {
  const R shift = sizeof(R) == 4 ? R(12582912 + 127) : R(6755399441055744.0 + 1023);  // 1.5 2^23, 1.5 2^52: the low
  return Vec<R>(typename VectorOf<R>::bits(n + shift) << (sizeof(R) == 4 ? 23 : 52));  // bits of the sum are n + bias
}

template <typename R> struct Polynomial;
template <> struct Polynomial<float> {
  static constexpr float c[] = {1.5594678e-4f, 1.3406644e-3f, 9.6176930e-3f, 5.5503106e-2f,
                                2.4022653e-1f, 6.9314721e-1f, 1.f};
};
template <> struct Polynomial<double> {
  static constexpr double c[] = {
      4.078071929588336665e-10, 7.0725704128144235096e-9, 1.0180647659234138888e-7, 1.3215442675329822143e-6,
      1.5252727385193868197e-5, 1.540353044157213033e-4,  1.3333558153439964747e-3, 9.6181291076070023796e-3,
      5.5504108664790394552e-2, 2.4022650695910098007e-1, 6.9314718055994569675e-1, 1.};
};
// Side by side for G vectors: none waits for its own last step.
template <typename R, int G> INLINE void polynomial(const Vec<R> (&f)[G], Vec<R> (&p)[G]) {
  constexpr auto& c = Polynomial<R>::c;
  EACH(G) p[k] = f[k] * c[0] + c[1];
  _Pragma("GCC unroll 16") for (unsigned j = 2; j < sizeof(c) / sizeof(R); ++j) EACH(G) p[k] = p[k] * f[k] + c[j];
}

template <typename R> constexpr R kLeast = sizeof(R) == 4 ? R(-126) : R(-1022);
template <typename R> INLINE Vec<R> round_(Vec<R> x) {
#ifdef KD_AVX512
  if constexpr (sizeof(R) == 4) return _mm512_roundscale_ps(x, 8); else return _mm512_roundscale_pd(x, 8);
#else
  constexpr R magic = sizeof(R) == 4 ? R(12582912) : R(6755399441055744.0);
  return ((x < kLeast<R> ? Vec<R>{} + kLeast<R> : x) + magic) - magic;
#endif
}
// p 2^n; where x was too small 0, or what gradual underflow makes of it.
template <typename R> INLINE Vec<R> scale_(Vec<R> p, Vec<R> n, Vec<R> x) {
#ifdef KD_AVX512
  if constexpr (sizeof(R) == 4) return _mm512_scalef_ps(p, n); else return _mm512_scalef_pd(p, n);
#else
  return x < kLeast<R> ? Vec<R>{} : p * power_of_two<R>(n);
#endif
}
// x becomes 2^x.
template <typename R, int G> INLINE void exp2_(Vec<R> (&x)[G]) {
  Vec<R> n[G], f[G], p[G];
  EACH(G) n[k] = round_<R>(x[k]);
  EACH(G) f[k] = x[k] - n[k];
  polynomial<R, G>(f, p);
  EACH(G) x[k] = scale_<R>(p[k], n[k], x[k]);
}
template <typename R> INLINE Vec<R> exp2_(Vec<R> x) {
  Vec<R> one[1] = {x};
  exp2_<R, 1>(one);
  return one[0];
}
// 2^(x + low), low within the rounding of x.
template <typename R> INLINE Vec<R> exp2_(Vec<R> x, Vec<R> low) {
  const Vec<R> n = round_<R>(x), f[1] = {(x - n) + low};
  Vec<R> p[1];
  polynomial<R, 1>(f, p);
  return scale_<R>(p[0], n, x);
}

// 2^(b s + a t + c), the exponent in double.
INLINE Vec<double> wide(const float* x) {
#if defined(KD_AVX512)
  return _mm512_cvtps_pd(_mm256_loadu_ps(x));
#elif defined(KD_AVX2)
  return _mm256_cvtps_pd(_mm_loadu_ps(x));
#else
  return Vec<double>{x[0], x[1]};
#endif
}
INLINE Vec<double> lower(Vec<float> x) {
#if defined(KD_AVX512)
  return _mm512_cvtps_pd(_mm512_castps512_ps256(x));
#elif defined(KD_AVX2)
  return _mm256_cvtps_pd(_mm256_castps256_ps128(x));
#else
  return Vec<double>{x[0], x[1]};
#endif
}
INLINE Vec<double> upper(Vec<float> x) {
#if defined(KD_AVX512)
  return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
#elif defined(KD_AVX2)
  return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
#else
  return Vec<double>{x[2], x[3]};
#endif
}
INLINE Vec<float> join(Vec<double> x, Vec<double> y) {
#if defined(KD_AVX512)
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(x)), _mm512_cvtpd_ps(y), 1);
#elif defined(KD_AVX2)
  return _mm256_set_m128(_mm256_cvtpd_ps(y), _mm256_cvtpd_ps(x));
#else
  return Vec<float>{float(x[0]), float(x[1]), float(y[0]), float(y[1])};
#endif
}
INLINE Vec<double> exp2_of_sum(const double* s, const double* t, double b, double a, double c) {
  return exp2_<double>(load(s) * b + (load(t) * a + c));
}
INLINE Vec<float> exp2_of_sum(const float* s, const float* t, double b, double a, double c) {
  constexpr int H = kLanes<double>;
  Vec<double> y[2], n[2];
  EACH(2) y[k] = wide(s + k * H) * b + (wide(t + k * H) * a + c);
  EACH(2) n[k] = round_<double>(y[k]);
  const Vec<float> whole = join(n[0], n[1]), f[1] = {join(y[0] - n[0], y[1] - n[1])};
  Vec<float> p[1];
  polynomial<float, 1>(f, p);
  return scale_<float>(p[0], whole, whole);
}
