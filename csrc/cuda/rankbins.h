// Scans over the bins of Spearman's loss by a block of threads: ranks, soft ranks, and the gradient's line in each bin.
#pragma once
#include "ranks.h"

namespace kd::gpu {

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

// The sum of masses, and of e^(-rate distance) mass at a position x; none yet where x is NaN.
struct Decaying {
  double x, sum, plain;
  KD_DEVICE double at(double y, double rate) const { return x == x ? sum * exp(-fabs(y - x) * rate) : 0; }
};
KD_DEVICE Decaying shuffled(Decaying x, int d) { return {shuffle_xor(x.x, d), shuffle_xor(x.sum, d), shuffle_xor(x.plain, d)}; }

KD_DEVICE Decaying decayed_before_thread(Decaying run, double rate, Decaying* parts) {
  return before_thread(run, Decaying{NAN, 0, 0}, parts, [&](const Decaying& p, const Decaying& q) {
    return q.x == q.x ? Decaying{q.x, p.at(q.x, rate) + q.sum, p.plain + q.plain} : p;
  });
}

// f(slot, number) of this thread's bins that occur, ascending or descending.
template <bool kUp, typename Z, typename F> KD_DEVICE void walk(const Z& z, F f) {
  constexpr int chunk = Z::kBins / kRankThreads;
  const int from = (kUp ? thread() : kRankThreads - 1 - thread()) * chunk;
#pragma unroll 1
  for (int k = 0; k < chunk; ++k) {
    const int bin = from + (kUp ? k : chunk - 1 - k), slot = z.slot(bin);
    if (z.count(slot)) f(slot, double(z.number(bin)));
  }
}

// each(slot, number, decayed sum of what is before it, plain one) of the bins that occur. All threads pass barriers.
template <bool kUp, typename Z, typename Mass, typename Each>
KD_DEVICE void sweep(const Z& z, double rate, void* parts, Mass mass, Each each) {
  Decaying run{NAN, 0, 0};
  const auto add = [&](int slot, double x) { run = {x, run.at(x, rate) + mass(slot), run.plain + mass(slot)}; };
  walk<kUp>(z, add);
  run = decayed_before_thread(run, rate, static_cast<Decaying*>(parts));
  walk<kUp>(z, [&](int slot, double x) {
    const double before = run.at(x, rate), plain = run.plain;
    add(slot, x);
    each(slot, x, before, plain);
  });
  sync();
}

// Counts become doubled centred ranks, as int32. Returns how many there are, and the sum of the ranks' squares.
template <typename Z> KD_DEVICE int64_t rank_table(const Z& z, void* parts, int64_t* squares) {
  constexpr int chunk = Z::kBins / kRankThreads;
  const int from = thread() * chunk;
  int64_t mine = 0, sum = 0;
  for (int bin = from; bin < from + chunk; ++bin) mine += z.table[z.slot(bin)];
  const int64_t n = block_sum(mine, static_cast<int64_t*>(parts));
  int64_t below = count_before_thread(mine, parts);
#pragma unroll 1
  for (int bin = from; bin < from + chunk; ++bin) {
    uint32_t* const entry = z.table + z.slot(bin);
    const int64_t c = *entry, r = centred_rank(below, c, n);
    if (c) *entry = uint32_t(int32_t(r));
    sum += c * r * r;
    below += c;
  }
  *squares = block_sum(sum, static_cast<int64_t*>(parts));
  return n;
}

// The loss; false where it has no gradient. That is, in each bin, K rank + G, times g.
template <typename Z>
KD_DEVICE bool correlate(const Z& z, double n, double tau, double squares, double g, void* parts, double* value) {
  double* const sums = static_cast<double*>(parts);
  float *const R = z.R(), *const K = z.K(), *const G = z.G();
  double mean = 0, variance = 0, own = 0, joint = 0, radial = 0, some = 0;
  walk<true>(z, [&](int i, double x) { mean += z.count(i) * x; some += 1; });
  mean = block_sum(mean, sums) / n;
  some = block_sum(some, sums);
  walk<true>(z, [&](int i, double x) { variance += z.count(i) * (x - mean) * (x - mean); });
  variance = block_sum(variance, sums) / n;
  *value = 1;
  if (some < 2 || !(variance > 0) || !(squares > 0)) return false;
  const double a = tau * sqrt(variance), rate = 1 / a, share = 1 / n;
  const auto mass = [&](int i) { return z.count(i) * share; };
  const auto ranks = [&](int i) { return z.ranks(i) * (share * share / 2); };
  sweep<true>(z, rate, parts, mass, [&](int i, double, double before, double plain) {
    R[i] = float(plain - before);
    K[i] = float(before);
  });
  sweep<false>(z, rate, parts, mass, [&](int i, double, double above, double plain) {
    const double m = mass(i), r = soft_rank(R[i], plain - above);
    R[i] = float(r);
    K[i] += float(m + above);
    own += m * r * r;
    joint += r * ranks(i);
  });
  own = block_sum(own, sums);
  joint = block_sum(joint, sums);
  if (!(own > 0)) return false;
  const Correlation c(n, a, own, joint, squares);
  *value = 1 - c.rho;
  if (g == 0) return false;
  const auto slope = [&](int i) { return c.slope(mass(i), ranks(i), R[i]); };
  sweep<true>(z, rate, parts, slope, [&](int i, double, double before, double) { G[i] = float(before); });
  sweep<false>(z, rate, parts, slope, [&](int i, double x, double above, double) {
    const Line line = c.line(R[i], K[i], G[i] + slope(i) + above);
    radial += (x - mean) * (line.slope * ranks(i) + mass(i) * line.offset);
    K[i] = float(line.slope);
    G[i] = float(line.offset);
  });
  radial = block_sum(radial, sums) / variance;
  walk<true>(z, [&](int i, double x) {
    const Line line = finished({K[i], G[i]}, n, g, radial, x - mean);
    K[i] = float(line.slope);
    G[i] = float(line.offset);
  });
  sync();
  return true;
}

}  // namespace kd::gpu
