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
    const double x = (b != 0 ? b * (s - s_pivot) : 0.) + ((a != 0 ? a * (t - t_pivot) : 0.) + c);
    const bool dead = (s == -R(INFINITY)) & (t == -R(INFINITY));
    return dead ? -INFINITY : x;
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
    split(y < -2000 ? -2000 : y, w + i, low + i);  // below the least exponent: 0, and a rest of 0
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

template <typename R, Kind K> struct Weigh {
  R b, a, c;
  double bs, at, constant;
  // w[k] = 2^exponent of the lanes at s + k kLanes, t + k kLanes; u, v: the same relative to the pivots.
  template <int G> INLINE_MEMBER void operator()(const R* s, const R* t, const Vec<R> (&u)[G], const Vec<R> (&v)[G],
                                                 Vec<R> (&w)[G]) const {
    if constexpr (K == MIXED) {
      for (int k = 0; k < G; ++k) w[k] = exp2_of_sum(s + k * kLanes<R>, t + k * kLanes<R>, bs, at, constant);
    } else {
      EACH(G) w[k] = K == STUDENT ? u[k] * b + c : K == TEACHER ? v[k] * a + c : Vec<R>{} + c;
      exp2_<R, G>(w);
    }
  }
};
template <typename R, Kind K> INLINE Weigh<R, K> weigh_of(const View<R>& x, const Exponent& e) {
  return {R(e.b), R(e.a), R(e.c), e.b, e.a, e.c - e.b * x.s_pivot - e.a * x.t_pivot};
}

// Vectors that are worked on side by side, and the accumulators they add to.
template <int Size, int Slot> struct Group { static constexpr int size = Size, slot = Slot; };

// f(group, s, t, u, v, n, i) over a tile: the vectors at s, t are classes i and following, of which n count; u = s -
// s_pivot, v = t - t_pivot.
template <bool U, bool V, typename R, typename Src, typename F> INLINE void each_group(const View<R, Src>& view, F f) {
  const View<R, Src> x = view;  // copies that a store cannot change
  constexpr int L = kLanes<R>;
  const auto group = [&](auto which, const Src* s, const Src* t, int n, int i) INLINE_LAMBDA {
    constexpr int G = decltype(which)::size;
    Vec<R> u[G], v[G];
    EACH(G) u[k] = U ? load(s + k * L) - x.s_pivot : Vec<R>{};
    EACH(G) v[k] = V ? load(t + k * L) - x.t_pivot : Vec<R>{};
    f(which, s, t, u, v, n, i);
  };
  int i = 0;
  for (; i + kSums * L <= x.n; i += kSums * L) {
    if (U) for (int j = 0; j < kSums * L * x.s_bytes; j += 64) __builtin_prefetch(x.s_next + i * x.s_bytes + j);
    if (V) for (int j = 0; j < kSums * L * x.t_bytes; j += 64) __builtin_prefetch(x.t_next + i * x.t_bytes + j);
    [&]<int... J>(std::integer_sequence<int, J...>) INLINE_LAMBDA {
      (group(Group<2, 2 * J>{}, x.s + i + 2 * J * L, x.t + i + 2 * J * L, L, i + 2 * J * L), ...);
    }(std::make_integer_sequence<int, kSums / 2>{});
  }
  // Each to its own accumulator: a short row's sum then hardly rounds.
  [&]<int... J>(std::integer_sequence<int, J...>) INLINE_LAMBDA {
    ((i + L <= x.n ? group(Group<1, J>{}, x.s + i, x.t + i, L, i), i += L : 0), ...);
  }(std::make_integer_sequence<int, kSums - 1>{});
  if (const int n = x.n - i) {
    Src s[L]{}, t[L]{};
    if (U) for (int j = 0; j < n; ++j) s[j] = x.s[i + j];
    if (V) for (int j = 0; j < n; ++j) t[j] = x.t[i + j];
    group(Group<1, kSums - 1>{}, s, t, n, i);
  }
}

template <typename R, Kind K, bool S, bool T> static TileSums<R> fast_sums(const View<R>& x, const Exponent& e) {
  const Weigh<R, K> weigh = weigh_of<R, K>(x, e);
  constexpr bool U = S || K == STUDENT || K == MIXED, V = T || K == TEACHER || K == MIXED;
  Vec<R> z[kSums]{}, s[kSums]{}, t[kSums]{};
  each_group<U, V>(x, [&](auto group, const R* at_s, const R* at_t, const auto& u, const auto& v, int n,
                          int) INLINE_LAMBDA {
    constexpr int G = decltype(group)::size, to = decltype(group)::slot;
    Vec<R> w[G];
    weigh.template operator()<G>(at_s, at_t, u, v, w);
    if (n < kLanes<R>) w[0] = some<R>(w[0], n);
    EACH(G) {
      z[to + k] += w[k];
      if (S) s[to + k] += w[k] * u[k];
      if (T) t[to + k] += w[k] * v[k];
    }
  });
  return {total<R>(z), S ? total<R>(s) : 0, T ? total<R>(t) : 0, 0, 0, 0};
}

// A point of the student's beside one of the teacher's, M of which wants its means: the usual first two.
template <typename R, Kind M> static void pair_sums(const View<R>& x, const Exponent& q, const Exponent& p,
                                                    TileSums<R>* out) {
  const R b = R(q.b), bc = R(q.c), a = R(p.a), ac = R(p.c);
  Vec<R> zq[2]{}, zp[2]{}, s[2]{}, t[2]{};
  each_group<true, true>(x, [&](auto group, const R*, const R*, const auto& u, const auto& v, int n,
                                int) INLINE_LAMBDA {
    constexpr int G = decltype(group)::size;
    constexpr int odd = decltype(group)::slot % 2;
    EACH(G) {
      const int to = G == 2 ? k : odd;
      Vec<R> w[2] = {u[k] * b + bc, v[k] * a + ac};
      exp2_<R, 2>(w);
      if (n < kLanes<R>) { w[0] = some<R>(w[0], n); w[1] = some<R>(w[1], n); }
      zq[to] += w[0];
      zp[to] += w[1];
      if (M == NEITHER) continue;
      s[to] += w[M == TEACHER] * u[k];
      t[to] += w[M == TEACHER] * v[k];
    }
  });
  out[0].z = total<R>(zq);
  out[1].z = total<R>(zp);
  if (M != NEITHER) { out[M == TEACHER].s = total<R>(s); out[M == TEACHER].t = total<R>(t); }
}

template <typename R>
static TileSums<R> sums(const View<R>& x, const Exponent& e, int flags, bool special, R* scratch) {
  const Kind kind = kind_of(e);
  const bool second = flags & SECOND, means = flags & (MEAN_S | MEAN_T);
  if (special || second || (kind == MIXED && means)) {
    weights(x, e, scratch);
    return kind == MIXED ? careful_sums<double>(x, scratch, second) : careful_sums<R>(x, scratch, second);
  }
  switch (kind << 2 | ((flags & MEAN_S) != 0) << 1 | ((flags & MEAN_T) != 0)) {
#define CASE(k) case k: return fast_sums<R, Kind((k) >> 2), ((k) >> 1 & 1) != 0, ((k) & 1) != 0>(x, e);
    CASE(0) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
  }
  return {};
}

// The same for points 0 and 1 where they are the usual two and the tile is an ordinary one.
template <typename R> static bool pair(const View<R>& x, const Exponent* e, const int* flags, TileSums<R>* out) {
  constexpr int kMeans = MEAN_S | MEAN_T;
  const bool of_q = flags[0] & kMeans, of_p = flags[1] & kMeans;
  if (kBytes < 64 || (of_q && of_p) || ((flags[0] | flags[1]) & (SECOND | EXCLUDE))) return false;  // too few registers
  if (kind_of(e[0]) != STUDENT || kind_of(e[1]) != TEACHER) return false;
  of_q ? pair_sums<R, STUDENT>(x, e[0], e[1], out)
       : of_p ? pair_sums<R, TEACHER>(x, e[0], e[1], out) : pair_sums<R, NEITHER>(x, e[0], e[1], out);
  return true;
}

// What a point adds to the gradient: w (c[0] + c[1] u + c[2] v + c[3] u^2 + c[4] u v + c[5] v^2).
template <typename R> struct Term {
  Exponent e;
  R c[6];
  bool linear() const { return c[1] != 0 || c[2] != 0; }
  bool second() const { return c[3] != 0 || c[4] != 0 || c[5] != 0; }
  bool none() const { return e.c == -INFINITY || (c[0] == 0 && !linear() && !second()); }
};
template <typename R> INLINE Term<R> term_of(const double* coef, double g) {
  Term<R> out{{coef[1] * kLog2e, coef[2] * kLog2e, coef[0] * kLog2e}, {}};
  for (int j = 0; j < 6; ++j) out.c[j] = R(coef[3 + j] * g);
  return out;
}

template <typename R> static void careful_spread(const View<R>& x, const R* w, const R* c, bool first, R* out) {
#pragma omp simd
  for (int i = 0; i < x.n; ++i) {
    const R u = x.s[i] - x.s_pivot, v = x.t[i] - x.t_pivot;
    R q = c[0] + (c[1] != 0 ? c[1] * u : R(0)) + (c[2] != 0 ? c[2] * v : R(0));
    q += (c[3] != 0 ? c[3] * u * u : R(0)) + (c[4] != 0 ? c[4] * u * v : R(0)) + (c[5] != 0 ? c[5] * v * v : R(0));
    out[i] = (first ? R(0) : out[i]) + (w[i] == 0 ? R(0) : w[i] * q);
  }
}

// A group's slopes: n of them count; `first` overwrites; `stream` past the caches.
template <typename R, int G>
INLINE void put(const Vec<R> (&d)[G], int n, bool first, bool stream, R* out) {
  EACH(G) {
    R* to = out + k * kLanes<R>;
    if (n < kLanes<R>) save_some<R>(to, n, first ? d[k] : load_some(to, n, R(0)) + d[k]);
    else if (stream) save_past(to, d[k]);
    else save(to, first ? d[k] : load(to) + d[k]);
  }
}
template <typename R, int G> INLINE void put(const Vec<R> (&d)[G], int n, bool, bool stream, Bf16* out) {
  if (n < kLanes<R>) {
    for (int j = 0; j < n; ++j) out[j].bits = to_bf16(d[0][j]);
  } else {
    save_bf16<G>(d, stream, out);
  }
}

template <typename R, bool L> static void mixed_spread(const View<R>& x, const Term<R>& term, bool first, R* out) {
  const Weigh<R, MIXED> weigh = weigh_of<R, MIXED>(x, term.e);
  const R c[3] = {term.c[0], term.c[1], term.c[2]};
  each_group<true, true>(x, [&](auto group, const R* s, const R* t, const auto& u, const auto& v, int n,
                                int i) INLINE_LAMBDA {
    constexpr int G = decltype(group)::size;
    Vec<R> w[G];
    weigh.template operator()<G>(s, t, u, v, w);
    EACH(G) w[k] *= L ? u[k] * c[1] + (v[k] * c[2] + c[0]) : Vec<R>{} + c[0];
    put<R, G>(w, n, first, false, out + i);
  });
}

// Terms of one loop: NS of the student's and NT of the teacher's.
template <typename R> struct Together {
  Term<R> s[2], t[1];
  int ns = 0, nt = 0;
  bool linear = false;
  bool take(const Term<R>& term) {
    const bool of_t = term.e.a != 0;
    if (term.second() || is_mixture(term.e.b, term.e.a) || (of_t ? nt == 1 : ns == 2)) return false;
    (of_t ? t[nt++] : s[ns++]) = term;
    linear |= term.linear();
    return true;
  }
};

template <int NS, int NT, bool L, typename R, typename Src>
static void fast_spread(const View<R, Src>& x, const Together<R>& terms, bool first, bool stream, Src* out) {
  constexpr int K = NS + NT;
  R by[K], add[K], c[K][3];
  for (int j = 0; j < K; ++j) {
    const Term<R>& term = j < NS ? terms.s[j] : terms.t[0];
    by[j] = R(j < NS ? term.e.b : term.e.a);
    add[j] = R(term.e.c);
    for (int i : {0, 1, 2}) c[j][i] = term.c[i];
  }
  each_group<L || NS != 0, L || NT != 0>(x, [&](auto group, const Src*, const Src*, const auto& u, const auto& v, int n,
                                                int i) INLINE_LAMBDA {
    constexpr int G = decltype(group)::size;
    Vec<R> d[G]{};
    _Pragma("GCC unroll 3") for (int j = 0; j < K; ++j) {
      Vec<R> w[G];
      EACH(G) w[k] = (j < NS ? u[k] : v[k]) * by[j] + add[j];
      exp2_<R, G>(w);
      EACH(G) d[k] += w[k] * (L ? u[k] * c[j][1] + (v[k] * c[j][2] + c[j][0]) : Vec<R>{} + c[j][0]);
    }
    put<R, G>(d, n, first, stream, out + i);
  });
}

template <typename R, typename Src>
static void spread_together(const View<R, Src>& x, const Together<R>& terms, bool first, bool stream, Src* out) {
  switch (terms.ns << 2 | terms.nt << 1 | terms.linear) {
#define CASE(ns, nt) \
  case ns << 2 | nt << 1: return fast_spread<ns, nt, false>(x, terms, first, stream, out); \
  case ns << 2 | nt << 1 | 1: return fast_spread<ns, nt, true>(x, terms, first, stream, out);
    CASE(1, 0) CASE(2, 0) CASE(0, 1) CASE(1, 1) CASE(2, 1)
#undef CASE
  }
}

template <typename R>
static void spread(const View<R>& x, const double* coef, int K, double g, bool special, bool first, R* scratch, R* out) {
  Together<R> terms;
  const auto flush = [&] {
    if (terms.ns + terms.nt == 0) return;
    spread_together(x, terms, first, false, out);
    first = false;
    terms = {};
  };
  for (int k = 0; k < K; ++k) {
    const Term<R> term = term_of<R>(coef + k * kCoefs, g);
    if (term.none()) continue;
    if (special || term.second()) {
      weights(x, term.e, scratch);
      careful_spread(x, scratch, term.c, first, out);
      first = false;
    } else if (kind_of(term.e) == MIXED) {
      term.linear() ? mixed_spread<R, true>(x, term, first, out) : mixed_spread<R, false>(x, term, first, out);
      first = false;
    } else if (!terms.take(term)) {
      flush();
      terms.take(term);
    }
  }
  flush();
  if (first)
    for (int i = 0; i < x.n; ++i) out[i] = 0;
}

template <typename R, typename Src>
static bool through_as(const View<R>& x, const Together<R>& terms, bool stream, void* out) {
  constexpr int size = sizeof(Src);
  if (stream && uintptr_t(out) % 64) return false;
  const View<R, Src> raw{reinterpret_cast<const Src*>(x.s_next - x.n * size), reinterpret_cast<const Src*>(
      x.t_next - x.n * size), x.n, x.s_pivot, x.t_pivot, x.s_next, x.t_next, size, size};
  spread_together(raw, terms, true, stream, static_cast<Src*>(out));
  return true;
}
template <typename R>
static bool through(Type type, const View<R>& x, const double* coef, int K, double g, bool stream, void* out) {
  Together<R> terms;
  for (int k = 0; k < K; ++k) {
    const Term<R> term = term_of<R>(coef + k * kCoefs, g);
    if (!term.none() && !terms.take(term)) return false;
  }
  if (terms.ns + terms.nt == 0) return false;
  if constexpr (sizeof(R) == 4) {
    if (type == Type::bf16) return through_as<R, Bf16>(x, terms, stream, out);
    if (type == Type::f32 && uintptr_t(out) % 4 == 0) return through_as<R, R>(x, terms, stream, out);
  }
  return false;
}

extern const Tiles<float> f32 = {widen_all, store, peak, top, sums, pair, spread, through, exp2_all};
extern const Tiles<double> f64 = {widen_all, store, peak, top, sums, pair, spread, through, exp2_all};
