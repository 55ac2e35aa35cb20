// Spearman's loss of 16-bit rows: what its kernels share (ranks.cu). Bits of the numbers are binned, nothing is sorted.
#pragma once
#include "../softrank.h"
#include "row.h"

namespace kd::gpu {

constexpr int kRankThreads = 512, kRankBits = 21;  // of a packed sum, the low bits count
constexpr int kWindow = 8192, kSmallest = 103 << 7;  // bfloat16 numbers from 2^-24 to 2^8 and 0, in shared memory
constexpr int kBitPatterns = 1 << 16;
constexpr int kRankParts = 24 * kRankThreads / 32;  // bytes of shared memory that sums and scans of a block need

struct RankTask {
  Matrix s, t;
  const int64_t* labels;
  const uint8_t* mask;
  int64_t rows, vocab, ignore, width;
  double tau;
  const double* grad;  // null: the value alone
  int64_t grad_step;
  double* value;
  void* out;
  int* left;      // (N): rows that the window does not hold are for the kernel with all bit patterns; null: all are
  char* scratch;  // of that kernel, kRankScratch bytes a block
};
constexpr int64_t kRankScratch = kBitPatterns * int64_t(4 + 8 + 3 * 4);

// form: 0 picks, 1 does without clusters. Blocks of the kernel with all bit patterns: each has its scratch.
int spearman(const RankTask& task, int form, void* stream);
int spearman_blocks(const RankTask& task, int form);

// What a label says of a row: whether it counts, and whether it is one.
struct Asked {
  bool kept, strange;
  double g;
  KD_DEVICE Asked(const RankTask& p, int64_t n) {
    const int64_t y = p.labels ? p.labels[n] : 0;
    kept = !p.labels || y != p.ignore;
    strange = kept && p.labels && (y < 0 || y >= p.vocab) && y != kElsewhere;
    g = p.grad && kept && !strange ? p.grad[n * p.grad_step] : 0;
  }
};

// A pair of rows of 16-bit numbers; each of a format of its own.
struct HalfRows {
  const uint16_t *s, *t;
  const uint8_t* mask;
  int s_infinity, t_infinity;

  static KD_DEVICE int infinity(Type type) { return type == Type::bf16 ? 0x7f80 : 0x7c00; }
  KD_DEVICE HalfRows(const RankTask& p, int64_t n)
      : s(static_cast<const uint16_t*>(p.s.data) + p.s.offset(n)), t(static_cast<const uint16_t*>(p.t.data) + p.t.offset(n)),
        mask(p.mask), s_infinity(infinity(p.s.type)), t_infinity(infinity(p.t.type)) {}
  KD_DEVICE bool live(int64_t i, int x, int y, bool* spoilt) const {
    if (mask && !mask[i]) return false;
    const bool bad = (x & 0x7fff) > s_infinity || x == s_infinity || (y & 0x7fff) > t_infinity || y == t_infinity;
    *spoilt |= bad;
    return !bad && x != (s_infinity | 0x8000) && y != (t_infinity | 0x8000);
  }
  // f(first, count, both rows' bits) of eight classes at a time, fewer at the end; begin is a multiple of 8.
  template <typename F> KD_DEVICE void packs(int64_t begin, int64_t end, F f) const {
    const bool whole = aligned(s) && aligned(t);
    for (int64_t i = begin + 8 * thread(); i < end; i += 8 * threads()) {
      const int count = end - i < 8 ? int(end - i) : 8;
      union { Bytes16 all; uint16_t one[8]; } x{}, y{};
      if (whole && count == 8) {
        x.all = load16(s + i);
        y.all = load16(t + i);
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e)
          if (e < count) { x.one[e] = s[i + e]; y.one[e] = t[i + e]; }
      }
      f(i, count, x.one, y.one);
    }
  }
  // f(both bits) of the live ones of classes [begin, end). True where one of this thread's spoils the row.
  template <typename F> KD_DEVICE bool each_live(int64_t begin, int64_t end, F f) const {
    bool spoilt = false;
    packs(begin, end, [&](int64_t i, int count, const uint16_t* x, const uint16_t* y) {
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (e < count && live(i + e, x[e], y[e], &spoilt)) f(x[e], y[e]);
    });
    return spoilt;
  }
};

// A row of the gradient, in a 16-bit format; `begin` of what is written is a multiple of 8.
struct HalfOut {
  uint16_t* to;
  bool bf16;
  KD_DEVICE HalfOut(const RankTask& p, int64_t n)
      : to(static_cast<uint16_t*>(p.out) + n * p.width), bf16(p.s.type == Type::bf16) {}
  KD_DEVICE void put(int64_t i, int count, const float* d) const {
    union { Bytes16 all; uint16_t one[8]; } x{};
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      BF16 wide;
      F16 fine;
      narrow(d[e], &wide);
      narrow(d[e], &fine);
      x.one[e] = bf16 ? wide.bits : fine.bits;
    }
    if (count == 8 && aligned(to)) return store16(to + i, x.all);
#pragma unroll
    for (int e = 0; e < 8; ++e)
      if (e < count) to[i + e] = x.one[e];
  }
  // d to classes [begin, end) below vocab, 0 to the others.
  KD_DEVICE void fill(int64_t begin, int64_t end, int64_t vocab, float d) const {
    for (int64_t i = begin + 8 * thread(); i < end; i += 8 * threads()) {
      float x[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) x[e] = i + e < vocab ? d : 0;
      put(i, end - i < 8 ? int(end - i) : 8, x);
    }
  }
};

// Sum over the block; `parts` has room for a number of each warp. All threads pass barriers.
template <typename X> KD_DEVICE X block_sum(X x, X* parts) {
  x = over_warp(x, [](X a, X b) { return a + b; });
  sync();
  if (thread() % 32 == 0) parts[thread() / 32] = x;
  sync();
  x = 0;
  for (int w = 0; w < threads() / 32; ++w) x += parts[w];
  return x;
}

// What stands before a thread's x, f(earlier, later) being associative and `none` its identity.
template <typename X, typename F> KD_DEVICE X before_thread(X x, X none, X* parts, F f) {
  const int lane = thread() % 32;
  X mine = none;
  for (int d = 1; d < 32; d *= 2) {
    const X other = shuffled(x, d);
    if (lane & d) mine = f(other, mine);
    x = lane & d ? f(other, x) : f(x, other);
  }
  sync();
  if (lane == 0) parts[thread() / 32] = x;
  sync();
  X all = none;
  for (int w = 0; w < thread() / 32; ++w) all = f(all, parts[w]);
  return f(all, mine);
}

struct Count { int64_t n; };
KD_DEVICE Count shuffled(Count x, int d) { return {shuffle_xor(x.n, d)}; }
KD_DEVICE int64_t count_before_thread(int64_t n, void* parts) {
  return before_thread(Count{n}, Count{0}, static_cast<Count*>(parts), [](Count a, Count b) { return Count{a.n + b.n}; }).n;
}

// The sum of masses, and of e^(-distance / a) mass at a position x; none yet where x is NaN.
struct Decaying {
  double x, sum, plain;
  KD_DEVICE double at(double y, double a) const { return x == x ? sum * exp(-fabs(y - x) / a) : 0; }
};
KD_DEVICE Decaying shuffled(Decaying x, int d) { return {shuffle_xor(x.x, d), shuffle_xor(x.sum, d), shuffle_xor(x.plain, d)}; }

// each(bin, decayed sum before it, plain one) of the bins that occur, in one direction. All threads pass barriers.
template <bool kUp, typename Z, typename Mass, typename Each>
KD_DEVICE void sweep(const Z& z, double a, void* parts, Mass mass, Each each) {
  const int chunk = Z::kBins / threads(), from = (kUp ? thread() : threads() - 1 - thread()) * chunk;
  const auto bins = [&](auto f) {
    for (int k = 0; k < chunk; ++k) {
      const int bin = from + (kUp ? k : chunk - 1 - k);
      if (z.count(bin)) f(bin, double(z.number(bin)));
    }
  };
  const Decaying none{NAN, 0, 0};
  Decaying run = none;
  bins([&](int bin, double x) { run = {x, run.at(x, a) + mass(bin), run.plain + mass(bin)}; });
  run = before_thread(run, none, static_cast<Decaying*>(parts), [&](const Decaying& p, const Decaying& q) {
    return q.x == q.x ? Decaying{q.x, p.at(q.x, a) + q.sum, p.plain + q.plain} : p;
  });
  bins([&](int bin, double x) {
    const double before = run.at(x, a);
    each(bin, before, run.plain);
    run = {x, before + mass(bin), run.plain + mass(bin)};
  });
  sync();
}

}  // namespace kd::gpu
