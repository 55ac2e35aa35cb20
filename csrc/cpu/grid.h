// Spearman's loss of a float32 row without a sort: ranks and soft ranks from uniform bins, interpolated.
#pragma once
#include "spearman.h"

namespace kd {

constexpr int kTeacherBins = 1 << 14, kLeastBins = 1 << 12, kMostBins = 1 << 16;
constexpr double kBinsPerBandwidth = 32;
// Between entries of one bin the kernel's kink is missed, an error of up to 1 / 32: their share has to be small.
constexpr double kOwnShare = 1. / 24;
// The teacher's ranks are off by about one where a bin holds two entries, and the gradient is small where rho is near 1
// or -1: by their distance times sqrt(n).
constexpr double kLeastLoss = 256;  // over n
constexpr int64_t kCrowd = 1024;  // a bin with more than one in so many of the teacher's entries is sorted

struct Range { float low, high; MeanVariance of; uint32_t bits; };

// Finite numbers: their range, mean, variance, and which of their bits are ever set.
inline Range range_of(const float* x, int64_t n) {
  float low = x[0], high = x[0];
  uint32_t bits = 0;
  double sum = 0, squares = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(| : bits) reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
    bits |= std::bit_cast<uint32_t>(x[i]);
    sum += x[i];
  }
  const double mean = sum / double(n);
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
  return {low, high, {mean, squares / double(n)}, bits};
}

// Exact ranks of the entries in w.crowd: crowded bins are sorted together, and what lies below each run is counted from
// the run's bin on.
template <typename F> double crowd_ranks(const float* t, int64_t n, F bin_of, SpearmanScratch& w) {
  if (w.crowd.empty()) return 0;
  const int64_t m = int64_t(w.crowd.size());
  w.wide_t.resize(m);
  for (int64_t i = 0; i < m; ++i) w.wide_t[i] = t[w.crowd[i]];
  Order<float>& order = w.float_order[1];
  order.sort(w.wide_t.data(), m);
  double squares = 0, before = 0;  // entries of bins that are not crowded, below
  int64_t next = 0;
  order.runs([&](int64_t first, int64_t end) {
    float f;
    const int64_t bin = bin_of(w.wide_t[order.at(first)], &f);
    for (; next < bin; ++next) before += w.plain[next];
    const double r = 2 * before + double(first + end) - double(n);
    squares += double(end - first) * r * r;
    for (int64_t i = first; i < end; ++i) w.rank[w.crowd[order.at(i)]] = float(r);
  });
  return squares;
}

// The teacher's doubled centred ranks, and the sum of their squares: within a bin of c entries they rise by 2 c around
// the bin's mid-rank, which belongs to the mean position of its entries. Entries of crowded bins are sorted, for exact
// ranks.
inline double grid_ranks(const float* t, int64_t n, const Range& range, SpearmanScratch& w) {
  struct Bin { float count, position; };
  const float scale = kTeacherBins / (range.high - range.low), low = range.low;
  float* rank = w.rank.data();
  w.grid.assign(2 * kTeacherBins, 0);
  Bin* bins = reinterpret_cast<Bin*>(w.grid.data());
  const auto bin_of = [&](float x, float* fraction) {
    const float p = (x - low) * scale;
    const int k = std::min(int(p), kTeacherBins - 1);
    *fraction = p - float(k);
    return k;
  };
  for (int64_t i = 0; i < n; ++i) {
    float f;
    Bin& bin = bins[bin_of(t[i], &f)];
    bin.count += 1;
    bin.position += f;
  }
  const float crowd = float(std::max<int64_t>(2, n / kCrowd));
  w.plain.resize(kTeacherBins);
  double below = -double(n);
  bool crowded = false;
  for (int k = 0; k < kTeacherBins; ++k) {
    const float c = bins[k].count, middle = float(below + c);  // the rank is middle + 2 c (f - position / c)
    below += 2. * c;
    crowded |= c > crowd;
    w.plain[k] = c > crowd ? 0 : c;
    bins[k] = c > crowd ? Bin{NAN, 0} : Bin{2 * c, middle - 2 * bins[k].position};
  }
  double squares = 0;
  w.crowd.clear();
  for (int64_t i = 0; i < n; ++i) {
    float f;
    const Bin& bin = bins[bin_of(t[i], &f)];
    rank[i] = bin.count * f + bin.position;
    if (crowded && rank[i] != rank[i]) w.crowd.push_back(uint32_t(i));
    else squares += double(rank[i]) * rank[i];
  }
  return squares + crowd_ranks(t, n, bin_of, w);
}

// Each entry's count and rank are shared between the two nodes around it, and the gradient is interpolated there: both
// ways by the same weights, so that its sum is 0.
template <typename O>
double spearman_by_grid(const Pair<float>& z, const Range& s, const Range& t, int64_t bins, double tau, double g,
                        const O& out, SpearmanScratch& w) {
  w.rank.resize(z.n);
  const double squares = grid_ranks(z.t, z.n, t, w);
  const float scale = float(bins) / (s.high - s.low), low = s.low;
  const auto node_of = [&](float x, float* fraction) {
    const float p = (x - low) * scale;
    const int64_t k = std::min<int64_t>(int64_t(p), bins - 1);
    *fraction = p - float(k);
    return k;
  };
  std::vector<Two>& nodes = w.nodes;
  nodes.assign(bins + 1, Two{0, 0});
  for (int64_t i = 0; i < z.n; ++i) {
    float f;
    const int64_t k = node_of(z.s[i], &f);
    const Two here{1, w.rank[i]}, next = here * f;
    nodes[k] += here - next;
    nodes[k + 1] += next;
  }
  w.sum.resize(bins + 1, z.n);
  const double width = (double(s.high) - s.low) / double(bins);
  for (int64_t k = 0; k <= bins; ++k) w.sum.set(k, s.low + double(k) * width, nodes[k][0], nodes[k][1]);
  const double value = w.sum.loss(tau, s.of, squares, g, out.to);
  const bool small = std::min(value, 2 - value) * double(z.n) < kLeastLoss;
  if (small || w.sum.own_share > kOwnShare) return spearman_by_sort(z, z.s, z.t, tau, g, out, w);
  if (out.to)
    out.write(z, w.out, [&](int64_t i) {
      float f;
      const int64_t k = node_of(z.s[i], &f);
      const Line &a = w.sum.line[k], &b = w.sum.line[k + 1];
      return (a.slope + f * (b.slope - a.slope)) * w.rank[i] + (a.offset + f * (b.offset - a.offset));
    });
  return value;
}

// The loss of one row of any type; g times its gradient goes to `out`.
template <typename O>
double spearman_floats(const Pair<float>& z, const SpearmanOptions& o, double g, const O& out, SpearmanScratch& w) {
  const auto sorted = [&] { return spearman_by_sort(z, z.s, z.t, o.tau, g, out, w); };
  if (z.n < kSorted) return sorted();
  const Range s = range_of(z.s, z.n), t = range_of(z.t, z.n);
  if (((s.bits | t.bits) & 0xffff) == 0 && by_bits(z.n)) {  // bfloat16 numbers
    w.half_s.resize(z.n);
    w.half_t.resize(z.n);
    for (int64_t i = 0; i < z.n; ++i) {
      w.half_s[i] = uint16_t(std::bit_cast<uint32_t>(z.s[i]) >> 16);
      w.half_t[i] = uint16_t(std::bit_cast<uint32_t>(z.t[i]) >> 16);
    }
    const Pair<uint16_t> halves{w.half_s.data(), w.half_t.data(), z.n, z.at, false};
    return spearman_by_bits(halves, Type::bf16, o.tau, g, out, w);
  }
  const double bandwidth = o.tau * std::sqrt(s.of.variance), range = double(s.high) - s.low;
  const double wanted = kBinsPerBandwidth * range / bandwidth;
  const bool wide = !std::isfinite(s.high - s.low) || !std::isfinite(t.high - t.low);
  if (o.exact || wide || !(wanted < kMostBins) || !(t.high > t.low)) return sorted();
  return spearman_by_grid(z, s, t, std::max<int64_t>(kLeastBins, int64_t(wanted) + 1), o.tau, g, out, w);
}

inline double spearman_row(const Batch& x, int64_t row, const SpearmanOptions& o, double g, const RowOut& out) {
  SpearmanScratch& w = kept_by_thread<SpearmanScratch>();
  const auto finish = [&](const auto& z, auto compute) {
    if (!z.nan) return double(compute(z));
    if (out.to) out.fill(NAN);
    return double(NAN);
  };
  if (x.s.type == Type::f64 || x.t.type == Type::f64)
    return finish(w.doubles.find(x, row, o.top), [&](const auto& z) {
      return spearman_by_sort(z, z.s, z.t, o.tau, g, out, w);
    });
  if (!is_half(x.s.type) || !is_half(x.t.type))
    return finish(w.floats.find(x, row, o.top), [&](const auto& z) { return spearman_floats(z, o, g, out, w); });
  if (!x.mask && by_bits(x.vocab) && (o.top <= 0 || o.top >= x.vocab)) {  // counted before anybody looks for infinities
    const Pair<uint16_t> z = w.halves.everything(x, row);
    w.bits.count(z);
    if (w.bits.finite(x.s.type, x.t.type)) return spearman_counted(z, x.s.type, o.tau, g, out, w);
    w.bits.clear();
  }
  return finish(w.halves.find(x, row, o.top), [&](const Pair<uint16_t>& z) {
    if (by_bits(z.n)) return spearman_by_bits(z, x.s.type, o.tau, g, out, w);
    w.wide_s.resize(z.n);
    w.wide_t.resize(z.n);
    widen_all(x.s.type, z.s, z.n, w.wide_s.data());
    widen_all(x.t.type, z.t, z.n, w.wide_t.data());
    return spearman_by_sort(z, w.wide_s.data(), w.wide_t.data(), o.tau, g, out, w);
  });
}

}  // namespace kd
