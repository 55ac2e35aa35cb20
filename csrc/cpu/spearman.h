// Spearman's loss of a row: histograms of 16-bit numbers (exact), a grid over float32 (interpolated), a sort (exact).
#pragma once
#include "lapsum.h"
#include "live.h"

namespace kd {

typedef double Two __attribute__((vector_size(16)));

struct SpearmanOptions { double tau; int64_t top; bool exact; };

// A count, and what is derived from it, for each of the 65536 bit patterns of a 16-bit type. All zero between rows.
class BitTables {
 public:
  std::vector<uint32_t> s, t;
  std::vector<int32_t> rank, own_rank;  // of the teacher's bits, of the student's
  std::vector<int64_t> ranks;  // their sum over the entries with these student's bits
  std::vector<Line> line;
  std::vector<uint16_t> used_s, used_t;  // the bits that occur, in ascending order of their numbers
  BitTables() : s(kSize), t(kSize), rank(kSize), own_rank(kSize), ranks(kSize), line(kSize) {}

  // There is no NaN in the rows; infinities count as numbers.
  void count(const Pair<uint16_t>& z) {
    for (int64_t i = 0; i < z.n; ++i) { ++s[z.s[i]]; ++t[z.t[i]]; }
    list(s, used_s);
    list(t, used_t);
  }
  // Doubled centred mid-ranks of `used` bits, and the sum of their squares.
  static int64_t ranks_of(const std::vector<uint32_t>& count, const std::vector<uint16_t>& used, int64_t n,
                          std::vector<int32_t>& rank) {
    int64_t below = 0, squares = 0;
    for (const uint16_t bits : used) {
      const int64_t c = count[bits], r = 2 * below + c - n;
      rank[bits] = int32_t(r);
      squares += c * r * r;
      below += c;
    }
    rank[0x8000] = rank[0];  // -0
    return squares;
  }
  void clear() {
    for (const uint16_t bits : used_s) { s[bits] = 0; ranks[bits] = 0; }
    for (const uint16_t bits : used_t) t[bits] = 0;
    ranks[0x8000] = 0;
  }

 private:
  static constexpr int kSize = 1 << 16;
  static void list(std::vector<uint32_t>& count, std::vector<uint16_t>& used) {
    used.clear();
    count[0] += count[0x8000];  // -0
    count[0x8000] = 0;
    constexpr int some = 32;  // looked at together: most never occur
    for (int k = 0; k < kSize; k += some) {
      const bool negative = k < 0x8000;
      const uint32_t* part = count.data() + (negative ? 0x10000 - some - k : k - 0x8000);
      typedef uint64_t Four __attribute__((vector_size(32), aligned(4), may_alias));
      Four any{};
      for (int j = 0; j < some; j += 8) any |= *reinterpret_cast<const Four*>(part + j);
      for (int j = 0; (any[0] | any[1] | any[2] | any[3]) && j < some; ++j) {
        const int64_t bits = part - count.data() + (negative ? some - 1 - j : j);
        if (count[bits]) used.push_back(uint16_t(bits));
      }
    }
  }
};

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

struct MeanVariance { double mean, variance; };
inline MeanVariance moments_of(const LapSum& z, double n) {
  double mean = 0, variance = 0;
  for (size_t m = 0; m < z.x.size(); ++m) mean += z.mass[m] * z.x[m];
  mean /= n;
  for (size_t m = 0; m < z.x.size(); ++m) variance += z.mass[m] * (z.x[m] - mean) * (z.x[m] - mean);
  return {mean, variance / n};
}

// Histograms of the bits.
template <typename O>
double spearman_by_bits(const Pair<uint16_t>& z, Type s_type, double tau, double g, const O& out, SpearmanScratch& w) {
  BitTables& b = w.bits;
  b.count(z);
  const int64_t squares = BitTables::ranks_of(b.t, b.used_t, z.n, b.rank);
  for (int64_t i = 0; i < z.n; ++i) b.ranks[z.s[i]] += b.rank[z.t[i]];
  b.ranks[0] += b.ranks[0x8000];
  const int64_t M = int64_t(b.used_s.size());
  w.wide_s.resize(M);
  widen_all(s_type, b.used_s.data(), M, w.wide_s.data());
  w.sum.clear();
  for (int64_t m = 0; m < M; ++m) {
    const uint16_t bits = b.used_s[m];
    w.sum.add(w.wide_s[m], b.s[bits], double(b.ranks[bits]));
  }
  const auto [mean, variance] = moments_of(w.sum, double(z.n));
  const double value = w.sum.loss(double(z.n), tau, mean, variance, double(squares), g, out.to);
  if (out.to) {
    for (int64_t m = 0; m < M; ++m) b.line[b.used_s[m]] = w.sum.line[m];
    b.line[0x8000] = b.line[0];
    out.write(z, w.out, [&](int64_t i) {
      const Line& line = b.line[z.s[i]];
      return line.slope * b.rank[z.t[i]] + line.offset;
    });
  }
  b.clear();
  return value;
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
  w.sum.clear();
  own.runs([&](int64_t first, int64_t end) {
    double sum = 0;
    for (int64_t i = first; i < end; ++i) {
      w.bin[own.at(i)] = uint32_t(w.sum.x.size());
      sum += rank[own.at(i)];
    }
    w.sum.add(double(s[own.at(first)]), double(end - first), sum);
  });
  const auto [mean, variance] = moments_of(w.sum, double(z.n));
  const double value = w.sum.loss(double(z.n), tau, mean, variance, double(squares), g, out.to);
  if (out.to)
    out.write(z, w.template whole<R>(), [&](int64_t i) {
      const Line& line = w.sum.line[w.bin[i]];
      return line.slope * rank[i] + line.offset;
    });
  return value;
}

}  // namespace kd
