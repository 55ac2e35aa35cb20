// Logits in and gradients out: 16-bit types, a first look at a tile, and stores past the caches.
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

template <bool IsBf16> INLINE Vec<float> load_half(const uint16_t* x) {
#if defined(KD_AVX512)
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  if constexpr (IsBf16) return Vec<float>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  else return _mm512_cvtph_ps(h);
#elif defined(KD_AVX2)
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  if constexpr (IsBf16) return Vec<float>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  else return _mm256_cvtph_ps(h);
#else
  return Vec<float>{widen(x[0], IsBf16), widen(x[1], IsBf16), widen(x[2], IsBf16), widen(x[3], IsBf16)};
#endif
}

struct Bf16 { uint16_t bits; };
INLINE Vec<float> load(const Bf16* x) { return load_half<true>(&x->bits); }

// The machine's own rounding to bfloat16 takes numbers below the smallest normal one for 0.
#ifdef KD_AVX512_BF16
INLINE __m256i bf16_of(Vec<float> x) { return __m256i(_mm512_cvtneps_pbh(x)); }
#elif defined(KD_AVX512)
INLINE __m256i bf16_of(Vec<float> x) {
  const __m512i u = __m512i(x), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(
      _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000)), 16));
}
#endif
#ifdef KD_AVX512
alignas(64) constexpr int16_t kAlternate[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
#endif
// G vectors of logits. Two of bfloat16 are the even and the odd entries of a line, and are put back like that.
template <int G, typename R> INLINE void load_group(const R* x, Vec<R> (&v)[G]) {
  EACH(G) v[k] = load(x + k * kLanes<R>);
}
template <int G> INLINE void load_group(const Bf16* x, Vec<float> (&v)[G]) {
#ifdef KD_AVX512
  if constexpr (G == 2) {
    const __m512i line = _mm512_loadu_si512(x);
    v[0] = Vec<float>(_mm512_slli_epi32(line, 16));
    v[1] = Vec<float>(_mm512_and_si512(line, _mm512_set1_epi32(int(0xffff0000))));
    return;
  }
#endif
  EACH(G) v[k] = load(x + k * kLanes<float>);
}
// The first n entries of a vector, then zeros.
template <typename R> INLINE void copy_some(const R* x, int n, R* to) { save(to, load_some(x, n, R(0))); }
INLINE void copy_some(const Bf16* x, int n, Bf16* to) {
#ifdef KD_AVX512
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), x));
#else
  for (int j = 0; j < kLanes<float>; ++j) to[j].bits = j < n ? x[j].bits : 0;
#endif
}
template <int G> INLINE void save_group(const Vec<float> (&x)[G], bool stream, Bf16* out) {
#ifdef KD_AVX512
  if constexpr (G == 2) {
    const __m512i halves = _mm512_inserti64x4(_mm512_castsi256_si512(bf16_of(x[0])), bf16_of(x[1]), 1);
    const __m512i line = _mm512_permutexvar_epi16(_mm512_load_si512(kAlternate), halves);
    if (stream) return _mm512_stream_si512(reinterpret_cast<__m512i*>(out), line);
    return _mm512_storeu_si512(out, line);
  }
  EACH(G) _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16 * k), bf16_of(x[k]));
#else
  EACH(G) for (int j = 0; j < kLanes<float>; ++j) out[k * kLanes<float> + j].bits = to_bf16(x[k][j]);
#endif
}
static int many_to_bf16(const float* x, int n, uint16_t* out) {
  int i = 0;
#ifdef KD_AVX512
  for (; i + 16 <= n; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), bf16_of(_mm512_loadu_ps(x + i)));
#endif
  return i;
}
static int many_to_half(const float* x, int n, uint16_t* out) {
  int i = 0;
#if defined(KD_AVX512)
  for (; i + 16 <= n; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm512_cvtps_ph(_mm512_loadu_ps(x + i), 0));
#elif defined(KD_AVX2)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), 0));
#endif
  return i;
}

// The largest finite entry, and whether there are special ones. Two of each, which do not wait for each other.
template <typename R> struct Extremes {
  Vec<R> high[2], low[2];
  Extremes() {
    for (int k : {0, 1}) { high[k] = Vec<R>{} - R(INFINITY); low[k] = Vec<R>{} + R(INFINITY); }
  }
  INLINE_MEMBER void see(int k, Vec<R> v) { high[k] = max_<R>(v, high[k]); low[k] = min_<R>(v, low[k]); }
  bool result(R* max) const {
    const auto larger = [](R a, R b) { return a > b ? a : b; };
    const R h = folded<R>(max_<R>(high[0], high[1]), larger);
    const R l = folded<R>(min_<R>(low[0], low[1]), [&](R a, R b) { return -larger(-a, -b); });
    *max = h;
    return !(l >= -kHuge && h <= kHuge);
  }
};

template <typename R> static bool peak(const R* x, int n, R* max) {
  constexpr int L = kLanes<R>;
  Extremes<R> all;
  int i = 0;
  for (; i + 2 * L <= n; i += 2 * L) { all.see(0, load(x + i)); all.see(1, load(x + i + L)); }
  for (; i < n; i += L) all.see(0, n - i < L ? load_some(x + i, n - i, x[i]) : load(x + i));
  return all.result(max);
}

// The bits of a number, as an integer, grow with it once those of a negative one are flipped below the sign.
#ifdef KD_AVX512
INLINE __m512i key_of(__m512i v) {
  return _mm512_xor_si512(v, _mm512_and_si512(_mm512_srai_epi16(v, 15), _mm512_set1_epi16(0x7fff)));
}
static bool look_bf16(const Bf16* x, int n, float* max) {
  __m512i high[2], low[2];
  EACH(2) high[k] = low[k] = key_of(_mm512_set1_epi16(int16_t(x[0].bits)));
  int i = 0;
  for (; i + 64 <= n; i += 64) {
    __m512i key[2];
    EACH(2) key[k] = key_of(_mm512_loadu_si512(x + i + 32 * k));
    EACH(2) high[k] = _mm512_max_epi16(high[k], key[k]);
    EACH(2) low[k] = _mm512_min_epi16(low[k], key[k]);
  }
  for (; i < n; i += 32) {
    const __mmask32 here = n - i >= 32 ? ~0u : (1u << (n - i)) - 1;
    const __m512i key = key_of(_mm512_mask_loadu_epi16(_mm512_set1_epi16(int16_t(x[0].bits)), here, x + i));
    high[0] = _mm512_max_epi16(high[0], key);
    low[0] = _mm512_min_epi16(low[0], key);
  }
  const __m512i h = _mm512_max_epi16(high[0], high[1]), l = _mm512_min_epi16(low[0], low[1]);
  const auto half = [](__m512i v, bool upper) {
    return _mm512_cvtepi16_epi32(upper ? _mm512_extracti64x4_epi64(v, 1) : _mm512_castsi512_si256(v));
  };
  const auto number = [](int key) { return widen(uint16_t(key ^ ((key >> 15) & 0x7fff)), true); };
  *max = number(_mm512_reduce_max_epi32(_mm512_max_epi32(half(h, false), half(h, true))));
  return !(number(_mm512_reduce_min_epi32(_mm512_min_epi32(half(l, false), half(l, true)))) >= -kHuge && *max <= kHuge);
}
#else
static bool look_bf16(const Bf16* x, int n, float* max) {
  Extremes<float> all;
  int i = 0;
  for (; i + kLanes<float> <= n; i += kLanes<float>) all.see(0, load(x + i));
  for (; i < n; ++i) all.see(0, Vec<float>{} + widen(x[i].bits, true));
  return all.result(max);
}
#endif
template <typename R> static bool look(Type type, const void* x, int n, R* max) {
  if constexpr (sizeof(R) == 4) {
    if (type == Type::bf16) return look_bf16(static_cast<const Bf16*>(x), n, max);
  }
  return peak(static_cast<const R*>(x), n, max);
}

template <bool IsBf16> static bool widen_half(const uint16_t* x, int n, float* out, float* max) {
  constexpr int L = kLanes<float>;
  Extremes<float> all;
  int i = 0;
  for (; i + 2 * L <= n; i += 2 * L)
    for (int k : {0, 1}) {
      const Vec<float> v = load_half<IsBf16>(x + i + k * L);
      save(out + i + k * L, v);
      all.see(k, v);
    }
  for (; i < n; ++i) {
    out[i] = widen(x[i], IsBf16);
    all.see(0, Vec<float>{} + out[i]);
  }
  return all.result(max);
}

template <typename R> static bool widen_all(Type type, const void* x, int n, R* out, R* max) {
  const uint16_t* half = static_cast<const uint16_t*>(x);
  if constexpr (sizeof(R) == 4) {
    if (type == Type::bf16) return widen_half<true>(half, n, out, max);
    if (type == Type::f16) return widen_half<false>(half, n, out, max);
  }
  if (type == Type::f32)
    for (int i = 0; i < n; ++i) out[i] = static_cast<const float*>(x)[i];
  else if (type == Type::f64)
    for (int i = 0; i < n; ++i) out[i] = R(static_cast<const double*>(x)[i]);
  else
    for (int i = 0; i < n; ++i) out[i] = widen(half[i], type == Type::bf16);
  return peak(out, n, max);
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
    int i = 0;
    if constexpr (sizeof(R) == 4) i = type == Type::bf16 ? many_to_bf16(x, n, half) : many_to_half(x, n, half);
    if (type == Type::bf16)
      for (; i < n; ++i) half[i] = to_bf16(float(x[i]));
    else
      for (; i < n; ++i) half[i] = to_half(float(x[i]));
    copy_out(half, n, static_cast<uint16_t*>(out), stream);
  }
}
