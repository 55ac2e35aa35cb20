// The sums of a tile's weights.

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
    if (U) load_group<G>(s, u);
    if (V) load_group<G>(t, v);
    EACH(G) u[k] = U ? u[k] - x.s_pivot : Vec<R>{};
    EACH(G) v[k] = V ? v[k] - x.t_pivot : Vec<R>{};
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
    Src s[L], t[L];
    if (U) copy_some(x.s + i, n, s);
    if (V) copy_some(x.t + i, n, t);
    group(Group<1, kSums - 1>{}, s, t, n, i);
  }
}

template <typename R, Kind K, bool S, bool T, typename Src>
static TileSums<R> fast_sums(const View<R, Src>& x, const Exponent& e) {
  const Weigh<R, K> weigh = weigh_of<R, K>(x, e);
  constexpr bool U = S || K == STUDENT || K == MIXED, V = T || K == TEACHER || K == MIXED;
  Vec<R> z[kSums]{}, s[kSums]{}, t[kSums]{};
  each_group<U, V>(x, [&](auto group, const Src* at_s, const Src* at_t, const auto& u, const auto& v, int n,
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
template <Kind M, typename R, typename Src>
static void pair_sums(const View<R, Src>& x, const Exponent& q, const Exponent& p, TileSums<R>* out) {
  const R b = R(q.b), bc = R(q.c), a = R(p.a), ac = R(p.c);
  Vec<R> zq[2]{}, zp[2]{}, s[2]{}, t[2]{};
  each_group<true, true>(x, [&](auto group, const Src*, const Src*, const auto& u, const auto& v, int n,
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

template <typename R, typename Src>
static TileSums<R> unmixed_sums(const View<R, Src>& x, const Exponent& e, int flags) {
  switch (kind_of(e) << 2 | ((flags & MEAN_S) != 0) << 1 | ((flags & MEAN_T) != 0)) {
#define CASE(k) case k: return fast_sums<R, Kind((k) >> 2), ((k) >> 1 & 1) != 0, ((k) & 1) != 0>(x, e);
    CASE(0) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11)
#undef CASE
  }
  return {};
}

// A mixture's, with the means of both rows, in double (see slope_at); z too, or its rounding would stand in the
// logarithm where hardly anything else is left of the loss.
template <typename R> static TileSums<R> mixed_sums(const View<R>& x, const Exponent& e) {
  const Weigh<R, MIXED> weigh = weigh_of<R, MIXED>(x, e);
  const double s_pivot = x.s_pivot, t_pivot = x.t_pivot;
  Vec<double> z[4]{}, s[4]{}, t[4]{};
  each_group<true, true>(x, [&](auto group, const R* at_s, const R* at_t, const auto& u, const auto& v, int n,
                                int) INLINE_LAMBDA {
    constexpr int G = decltype(group)::size, L = kLanes<R>;
    Vec<R> w[G];
    weigh.template operator()<G>(at_s, at_t, u, v, w);
    if (n < L) w[0] = some<R>(w[0], n);
    EACH(G) {
      const int sum = 2 * (k % 2);
      if constexpr (sizeof(R) == 8) {
        z[sum] += w[k];
        s[sum] += w[k] * (load(at_s + k * L) - s_pivot);
        t[sum] += w[k] * (load(at_t + k * L) - t_pivot);
      } else {
        z[sum] += lower(w[k]);
        z[sum + 1] += upper(w[k]);
        s[sum] += lower(w[k]) * (lower(load(at_s + k * L)) - s_pivot);
        s[sum + 1] += upper(w[k]) * (upper(load(at_s + k * L)) - s_pivot);
        t[sum] += lower(w[k]) * (lower(load(at_t + k * L)) - t_pivot);
        t[sum + 1] += upper(w[k]) * (upper(load(at_t + k * L)) - t_pivot);
      }
    }
  });
  return {total<double>(z), total<double>(s), total<double>(t), 0, 0, 0};
}

template <typename R>
static TileSums<R> sums(const View<R>& x, const Exponent& e, int flags, bool special, R* scratch) {
  const Kind kind = kind_of(e);
  const bool second = flags & SECOND, careful = special || (kind == MIXED && (second || far(x, e)));
  if (careful || second) {
    careful ? weights(x, e, scratch) : plain_weights(x, e, scratch);
    return kind == MIXED ? careful_sums<double>(x, scratch, second) : careful_sums<R>(x, scratch, second);
  }
  if (kind != MIXED) return unmixed_sums(x, e, flags);
  return flags & (MEAN_S | MEAN_T) ? mixed_sums(x, e) : fast_sums<R, MIXED, false, false>(x, e);
}

// What is in memory, where a tile's own copy is not wanted.
template <typename Src, typename R> INLINE View<R, Src> in_memory(const View<R>& x) {
  constexpr int size = sizeof(Src);
  return {reinterpret_cast<const Src*>(x.s_next - x.n * size), reinterpret_cast<const Src*>(x.t_next - x.n * size),
          x.n, x.s_pivot, x.t_pivot, x.s_next, x.t_next, size, size};
}

template <typename R, typename Src>
static void ordinary_sums(const View<R, Src>& x, const Exponent* e, const int* flags, int K, TileSums<R>* out) {
  constexpr int kMeans = MEAN_S | MEAN_T;
  int k = 0;
  if (kBytes == 64 && K > 1 && kind_of(e[0]) == STUDENT && kind_of(e[1]) == TEACHER) {  // else too few registers
    const bool of_q = flags[0] & kMeans, of_p = flags[1] & kMeans;
    if (!of_q && !of_p) pair_sums<NEITHER>(x, e[0], e[1], out);
    else if (!of_q) pair_sums<TEACHER>(x, e[0], e[1], out);
    else if (!of_p) pair_sums<STUDENT>(x, e[0], e[1], out);
    k = of_q && of_p ? 0 : 2;
  }
  for (; k < K; ++k) out[k] = unmixed_sums(x, e[k], flags[k]);
}

template <typename R>
static void sums_through(Type type, const View<R>& x, const Exponent* e, const int* flags, int K, TileSums<R>* out) {
  if constexpr (sizeof(R) == 4) {
    if (type == Type::bf16) return ordinary_sums(in_memory<Bf16>(x), e, flags, K, out);
  }
  ordinary_sums(in_memory<R>(x), e, flags, K, out);
}
