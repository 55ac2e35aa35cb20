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
KD_DEVICE double warp_sum(double x) { return over_warp(x, [](double a, double b) { return a + b; }); }
// Over the threads of a block, in an order that depends on nothing but their number; `parts` has room for one of each
// warp. All threads pass a barrier.
KD_DEVICE double sum_of_threads(double x, double* parts) {
  x = warp_sum(x);
  if (thread() % 32 == 0) parts[thread() / 32] = x;
  sync();
  x = 0;
  for (int w = 0; w < threads() / 32; ++w) x += parts[w];
  return x;
}
KD_DEVICE int warp_or(int x) { return over_warp(x, [](int a, int b) { return a | b; }); }

// The block's pivots become each thread's. `heads` has room for one of each warp; all threads pass a barrier.
template <int K> KD_DEVICE void settle(Sums<K>& sums, const Point* points, Pivots* heads) {
  if (thread() % 32 == 0) heads[thread() / 32] = sums.at;
  sync();
  Pivots all = heads[0];
  for (int w = 1; w < threads() / 32; ++w) all.lift(heads[w]);
  sums.rebase(points, all);
}

// The sums of a block whose pivots are settled, as a record of which thread i gets number i. `parts` has room for 3 K + 1
// numbers of each warp; all threads pass a barrier.
template <int K> KD_DEVICE double collect(const Sums<K>& sums, const Point* points, int count, double* parts) {
  const int size = 3 * count + 1, i = thread() - kHead;
  double* mine = parts + thread() / 32 * size;
  const bool writes = thread() % 32 == 0;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (k >= count) break;
    const Point& p = points[k];
    const double z = warp_sum(sums.sum.z[k]);
    const double s = p.mean_s ? warp_sum(sums.sum.s[k]) : 0, t = p.mean_t ? warp_sum(sums.sum.t[k]) : 0;
    if (writes) { mine[3 * k] = z; mine[3 * k + 1] = s; mine[3 * k + 2] = t; }
  }
  const int odd = warp_or(sums.sum.odd);
  if (writes) mine[3 * count] = odd;
  sync();
  double x = 0;
  int any_odd = 0;
  for (int w = 0; w < threads() / 32; ++w) {
    if (i >= 0 && i < 3 * count) x += parts[w * size + i];
    any_odd |= int(parts[w * size + 3 * count]);
  }
  const Pivots& at = sums.at;
  if (i >= 0) return x;
  const double head[kHead] = {at.s0, at.t0, at.t_at, at.s_at, double(at.s_class), double(at.t_class), double(any_odd)};
#pragma unroll
  for (int j = 0; j < kHead; ++j) x = thread() == j ? head[j] : x;
  return x;
}

// One warp merges the records of up to 16 blocks, `stride` doubles apart, into `total`.
KD_SLOW void merge_records(const double* records, int count, int stride, const Point* points, int K, double* total) {
  const auto head = [&](int r) -> const Head& { return *reinterpret_cast<const Head*>(records + r * stride); };
  int by_s = 0, by_t = 0, odd = 0;
  for (int r = 0; r < count; ++r) {
    by_s = head(r).s_max > head(by_s).s_max ? r : by_s;
    by_t = head(r).t_max > head(by_t).t_max ? r : by_t;
    odd |= int(head(r).odd);
  }
  Head all = head(by_s);
  const Head& t_head = head(by_t);
  all.t_max = t_head.t_max; all.s_at = t_head.s_at; all.t_class = t_head.t_class; all.odd = odd;
  const double s0 = finite_or_0(all.s_max), t0 = finite_or_0(all.t_max);
  const int lane = thread() % 32, r = lane % 16;
  for (int first = 0; first < K; first += 2) {  // half a warp for a point
    const int k = first + lane / 16;
    const Point p = points[k];
    const double* mine = records + r * stride + kHead + 3 * k;
    double z = 0, s = 0, t = 0;
    if (r < count && k < K && mine[0] != 0) {
      const Head& own = head(r);
      const double f = exp2(double(p.b) * (finite_or_0(own.s_max) - s0) + double(p.a) * (finite_or_0(own.t_max) - t0));
      z = f * mine[0];
      s = scaled(f, mine[1] + mine[0] * (own.s_pivot(p) - all.s_pivot(p)));
      t = scaled(f, mine[2] + mine[0] * (own.t_pivot(p) - all.t_pivot(p)));
    }
#pragma unroll
    for (int d = 8; d; d >>= 1) {
      z += shuffle_xor(z, d);
      s += shuffle_xor(s, d);
      t += shuffle_xor(t, d);
    }
    double* to = total + kHead + 3 * k;
    if (r == 0 && k < K) { to[0] = z; to[1] = s; to[2] = t; }
  }
  if (lane == 0) *reinterpret_cast<Head*>(total) = all;
  sync_warp();
}

}  // namespace kd::gpu
