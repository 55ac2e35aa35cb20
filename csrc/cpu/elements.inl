// A separable loss's program on a tile (kdkernels/elements.py): each instruction runs over a stretch of kStretch classes
// before the next one starts, so that its cost is that of its arithmetic and the registers stay in L1.

template <typename R> struct Ln2;  // hi has few bits: n hi is exact
template <> struct Ln2<float> { static constexpr float hi = 0.693359375f, lo = -2.12194440e-4f; };
template <> struct Ln2<double> { static constexpr double hi = 6.93147180369123816490e-01, lo = 1.90821492927058770002e-10; };

// e^x, or e^x - 1: 2^n 2^f with x = (n + f) log 2, the difference exact enough that the result has 2 ulp at any x.
template <typename R, bool MinusOne> INLINE Vec<R> exp_(Vec<R> x) {
  constexpr auto& c = Polynomial<R>::c;
  constexpr R least = sizeof(R) == 4 ? R(-104) : R(-746), most = sizeof(R) == 4 ? R(89) : R(710);
  x = min_<R>(Vec<R>{} + most, max_<R>(Vec<R>{} + least, x));  // a NaN passes
  const Vec<R> y = x * R(kLog2e), n = round_<R>(y);
  const Vec<R> f = ((x - n * Ln2<R>::hi) - n * Ln2<R>::lo) * R(kLog2e);
  Vec<R> p = f * c[0] + c[1];
  _Pragma("GCC unroll 16") for (unsigned j = 2; j + 1 < sizeof(c) / sizeof(R); ++j) p = p * f + c[j];
  p *= f;  // 2^f - 1
  const Vec<R> up = n > R(0) ? Vec<R>{} + R(1) : Vec<R>{};  // 2^n itself may overflow where the result does not
  const Vec<R> e = scale_<R>(p + R(1), n - up, y) * (up + R(1));
  if (!MinusOne) return e;
  return x > R(30) ? e : scale_<R>(p, n, y) + (scale_<R>(Vec<R>{} + R(1), n, y) - R(1));
}

template <typename R> struct Logarithm;  // the coefficients of fdlibm
template <> struct Logarithm<float> {
  static constexpr int shift = 23, bias = 127;
  static constexpr int32_t one = 0x3f800000, root = 0x3f3504f3, digits = 0x007fffff;  // root: sqrt(1/2)
  static constexpr float c[] = {0.24279078841f, 0.28498786688f, 0.40000972152f, 0.66666662693f};
};
template <> struct Logarithm<double> {
  static constexpr int shift = 52, bias = 1023;
  static constexpr int64_t one = 0x3ff0000000000000, root = 0x3fe6a09e00000000, digits = 0x000fffffffffffff;
  static constexpr double c[] = {1.479819860511658591e-01, 1.531383769920937332e-01, 1.818357216161805012e-01,
                                 2.222219843214978396e-01, 2.857142874366239149e-01, 3.999999999940941908e-01,
                                 6.666666666666735130e-01};
};
// log x, or log(1 + x): with u = 2^k (1 + f) the number, log u + the relative error of u.
template <typename R, bool OnePlus> INLINE Vec<R> log_(Vec<R> x) {
  using L = Logarithm<R>;
  using Bits = typename VectorOf<R>::bits;
  constexpr R normal = sizeof(R) == 4 ? R(1.17549435e-38f) : R(2.2250738585072014e-308), tiny = R(1 << 25);
  const Vec<R> u = OnePlus ? x + R(1) : x;
  const auto small = u < normal;
  const Bits raw = Bits(small ? u * tiny : u) + (L::one - L::root);
  const Vec<R> k = __builtin_convertvector((raw >> L::shift) - L::bias, Vec<R>) - (small ? Vec<R>{} + R(25) : Vec<R>{});
  Vec<R> f = Vec<R>((raw & L::digits) + L::root) - R(1), rest{};
  if (OnePlus) {
    rest = (k > R(0) ? R(1) - (u - x) : x - (u - R(1))) / u;
    rest = k == R(0) ? Vec<R>{} : rest;
    f = k == R(0) ? x : f;
  }
  const Vec<R> s = f / (f + R(2)), z = s * s, half = f * f * R(0.5);
  Vec<R> r = Vec<R>{} + L::c[0];
  _Pragma("GCC unroll 8") for (unsigned j = 1; j < sizeof(L::c) / sizeof(R); ++j) r = r * z + L::c[j];
  Vec<R> y = k * Ln2<R>::hi - ((half - (s * (half + r * z) + (k * Ln2<R>::lo + rest))) - f);
  y = u == R(INFINITY) ? u : y;
  y = u == R(0) ? Vec<R>{} - R(INFINITY) : y;
  return u >= R(0) ? y : Vec<R>{} + R(NAN);
}

template <typename R> INLINE Vec<R> sqrt_(Vec<R> x) {
  for (int j = 0; j < kLanes<R>; ++j) x[j] = __builtin_sqrt(x[j]);
  return x;
}

constexpr int kGroup = 4;  // vectors at a time: none waits for its own last step
template <typename R> struct Operand {
  const R* at;
  int step;  // 0: a constant
};
template <typename R, typename F> INLINE void map(int n, R* to, Operand<R> a, F f) {
  constexpr int L = kLanes<R>;
  for (int i = 0; i < n; i += kGroup * L)
    _Pragma("GCC unroll 4") for (int k = 0; k < kGroup; ++k) {
      const int j = i + k * L;
      save(to + j, f(load(a.at + j * a.step)));
    }
}
template <typename R, typename F> INLINE void map(int n, R* to, Operand<R> a, Operand<R> b, F f) {
  constexpr int L = kLanes<R>;
  for (int i = 0; i < n; i += kGroup * L)
    _Pragma("GCC unroll 4") for (int k = 0; k < kGroup; ++k) {
      const int j = i + k * L;
      save(to + j, f(load(a.at + j * a.step), load(b.at + j * b.step)));
    }
}

template <typename R> static void instruction(int op, int n, R* to, Operand<R> a, Operand<R> b, Operand<R> c) {
  using V = Vec<R>;
  constexpr R none = 0, one = 1;
  switch (op) {
    case ADD: return map(n, to, a, b, [](V x, V y) INLINE_LAMBDA { return x + y; });
    case SUB: return map(n, to, a, b, [](V x, V y) INLINE_LAMBDA { return x - y; });
    case MUL: return map(n, to, a, b, [](V x, V y) INLINE_LAMBDA { return x * y; });
    case DIV: return map(n, to, a, b, [](V x, V y) INLINE_LAMBDA { return x / y; });
    case EXP: return map(n, to, a, [](V x) INLINE_LAMBDA { return exp_<R, false>(x); });
    case EXPM1: return map(n, to, a, [](V x) INLINE_LAMBDA { return exp_<R, true>(x); });
    case LOG: return map(n, to, a, [](V x) INLINE_LAMBDA { return log_<R, false>(x); });
    case LOG1P: return map(n, to, a, [](V x) INLINE_LAMBDA { return log_<R, true>(x); });
    case SQRT: return map(n, to, a, [](V x) INLINE_LAMBDA { return sqrt_<R>(x); });
    case SOFTPLUS:
      return map(n, to, a, [](V x) INLINE_LAMBDA {
        return (x > none ? x : V{}) + log_<R, true>(exp_<R, false>(x > none ? -x : x));
      });
    case TIMES: return map(n, to, a, b, [](V x, V y) INLINE_LAMBDA { return x == none ? V{} : x * y; });
    case GT: return map(n, to, a, b, [](V x, V y) INLINE_LAMBDA { return x > y ? V{} + one : V{}; });
    case SELECT:
      for (int i = 0; i < n; i += kGroup * kLanes<R>)
        _Pragma("GCC unroll 4") for (int k = 0; k < kGroup; ++k) {
          const int j = i + k * kLanes<R>;
          save(to + j, load(a.at + j * a.step) != none ? load(b.at + j * b.step) : load(c.at + j * c.step));
        }
  }
}

// What the sums of a tile gather. Doubles: the sum of the slopes cancels against that of a class with all the weight.
template <typename R> struct Gathered {
  Vec<double> sum[5]{}, other[5]{};
  INLINE_MEMBER void add(int k, Vec<R> x) {
    if constexpr (sizeof(R) == 8) sum[k] += x;
    else { sum[k] += lower(x); other[k] += upper(x); }
  }
  double operator[](int k) const {
    return folded<double>(sum[k] + other[k], [](double a, double b) { return a + b; });
  }
};

template <typename R>
static ElementSums elements(const View<R>& x, const Elements& program, const LogWeights& w, bool both, int side, R* work,
                            R* slope) {
  constexpr int L = kLanes<R>, whole = kGroup * L;
  const int C = program.constants(), inputs = 2 * kStretch;
  R *constants = work + inputs, *scratch = constants + C * L;
  for (int i = 0; i < C; ++i) save(constants + i * L, Vec<R>{} + R(program.constant(i)));
  const auto at = [&](int r) -> Operand<R> {
    if (r < 2) return {work + r * kStretch, 1};
    return r < 2 + C ? Operand<R>{constants + (r - 2) * L, 0} : Operand<R>{scratch + (r - 2 - C) * kStretch, 1};
  };
  const R b = R(w.b), a = R(w.a), bc = R(w.log_q), ac = R(w.log_p);
  const Operand<R> phi = at(program.output(0)), of_q = at(program.output(1)), of_p = at(program.output(2));
  Gathered<R> sums;
  for (int first = 0; first < x.n; first += kStretch) {
    const int n = x.n - first < kStretch ? x.n - first : kStretch, padded = (n + whole - 1) / whole * whole;
    R *log_q = work, *log_p = work + kStretch;
    const auto read = [&](const R* from, R pivot, R by, R add, R* to) INLINE_LAMBDA {
      int i = 0;
      for (; i + L <= n; i += L) save(to + i, (load(from + i) - pivot) * by + add);
      if (i < n) save(to + i, (load_some(from + i, n - i, pivot) - pivot) * by + add), i += L;
      for (; i < padded; i += L) save(to + i, Vec<R>{});
    };
    read(x.s + first, x.s_pivot, b, bc, log_q);
    read(x.t + first, x.t_pivot, a, ac, log_p);
    for (int i = 0; i < (both ? program.length() : program.early()); ++i) {
      const double* l = program.line(i);
      instruction<R>(int(l[0]), padded, const_cast<R*>(at(int(l[1])).at), at(int(l[2])), at(int(l[3])), at(int(l[4])));
    }
    for (int i = 0; i < n; i += L) {
      const Vec<R> u = load(log_q + i), v = load(log_p + i);
      const auto dead = (u == R(-INFINITY)) & (v == R(-INFINITY));
      const auto alive = [&](const Operand<R>& of) INLINE_LAMBDA {
        const Vec<R> y = dead ? Vec<R>{} : load(of.at + i * of.step);
        return n - i < L ? some<R>(y, n - i) : y;
      };
      const Vec<R> by_q = alive(of_q), by_p = both ? alive(of_p) : Vec<R>{};
      sums.add(0, alive(phi));
      sums.add(1, by_q);
      if (both) {
        sums.add(2, by_p);
        sums.add(3, by_q == R(0) ? Vec<R>{} : by_q * u);
        sums.add(4, by_p == R(0) ? Vec<R>{} : by_p * v);
      }
      if (!slope) continue;
      const Vec<R> own = side ? by_p : by_q;
      if (n - i < L) save_some<R>(slope + first + i, n - i, own);
      else save(slope + first + i, own);
    }
  }
  return {sums[0], sums[1], sums[2], sums[3], sums[4]};
}
