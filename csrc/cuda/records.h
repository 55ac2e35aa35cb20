// Sums of warps and of blocks on their way to one: in double, relative to pivots of their own.
#pragma once
#include "sums.h"

namespace kd::gpu {

// A record of sums in double, in shared memory: a head, and z, s, t of each point.
struct Head {
  double s_max, t_max, t_at, s_at;  // the largest logits, and those of the same classes in the other row
  double s_class, t_class, odd;
  KD_DEVICE double s_pivot(const Point& p) const { return finite_or_0(p.kind == OF_T ? s_at : s_max); }
  KD_DEVICE double t_pivot(const Point& p) const { return finite_or_0(p.kind == OF_S ? t_at : t_max); }
};
constexpr int kHead = sizeof(Head) / sizeof(double);
KD_HD int record_size(int K) { return kHead + 3 * K; }

template <typename X, typename F> KD_DEVICE X over_warp(X x, F f) {
#pragma unroll
  for (int d = 16; d; d >>= 1) x = f(x, shuffle_xor(x, d));
  return x;
}
KD_DEVICE double warp_max(double x) { return over_warp(x, [](double a, double b) { return a > b ? a : b; }); }
KD_DEVICE double warp_sum(double x) { return over_warp(x, [](double a, double b) { return a + b; }); }
KD_DEVICE int warp_or(int x) { return over_warp(x, [](int a, int b) { return a | b; }); }

// The sums of a warp's threads, to `record`.
template <int K> KD_DEVICE void write_record(const Sums<K>& sums, const Point* points, int count, double* record) {
  const int odd = warp_or(sums.sum.odd);
  const bool writes = thread() % 32 == 0;
  if (writes)
    *reinterpret_cast<Head*>(record) = {sums.at.s0, sums.at.t0, sums.at.t_at, sums.at.s_at,
                                        double(sums.s_class), double(sums.t_class), double(odd)};
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (k >= count) break;
    const Point& p = points[k];
    const double z = warp_sum(sums.sum.z[k]), s = p.mean_s ? warp_sum(sums.sum.s[k]) : 0, t = p.mean_t ? warp_sum(sums.sum.t[k]) : 0;
    double* to = record + kHead + 3 * k;
    if (writes) { to[0] = z; to[1] = s; to[2] = t; }
  }
}

// One warp merges up to 32 records, `stride` doubles apart, into `total`, which may be the first of them.
KD_SLOW void merge_records(const double* records, int count, int stride, const Point* points, int K, double* total) {
  const int lane = thread() % 32;
  const double* mine = records + lane * stride;
  Head head{-INFINITY, -INFINITY, -INFINITY, -INFINITY, -1, -1, 0};
  if (lane < count) head = *reinterpret_cast<const Head*>(mine);
  const auto first_with = [&](double x) {  // the first lane that has the largest
    const double top = warp_max(x);
    return -int(warp_max(lane < count && x == top ? -lane : 1 - count));
  };
  Head all = *reinterpret_cast<const Head*>(records + first_with(head.s_max) * stride);
  const Head& by_t = *reinterpret_cast<const Head*>(records + first_with(head.t_max) * stride);
  all.t_max = by_t.t_max; all.s_at = by_t.s_at; all.t_class = by_t.t_class;
  all.odd = warp_or(int(head.odd));
  const double s0 = finite_or_0(all.s_max), t0 = finite_or_0(all.t_max);
  for (int k = 0; k < K; ++k) {
    const Point p = points[k];
    double z = 0, s = 0, t = 0;
    if (lane < count && mine[kHead + 3 * k] != 0) {
      const double f = exp2(double(p.b) * (finite_or_0(head.s_max) - s0) + double(p.a) * (finite_or_0(head.t_max) - t0));
      const double z_mine = mine[kHead + 3 * k];
      z = f * z_mine;
      s = scaled(f, mine[kHead + 1 + 3 * k] + z_mine * (head.s_pivot(p) - all.s_pivot(p)));
      t = scaled(f, mine[kHead + 2 + 3 * k] + z_mine * (head.t_pivot(p) - all.t_pivot(p)));
    }
    z = warp_sum(z); s = warp_sum(s); t = warp_sum(t);  // and every lane has read its record of this point
    if (lane == 0) { total[kHead + 3 * k] = z; total[kHead + 1 + 3 * k] = s; total[kHead + 2 + 3 * k] = t; }
  }
  if (lane == 0) *reinterpret_cast<Head*>(total) = all;
  sync_warp();
}

}  // namespace kd::gpu
