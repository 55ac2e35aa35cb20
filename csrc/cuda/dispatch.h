// From a task to a kernel of its dtypes and its number of points. Included by one source file for each dtype.
#pragma once
#include <algorithm>

#include "cluster.h"
#include "dtype.h"
#include "passes.h"

namespace kd::gpu {

inline int round_up(int64_t x, int unit) { return int((x + unit - 1) / unit * unit); }
// A thread for each pack, up to `most`: a function of the width alone, so that results repeat to the bit. Few enough for
// blocks to share a multiprocessor: one sweeps over its row while another is at what is serial in its own.
inline int threads_for(int64_t width, int most = kThreads) {
  const int64_t packs = width / kPack + 2;
  return packs < most ? round_up(packs, 32) : most;
}

template <typename P> int launch_rows(void (*kernel)(P), const P& task, int64_t rows, int64_t width, void* stream) {
  const Problem& p = task.problem;
  Shape z{0, threads_for(width), Memory::bytes(p.points(), p.length(), p.count, false), 1};
  if (int error = prepare(kernel, z.shared, false)) return error;
  const int64_t most = int64_t(device().processors) * resident(kernel, z.threads, z.shared);
  z.blocks = int(std::min<int64_t>({rows, most, kMaxBlocks}));
  return z.blocks ? launch(kernel, z, stream, task) : 0;
}

// Points of a sweep that a kernel exists for: the fewest that hold K, or for logits of two dtypes the most.
template <typename S, typename T, typename F> int with_points(int K, F f) {
  if constexpr (std::is_same_v<S, T>)
    if (K <= 3) return f(std::integral_constant<int, 3>());
  return f(std::integral_constant<int, kMaxPoints>());
}

template <typename S, typename T> int reduce_as(const ReduceTask& task, void* stream) {
  return with_points<S, T>(task.problem.points(), [&](auto K) {
    return launch_rows(reduce_kernel<S, T, K>, task, task.problem.rows, task.problem.vocab, stream);
  });
}
// The smallest cluster whose shared memory holds two rows or more: with two blocks to a multiprocessor, or else one; or
// else one row. False where none does.
template <typename S, typename T> bool fits_cluster(const StepTask& step, ClusterTask* task, Shape* z) {
  const Problem& p = step.problem;
  const int small = Memory::bytes(p.points(), p.length(), p.count, true);
  const int64_t packs = (step.out.width + 2 * kPack - 2) / kPack;
  const int whole = device().shared, half = (whole + 1024) / 2 - 1024;  // each block takes 1 KB more
  const struct { int shared, rows, threads; } ways[] = {{half, 2, kThreads}, {whole, 2, 2 * kThreads}, {whole, 1, 2 * kThreads}};
  for (const auto& way : ways)
    for (int ranks = 1; ranks <= kMaxRanks; ranks *= 2) {
      const int64_t slice = (packs + ranks - 1) / ranks;
      if (slice > (1 << 20) / kPack / 4) continue;
      const int stage = round_up(Stage<S, T>::bytes(int(slice)), 128);
      const int stages = (way.shared - small) / stage;
      if (stages < way.rows) continue;
      *task = {step, int(slice), stages < kStages ? stages : kStages, stage};
      *z = {0, threads_for(slice * kPack, way.threads), small + task->stages * stage, ranks};
      return true;
    }
  return false;
}

template <typename S, typename T, int K> int cluster_as(const StepTask& step, void* stream) {
  ClusterTask task;
  Shape z;
  if (!fits_cluster<S, T>(step, &task, &z)) return -1;
  auto* kernel = cluster_kernel<S, T, K>;
  if (prepare(kernel, z.shared, z.cluster > 8)) return -1;  // two sweeps then
  const int64_t most = z.cluster > 1 ? resident_clusters(kernel, z)
                                     : int64_t(device().processors) * resident(kernel, z.threads, z.shared);
  if (!most) return -1;
  z.blocks = int(std::min<int64_t>({step.problem.rows, most, kMaxBlocks / z.cluster})) * z.cluster;
  return z.blocks ? launch(kernel, z, stream, task) : 0;
}

template <typename X> int step_as(const StepTask& task, int form, void* stream) {
  return with_points<X, X>(task.problem.points(), [&](auto K) {
    if (form == 2 || (form == 0 && device().major >= 9))
      if (int error = cluster_as<X, X, K>(task, stream); error >= 0) return error;
    return launch_rows(step_kernel<X, X, K>, task, task.problem.rows, task.out.width, stream);
  });
}

template <typename X> int Dtype<X>::reduce(const ReduceTask& task, bool same, void* stream) {
  return same ? reduce_as<X, X>(task, stream) : reduce_as<X, Any>(task, stream);
}
template <typename X> int Dtype<X>::step(const StepTask& task, bool same, int form, void* stream) {
  if (same) return step_as<X>(task, form, stream);
  return with_points<X, Any>(task.problem.points(), [&](auto K) {
    return launch_rows(step_kernel<X, Any, K>, task, task.problem.rows, task.out.width, stream);
  });
}
template <typename X> int Dtype<X>::spread(const SpreadTask& task, bool same, void* stream) {
  const int64_t rows = task.problem.rows, width = task.out.width;
  if (task.side == 0)
    return same ? launch_rows(spread_kernel<X, X, 0>, task, rows, width, stream)
                : launch_rows(spread_kernel<X, Any, 0>, task, rows, width, stream);
  return same ? launch_rows(spread_kernel<X, X, 1>, task, rows, width, stream)
              : launch_rows(spread_kernel<Any, X, 1>, task, rows, width, stream);
}

}  // namespace kd::gpu
