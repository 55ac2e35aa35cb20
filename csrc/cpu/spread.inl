// The gradient of a tile.

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
  const R *s = x.s, *t = x.t, s_pivot = x.s_pivot, t_pivot = x.t_pivot;
#pragma omp simd
  for (int i = 0; i < x.n; ++i) {
    const R u = s[i] - s_pivot, v = t[i] - t_pivot;
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
    save_group<G>(d, stream, out);
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
    const double b = j < NS ? term.e.b : term.e.a;
    by[j] = R(b);
    add[j] = R(term.e.c);
    for (int i : {0, 1, 2}) c[j][i] = term.c[i];
    if (term.e.c > 0) {  // beside a label that the point leaves out; the weight is 1 far from the pivot, at -c / b
      const double rest = term.e.c - add[j] - (b - by[j]) * term.e.c / b;
      for (R& x : c[j]) x *= R(1 + rest / kLog2e);
    }
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
    const bool careful = special || far(x, term.e) || (term.second() && kind_of(term.e) == MIXED);
    if (careful || term.second()) {
      careful ? weights(x, term.e, scratch) : plain_weights(x, term.e, scratch);
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

template <typename R>
static bool through(Type type, const View<R>& x, const double* coef, int K, double g, bool stream, void* out) {
  Together<R> terms;
  for (int k = 0; k < K; ++k) {
    const Term<R> term = term_of<R>(coef + k * kCoefs, g);
    if (!term.none() && !terms.take(term)) return false;
  }
  if (terms.ns + terms.nt == 0 || (stream && uintptr_t(out) % 64)) return false;
  if constexpr (sizeof(R) == 4) {
    if (type == Type::bf16)
      return spread_together(in_memory<Bf16>(x), terms, true, stream, static_cast<Bf16*>(out)), true;
    if (type == Type::f32) return spread_together(in_memory<R>(x), terms, true, stream, static_cast<R*>(out)), true;
  }
  return false;
}
