// One copy compiled for each instruction set, in vectors of its width. No flag of -ffast-math: infinities and NaN keep
// their meaning.
#include "vector.inl"
#include "memory.inl"

// The exponent in double, from the logits themselves: its terms may cancel, and the heaviest class may be far from both
// maxima; reduce and spread must agree on what is left.
struct Raw {
  double b, a, c;
  double s_pivot, t_pivot;
  template <typename R> INLINE_MEMBER double operator()(R s, R t) const {
    const double x = (b != 0 ? b * (s - s_pivot) : 0.) + (a != 0 ? a * (t - t_pivot) : 0.);
    const bool dead = (s == -R(INFINITY)) & (t == -R(INFINITY));
    return dead ? -INFINITY : x + c;  // c last: less the largest x it is 0 exactly
  }
};

template <typename R> static double top(const View<R>& x, const Exponent& e) {
  const Raw raw{e.b, e.a, e.c, double(x.s_pivot), double(x.t_pivot)};
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
  const Raw raw{e.b, e.a, e.c, double(x.s_pivot), double(x.t_pivot)};
  R* low = w + kTile;
#pragma omp simd
  for (int i = 0; i < x.n; ++i) {
    const double y = raw(x.s[i], x.t[i]);
    split(y < -2000 ? -2000 : not_above_0(y), w + i, low + i);  // below the least exponent: 0, and a rest of 0
  }
  exp2_split(w, x.n);
}

// The same of an ordinary tile and one row's logits.
template <typename R> static void plain_weights(const View<R>& x, const Exponent& e, R* w) {
  const R *own = e.a != 0 ? x.t : x.s, pivot = e.a != 0 ? x.t_pivot : x.s_pivot, by = R(e.a != 0 ? e.a : e.b), c = R(e.c);
#pragma omp simd
  for (int i = 0; i < x.n; ++i) w[i] = (own[i] - pivot) * by + c;
  exp2_all(w, x.n, w);
}

// E: the precision of u and v (see slope_at); the sums are in double, u^2 will cancel against the squared mean.
template <typename E, typename R> static TileSums<R> careful_sums(const View<R>& x, const R* w, bool second) {
  double z = 0, s = 0, t = 0, ss = 0, st = 0, tt = 0;
  const R *at_s = x.s, *at_t = x.t;  // gcc loads through x only where it is sure to need to, class by class
  const E s_pivot = x.s_pivot, t_pivot = x.t_pivot;
#pragma omp simd reduction(+ : z, s, t)
  for (int i = 0; i < x.n; ++i) {
    const double u = at_s[i] - s_pivot, v = at_t[i] - t_pivot;
    z += w[i];
    s += w[i] == 0 ? 0. : w[i] * u;
    t += w[i] == 0 ? 0. : w[i] * v;
  }
  if (second)
#pragma omp simd reduction(+ : ss, st, tt)
    for (int i = 0; i < x.n; ++i) {
      const double u = at_s[i] - s_pivot, v = at_t[i] - t_pivot;
      ss += w[i] == 0 ? 0. : w[i] * u * u;
      st += w[i] == 0 ? 0. : w[i] * u * v;
      tt += w[i] == 0 ? 0. : w[i] * v * v;
    }
  return {z, s, t, ss, st, tt};
}

// A single term with a positive coefficient is heaviest at the maximum and needs no double; a mixture's exponent does.
enum Kind { NEITHER, STUDENT, TEACHER, MIXED };
INLINE Kind kind_of(const Exponent& e) { return is_mixture(e.b, e.a) ? MIXED : Kind((e.b != 0) | (e.a != 0) << 1); }

template <typename R, Kind K> struct Weigh {
  R b, a, c;
  double bs, at, constant;
  // w[k] = 2^exponent of the lanes at s + k kLanes, t + k kLanes; u, v: the same relative to the pivots.
  template <int G, typename Src> INLINE_MEMBER void operator()(const Src* s, const Src* t, const Vec<R> (&u)[G],
                                                               const Vec<R> (&v)[G], Vec<R> (&w)[G]) const {
    if constexpr (K == MIXED) {
      for (int k = 0; k < G; ++k) w[k] = exp2_of_sum(s + k * kLanes<R>, t + k * kLanes<R>, bs, at, constant);
    } else {
      EACH(G) w[k] = K == STUDENT ? u[k] * b + c : K == TEACHER ? v[k] * a + c : Vec<R>{} + c;
      exp2_<R, G>(w);
    }
  }
};
template <typename R, Kind K, typename Src> INLINE Weigh<R, K> weigh_of(const View<R, Src>& x, const Exponent& e) {
  return {R(e.b), R(e.a), R(e.c), e.b, e.a, e.c - e.b * x.s_pivot - e.a * x.t_pivot};
}

// Whether only the differences of the logits from the pivots are small enough for an exponent.
template <typename R> INLINE bool far(const View<R>& x, const Exponent& e) {
  if (!is_mixture(e.b, e.a)) return e.c > kFar;
  return e.c > kFarMixed || std::fabs(e.b * x.s_pivot) + std::fabs(e.a * x.t_pivot) > 1e6;
}

static int lines(const uint16_t* a, const uint16_t* b, int n, const ShortLine* line, const int32_t* rank, float* out,
                 int32_t* doubtful) {
  int i = 0, found = 0;
#ifdef KD_AVX512
  const auto bits = [](const uint16_t* x) INLINE_LAMBDA {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  };
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1)), half = _mm512_set1_epi32(0x8000);
  const __m512i place = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  // Of each term two roundings, and of their sum three: 5 2^-24 of the terms at most.
  const __m512 unit = _mm512_set1_ps(6 * 0x1p-24f), least = _mm512_set1_ps(0x1p-126f);
  for (; i + 16 <= n; i += 16) {  // one load for each line and each rank
    const __m512i k = bits(a + i), low = _mm512_i32gather_epi64(_mm512_castsi512_si256(k), line, sizeof *line);
    const __m512i high = _mm512_i32gather_epi64(_mm512_extracti64x4_epi64(k, 1), line, sizeof *line);
    const __m512 slope = _mm512_castsi512_ps(_mm512_permutex2var_epi32(low, even, high));
    const __m512 offset = _mm512_castsi512_ps(_mm512_permutex2var_epi32(low, odd, high));
    const __m512 r = _mm512_cvtepi32_ps(_mm512_i32gather_epi32(bits(b + i), rank, sizeof *rank));
    const __m512 term = _mm512_mul_ps(slope, r), d = _mm512_add_ps(term, offset);
    const __m512 error = _mm512_fmadd_ps(_mm512_add_ps(_mm512_abs_ps(term), _mm512_abs_ps(offset)), unit, least);
    const __m512i least_d = _mm512_add_epi32(_mm512_castps_si512(_mm512_sub_ps(d, error)), half);
    const __m512i most_d = _mm512_add_epi32(_mm512_castps_si512(_mm512_add_ps(d, error)), half);
    const __mmask16 differ =
        _mm512_test_epi32_mask(_mm512_xor_si512(least_d, most_d), _mm512_set1_epi32(int(0xffff0000)));
    _mm512_storeu_ps(out + i, d);
    if (__builtin_expect(!differ, true)) continue;
    const __m512i here = _mm512_add_epi32(place, _mm512_set1_epi32(i));
    _mm512_storeu_si512(doubtful + found, _mm512_maskz_compress_epi32(differ, here));
    found += __builtin_popcount(differ);
  }
#endif
  for (; i < n; ++i) doubtful[found++] = i;
  return found;
}

#include "sums.inl"
#include "spread.inl"
#include "elements.inl"
#include "columns.inl"
#include "lapsum.inl"

#define COLUMNS {highest, shares, deviations, add_up, products, slope_sum, class_slopes, lesser, sum_of, \
                 centred, row_slopes, apart, signs}
extern const Tiles<float> f32 = {widen_all, store, peak, top, sums, look, sums_through, spread, through, exp2_all,
                                  lines, bin_moments, soft_ranks, rank_lines, elements, COLUMNS};
extern const Tiles<double> f64 = {widen_all, store, peak, top, sums, look, sums_through, spread, through, exp2_all,
                                  lines, bin_moments, soft_ranks, rank_lines, elements, COLUMNS};
#undef COLUMNS
