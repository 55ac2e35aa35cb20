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
  int64_t rows, ignore;
  int vocab, width;
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

enum { OUTSIDE = 1, SPOILT = 2 };  // of a class: a number without a bin, a NaN or +inf

// A pair of rows of 16-bit numbers; each of a format of its own.
struct HalfRows {
  const uint16_t *s, *t;
  const uint8_t* mask;
  int s_infinity, t_infinity;

  static KD_DEVICE int infinity(Type type) { return type == Type::bf16 ? 0x7f80 : 0x7c00; }
  KD_DEVICE HalfRows(const RankTask& p, int64_t n)
      : s(static_cast<const uint16_t*>(p.s.data) + p.s.offset(n)), t(static_cast<const uint16_t*>(p.t.data) + p.t.offset(n)),
        mask(p.mask), s_infinity(infinity(p.s.type)), t_infinity(infinity(p.t.type)) {}
  // f(first, count, those of eight classes that the mask keeps, both rows' bits) of classes [begin, end), fewer at the
  // end; begin is a multiple of 8.
  template <typename F> KD_DEVICE void packs(int begin, int end, F f) const {
    const bool whole = aligned(s) && aligned(t);
    for (int i = begin + 8 * thread(); i < end; i += 8 * threads()) {
      const int count = end - i < 8 ? end - i : 8;
      int use = (1 << count) - 1;
      union { Bytes16 all; uint16_t one[8]; } x{}, y{};
      if (whole && count == 8) {
        x.all = load16(s + i);
        y.all = load16(t + i);
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e)
          if (e < count) { x.one[e] = s[i + e]; y.one[e] = t[i + e]; }
      }
      for (int e = 0; mask && e < count; ++e) use &= ~(int(!mask[i + e]) << e);
      f(i, count, use, x.one, y.one);
    }
  }
  // f(slots of both) of the live classes that the table z has bins for. Of this thread's others: OUTSIDE, SPOILT or both.
  template <typename Z, typename F> KD_DEVICE int each_live(const Z& z, int begin, int end, F f) const {
    int odd = 0;
    packs(begin, end, [&](int, int, int use, const uint16_t* x, const uint16_t* y) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        int i, j;
        if (!(use >> e & 1)) continue;
        if (z.find(x[e], s_infinity, &i) & z.find(y[e], t_infinity, &j)) f(i, j);
        else odd |= beyond(x[e], y[e]);
      }
    });
    return odd;
  }

 private:
  KD_DEVICE int beyond(int x, int y) const {
    if ((x & 0x7fff) > s_infinity || x == s_infinity || (y & 0x7fff) > t_infinity || y == t_infinity) return SPOILT;
    return x == (s_infinity | 0x8000) || y == (t_infinity | 0x8000) ? 0 : OUTSIDE;
  }
};

// A row of the gradient, in a 16-bit format; `begin` of what is written is a multiple of 8.
struct HalfOut {
  uint16_t* to;
  bool bf16;
  KD_DEVICE HalfOut(const RankTask& p, int64_t n)
      : to(static_cast<uint16_t*>(p.out) + n * p.width), bf16(p.s.type == Type::bf16) {}
  KD_DEVICE void put(int i, int count, const float* d) const {
    union { Bytes16 all; uint16_t one[8]; } x;
#pragma unroll
    for (int k = 0; k < 4; ++k)
      x.all.word[k] = bf16 ? narrow2(d[2 * k], d[2 * k + 1], static_cast<BF16*>(nullptr))
                           : narrow2(d[2 * k], d[2 * k + 1], static_cast<F16*>(nullptr));
    if (count == 8 && aligned(to)) return store16(to + i, x.all);
#pragma unroll
    for (int e = 0; e < 8; ++e)
      if (e < count) to[i + e] = x.one[e];
  }
  // d to classes [begin, end) below vocab, 0 to the others.
  KD_DEVICE void fill(int begin, int end, int vocab, float d) const {
    for (int i = begin + 8 * thread(); i < end; i += 8 * threads()) {
      float x[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) x[e] = i + e < vocab ? d : 0;
      put(i, end - i < 8 ? end - i : 8, x);
    }
  }
};

}  // namespace kd::gpu
