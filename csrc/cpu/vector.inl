// Vectors of one instruction set in gcc's vector extensions, and the exponential that every kernel uses.
#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))

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
template <typename R> INLINE Vec<R> some(Vec<R> v, int n) {  // 0 from lane n on
  R part[kLanes<R>]{};
  save_some<R>(part, n, v);
  return load(part);
}
// Several accumulators: short sums then hardly round, and long ones do not wait for each other.
constexpr int kSums = kBytes >= 32 ? 4 : 8;
template <typename R> INLINE double total(const Vec<R> (&v)[kSums]) {
  typename VectorOf<R>::wide sum{};
  for (const Vec<R>& x : v) sum += __builtin_convertvector(x, typename VectorOf<R>::wide);
  double out = 0;
  for (int i = 0; i < kLanes<R>; ++i) out += sum[i];
  return out;
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
// float and 1.8e-17 in double before rounding; after it at most 1.1 ulp, 1.4 ulp without fused multiply-add. 0 below
// the smallest normal number, NaN for NaN; x <= 127 (1023) and x > -infinity are the caller's business: every weight
// is relative to a maximum.
template <typename R> INLINE Vec<R> power_of_two(Vec<R> n) {
  const R shift = sizeof(R) == 4 ? R(12582912 + 127) : R(6755399441055744.0 + 1023);  // 1.5 2^23, 1.5 2^52: the low
  return Vec<R>(typename VectorOf<R>::bits(n + shift) << (sizeof(R) == 4 ? 23 : 52));  // bits of the sum are n + bias
}

template <typename R> INLINE Vec<R> polynomial(Vec<R> f) {
  if constexpr (sizeof(R) == 4) {
    Vec<R> p = f * 1.5594678e-4f + 1.3406644e-3f;
    p = p * f + 9.6176930e-3f;
    p = p * f + 5.5503106e-2f;
    p = p * f + 2.4022653e-1f;
    p = p * f + 6.9314721e-1f;
    return p * f + 1.f;
  } else {
    Vec<R> p = f * 4.078071929588336665e-10 + 7.0725704128144235096e-9;
    p = p * f + 1.0180647659234138888e-7;
    p = p * f + 1.3215442675329822143e-6;
    p = p * f + 1.5252727385193868197e-5;
    p = p * f + 1.540353044157213033e-4;
    p = p * f + 1.3333558153439964747e-3;
    p = p * f + 9.6181291076070023796e-3;
    p = p * f + 5.5504108664790394552e-2;
    p = p * f + 2.4022650695910098007e-1;
    p = p * f + 6.9314718055994569675e-1;
    return p * f + 1.;
  }
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
// p 2^n, 0 where x was too small.
template <typename R> INLINE Vec<R> scale_(Vec<R> p, Vec<R> n, Vec<R> x) {
#ifdef KD_AVX512
  if constexpr (sizeof(R) == 4)
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(kLeast<R>), _CMP_NLT_UQ), p, n);
  else
    return _mm512_maskz_scalef_pd(_mm512_cmp_pd_mask(x, _mm512_set1_pd(kLeast<R>), _CMP_NLT_UQ), p, n);
#else
  return x < kLeast<R> ? Vec<R>{} : p * power_of_two<R>(n);
#endif
}
template <typename R> INLINE Vec<R> exp2_(Vec<R> x) {
  const Vec<R> n = round_<R>(x);
  return scale_<R>(polynomial<R>(x - n), n, x);
}
// 2^(x + low), low within the rounding of x.
template <typename R> INLINE Vec<R> exp2_(Vec<R> x, Vec<R> low) {
  const Vec<R> n = round_<R>(x);
  return scale_<R>(polynomial<R>((x - n) + low), n, x);
}

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
