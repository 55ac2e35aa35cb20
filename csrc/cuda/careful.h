// What float cannot do: sums over a row in double, relative to their largest term. For covariances, negative
// coefficients, mixtures whose heavy classes are light in both rows, points without the label's class, narrow rows.
#pragma once
#include "records.h"

namespace kd::gpu {

constexpr int kMaxWarps = 8, kMaxRanks = 16;

// The threads of a block, or of a cluster of blocks, which hold a row together. `exchange` has 2 kMaxRanks slots of
// `size` doubles: of two sums that follow each other, each has its own.
struct Team {
  double* scratch;   // kMaxWarps x 6
  double* exchange;  // null for a block alone
  int rank, ranks, size, turn;

  // Shares `n` doubles of this block, number i from thread i: slot r of the result is what block r wrote.
  KD_DEVICE const double* share(double x, int n) {
    double* slots = exchange + turn * kMaxRanks * size;
    turn ^= 1;
#ifdef KD_CLUSTERS
    if (thread() < n)
      for (int r = 0; r < ranks; ++r) store_remote(slots + rank * size + thread(), r, x);
    sync_warp();
    cluster_sync();
#endif
    return slots;
  }

  // f over all threads of the team, of up to 6 numbers; every thread gets the same bits.
  template <typename F> KD_DEVICE void all(double* x, int n, double none, F f) {
    const int warp = thread() / 32, warps = threads() / 32;
    sync();  // the last result has been read
    for (int i = 0; i < n; ++i) {
      const double y = over_warp(x[i], f);
      if (thread() % 32 == 0) scratch[warp * 6 + i] = y;
    }
    sync();
    for (int i = 0; i < n; ++i) {
      x[i] = none;
      for (int w = 0; w < warps; ++w) x[i] = f(x[i], scratch[w * 6 + i]);
    }
    if (ranks == 1) return;
    sync();
    if (thread() == 0)
      for (int i = 0; i < n; ++i) scratch[i] = x[i];
    sync();
    const double* slots = share(thread() < n ? scratch[thread()] : 0, n);
    for (int i = 0; i < n; ++i) {
      x[i] = none;
      for (int r = 0; r < ranks; ++r) x[i] = f(x[i], slots[r * size + i]);
    }
  }
};

// Statistics of one point over packs [first, end) of every member of the team; all threads get them.
template <typename S, typename T>
KD_SLOW Moments careful(Team& team, const Pair<S, T>& row, int first, int end, int64_t label, const Tilt& at,
                        int flags, double s0, double t0) {
  const auto classes = [&](auto&& visit) {
    for (int pack = first + thread(); pack < end; pack += threads()) {
      const int live = row.live(pack);
      for (int e = 0; e < kPack; ++e) {
        if (!(live >> e & 1) || (flags & EXCLUDE && row.first_class(pack) + e == label)) continue;
        const double s = row.s.at(int64_t(pack) * kPack + e), t = row.t.at(int64_t(pack) * kPack + e);
        if (s > -INFINITY || t > -INFINITY) visit(s, t, at(s - s0, t - t0));
      }
    }
  };
  double top = -INFINITY;
  classes([&](double, double, double x) { top = x > top ? x : top; });
  team.all(&top, 1, -INFINITY, [](double a, double b) { return a > b ? a : b; });
  if (top == INFINITY) return {INFINITY, 1, 0, 0, 0, 0, 0};  // a negative power of an impossible class
  if (top == -INFINITY) return Moments::empty();
  double sum[6] = {};
  classes([&](double s, double t, double x) {
    const double w = exp(x - top), u = s - s0, v = t - t0;
    if (w == 0) return;
    sum[0] += w; sum[1] += w * u; sum[2] += w * v;
    if (!(flags & SECOND)) return;
    sum[3] += w * u * u; sum[4] += w * u * v; sum[5] += w * v * v;
  });
  team.all(sum, 6, 0, [](double a, double b) { return a + b; });
  const double z = sum[0], du = sum[1] / z, dv = sum[2] / z;
  Moments x{top + scaled(at.b, s0) + scaled(at.a, t0), z, s0 + du, t0 + dv, 0, 0, 0};
  if (flags & SECOND) { x.ss = sum[3] / z - du * du; x.st = sum[4] / z - du * dv; x.tt = sum[5] / z - dv * dv; }
  return x;
}

}  // namespace kd::gpu
