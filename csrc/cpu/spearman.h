// Spearman's loss of a row: histograms of 16-bit numbers (exact), a grid over float32 (interpolated), a sort (exact).
#pragma once
#include <cstring>
#include <span>

#include "lapsum.h"
#include "live.h"

namespace kd {

constexpr int64_t kSorted = 4096;  // shorter rows are sorted: the tables would cost more

typedef double Two __attribute__((vector_size(16)));

struct SpearmanOptions { double tau; int64_t top; bool exact; };

// A class costs 6 bytes of memory, and of these tables in the caches two increments and three look-ups: count t, add
// rank(t) to s, and write line(s) at rank(t).
//
// Histograms over the 65536 bit patterns of a 16-bit type: the teacher's counts, and of the entries with the same student
// bits their count and the sum of their ranks, one number. All zero between rows.
class BitTables {
 public:
  std::vector<int32_t> rank, own_rank;  // doubled and centred, of the teacher's bits and of the student's
  std::vector<Line> line;
  std::vector<ShortLine> short_line;
  std::span<const uint16_t> used_s, used_t;  // the bits that occur, in ascending order of their numbers
  int64_t squares;                           // the sum of the teacher's squared ranks
  BitTables()
      : rank(kSize), own_rank(kSize), line(kSize), short_line(kSize), s_(kSize), t_(kSize), found_s_(kSize),
        found_t_(kSize) {}

  // So few that the sum of ranks fits below the count.
  static constexpr int64_t kMost = 1 << 20;

  // Infinities and NaN count as numbers: the ends of used_s and used_t tell.
  void count(const Pair<uint16_t>& z) {
    int64_t i = 0;
    for (; i + kLine <= z.n; i += kLine) {
      __builtin_prefetch(z.t + i + kAhead);
      for (int j = 0; j < kLine; j += 4) {
        const uint64_t t = four(z.t + i + j);
        for (int k = 0; k < 64; k += 16) ++t_[t >> k & 0xffff];
      }
    }
    for (; i < z.n; ++i) ++t_[z.t[i]];
    used_t = list(t_, found_t_);
    squares = ranks_of(used_t, z.n, [&](uint16_t bits) { return t_[bits]; }, rank);
    for (i = 0; i + kLine <= z.n; i += kLine) {
      __builtin_prefetch(z.s + i + kAhead);
      // One by one, unlike t: beside the look-up shifting costs more than the loads it saves.
#pragma GCC unroll 8
      for (int k = 0; k < kLine; ++k) s_[z.s[i + k]] += kOne + rank[z.t[i + k]];
    }
    for (; i < z.n; ++i) s_[z.s[i]] += kOne + rank[z.t[i]];
    used_s = list(s_, found_s_);
  }
  bool finite(Type s, Type t) const { return finite(used_s, Special(s)) && finite(used_t, Special(t)); }
  // f(line of the student's bits, rank of the teacher's) to d, of n entries.
  template <typename F> void each(const uint16_t* s, const uint16_t* t, int n, float* d, F f) const {
    int i = 0;
    for (; i + 4 <= n; i += 4) {
      const uint64_t a = four(s + i), b = four(t + i);
      for (int k = 0; k < 4; ++k) {
        const int shift = 16 * (std::endian::native == std::endian::little ? k : 3 - k);
        d[i + k] = f(line[a >> shift & 0xffff], rank[b >> shift & 0xffff]);
      }
    }
    for (; i < n; ++i) d[i] = f(line[s[i]], rank[t[i]]);
  }
  int64_t own_count(uint16_t bits) const { return (s_[bits] + kOne / 2) >> kShift; }
  int64_t ranks(uint16_t bits) const { return s_[bits] - own_count(bits) * kOne; }
  // To own_rank; the sum of their squares.
  int64_t own_ranks(int64_t n) {
    return ranks_of(used_s, n, [&](uint16_t bits) { return own_count(bits); }, own_rank);
  }
  void clear() {
    for (const uint16_t bits : used_s) s_[bits] = 0;
    for (const uint16_t bits : used_t) t_[bits] = 0;
  }

 private:
  static constexpr int kSize = 1 << 16, kShift = 42;
  static constexpr int64_t kOne = int64_t(1) << kShift;
  static constexpr int kLine = 32, kAhead = 1024;  // entries of a cache's line; what the hardware alone fetches too late
  std::vector<int64_t> s_;
  std::vector<uint32_t> t_;
  std::vector<uint16_t> found_s_, found_t_;

  static bool finite(std::span<const uint16_t> used, Special of) {
    return used.empty() || !(of.any(used.front()) || of.any(used.back()));
  }
  // One load: where little else is done for each the number of them is the bound.
  static uint64_t four(const uint16_t* x) {
    uint64_t all;
    std::memcpy(&all, x, sizeof all);
    return all;
  }
  template <typename F>
  static int64_t ranks_of(std::span<const uint16_t> used, int64_t n, F count, std::vector<int32_t>& rank) {
    int64_t below = 0, squares = 0;
    for (const uint16_t bits : used) {
      const int64_t c = count(bits), r = centred_rank(below, c, n);
      rank[bits] = int32_t(r);
      squares += c * r * r;
      below += c;
    }
    rank[0x8000] = rank[0];  // -0
    return squares;
  }
  template <typename C> static std::span<const uint16_t> list(std::vector<C>& count, std::vector<uint16_t>& used) {
    size_t found = 0;
    count[0] += count[0x8000];  // -0
    count[0x8000] = 0;
    constexpr int some = 32;  // looked at together: most never occur
    for (int k = 0; k < kSize; k += some) {
      const bool negative = k < 0x8000;
      const C* part = count.data() + (negative ? 0x10000 - some - k : k - 0x8000);
      C any = 0;
      for (int j = 0; j < some; ++j) any |= part[j];
      for (int j = 0; any && j < some; ++j) {
        const int64_t bits = part - count.data() + (negative ? some - 1 - j : j);
        used[found] = uint16_t(bits);
        found += count[bits] != 0;  // a branch would often be mispredicted
      }
    }
    return {used.data(), found};
  }
};

inline bool by_bits(int64_t n) { return n >= kSorted && n <= BitTables::kMost; }

struct SpearmanScratch {
  LapSum sum;
  BitTables bits;
  Live<uint16_t> halves;
  Live<float> floats;
  Live<double> doubles;
  Order<float> float_order[2];
  Order<double> double_order[2];
  std::vector<float> rank, wide_s, wide_t, out;
  std::vector<double> double_rank, double_out;
  std::vector<uint32_t> bin;
  std::vector<uint16_t> half_s, half_t;
  std::vector<float> grid, plain;
  std::vector<uint32_t> crowd;
  std::vector<Two> nodes;

  template <typename R> Order<R>& order(int i) { return either<R>(float_order[i], double_order[i]); }
  template <typename R> std::vector<R>& ranks() { return either<R>(rank, double_rank); }
  template <typename R> std::vector<R>& whole() { return either<R>(out, double_out); }
};

// Of the histograms of the bits.
template <typename O>
double spearman_counted(const Pair<uint16_t>& z, Type s_type, double tau, double g, const O& out, SpearmanScratch& w) {
  BitTables& b = w.bits;
  const int64_t M = int64_t(b.used_s.size());
  w.wide_s.resize(M);
  widen_all(s_type, b.used_s.data(), M, w.wide_s.data());
  w.sum.resize(M, z.n);
  for (int64_t m = 0; m < M; ++m) {
    const uint16_t bits = b.used_s[m];
    w.sum.set(m, w.wide_s[m], double(b.own_count(bits)), double(b.ranks(bits)));
  }
  const double value = w.sum.loss(tau, w.sum.moments(), double(b.squares), g, out.to);
  if (out.to) {
    const auto place = [&]<typename L>(std::vector<L>& table) {
      using R = decltype(L::slope);
      for (int64_t m = 0; m < M; ++m) table[b.used_s[m]] = {R(w.sum.line[m].slope), R(w.sum.line[m].offset)};
      table[0x8000] = table[0];
    };
    const auto slope = [](const Line& line, int32_t rank) { return float(line.slope * rank + line.offset); };
    place(b.line);
    if (z.at) {
      out.write(z, w.out, [&](int64_t i) { return slope(b.line[z.s[i]], b.rank[z.t[i]]); });
    } else if (out.type == Type::bf16) {
      place(b.short_line);
      out.template put_tiles<float>([&](int64_t first, int n, float* d) {
        const uint16_t *s = z.s + first, *t = z.t + first;
        int32_t doubtful[kTile + 16];
        const int found = tiles<float>().lines(s, t, n, b.short_line.data(), b.rank.data(), d, doubtful);
        if (found == n) return b.each(s, t, n, d, slope);
        for (int k = 0; k < found; ++k) d[doubtful[k]] = slope(b.line[s[doubtful[k]]], b.rank[t[doubtful[k]]]);
      });
    } else {
      out.template put_tiles<float>([&](int64_t i, int n, float* d) { b.each(z.s + i, z.t + i, n, d, slope); });
    }
  }
  b.clear();
  return value;
}
template <typename O>
double spearman_by_bits(const Pair<uint16_t>& z, Type s_type, double tau, double g, const O& out, SpearmanScratch& w) {
  w.bits.count(z);
  return spearman_counted(z, s_type, tau, g, out, w);
}

// Sorted: the definition, whatever the numbers are.
template <typename R, typename T, typename O>
double spearman_by_sort(const Pair<T>& z, const R* s, const R* t, double tau, double g, const O& out,
                        SpearmanScratch& w) {
  auto &own = w.template order<R>(0), &other = w.template order<R>(1);
  auto& rank = w.template ranks<R>();
  rank.resize(z.n);
  w.bin.resize(z.n);
  own.sort(s, z.n);
  other.sort(t, z.n);
  const int64_t squares = centred_ranks(other, rank.data());
  w.sum.resize(z.n, z.n);
  int64_t bins = 0;
  own.runs([&](int64_t first, int64_t end) {
    double sum = 0;
    for (int64_t i = first; i < end; ++i) {
      w.bin[own.at(i)] = uint32_t(bins);
      sum += rank[own.at(i)];
    }
    w.sum.set(bins++, double(s[own.at(first)]), double(end - first), sum);
  });
  w.sum.resize(bins, z.n);
  const double value = w.sum.loss(tau, w.sum.moments(), double(squares), g, out.to);
  if (out.to)
    out.write(z, w.template whole<R>(), [&](int64_t i) {
      const Line& line = w.sum.line[w.bin[i]];
      return line.slope * rank[i] + line.offset;
    });
  return value;
}

}  // namespace kd
