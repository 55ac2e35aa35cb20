// Reduce and spread as launches of their own: for what needs the statistics, or knows the slope of the value only later.
#pragma once
#include "row.h"

namespace kd::gpu {

// Reads 2 w bytes a class at w bytes a logit, K exponentials; (K + 1) x 7 doubles a row.
template <typename S, typename T, int K> KD_KERNEL(kThreads, 2) reduce_kernel(KD_PARAMS ReduceTask task) {
  const Problem& p = task.problem;
  const Memory m = memory_of(p);
  const Program program = load_program(p, m);
  const int count = program.points(), numbers = (count + 1) * kStats;
  Team team{m.scratch, nullptr, 0, 1, 0, 0};
  for (int64_t n = block(); n < p.rows; n += blocks()) {
    const int64_t label = p.labels ? p.labels[n] : -1;
    const int head = Reader<S>::head(p.s, n);
    const Pair<Reader<S>, Reader<T>> row{{p.s, n, head}, {p.t, n, head}, head, int(p.vocab), p.mask};
    const bool kept = !p.labels || label != p.ignore;
    if (kept) {
      if (p.row_args) load_points(p, m, p.row_args + n * p.args_stride);
      begin_statistics(row, p, m, label);
      const Head* sums = nullptr;
      for (int from = 0; from < count; from += K)
        sums = reduce_points<K>(row, program, m, team, from, 0, row.packs(), label);
      if (thread() == 0) end_statistics(m, *sums, count);
      sync();
    }
    for (int i = thread(); i < numbers; i += threads()) task.stats[n * numbers + i] = kept ? m.stats[i] : 0;
    sync();
  }
}

// Reads 2 w bytes a class, writes w; K exponentials.
template <typename S, typename T, int kSide> KD_KERNEL(kThreads, 2) spread_kernel(KD_PARAMS SpreadTask task) {
  const Problem& p = task.problem;
  const Memory m = memory_of(p);
  const int K = p.points(), numbers = (K + 1) * kCoefs;
  using Own = Reader<std::conditional_t<kSide == 0, S, T>>;
  for (int64_t n = block(); n < p.rows; n += blocks()) {
    const int64_t label = p.labels ? p.labels[n] : -1;
    const double g = task.grad[n * task.grad_step];
    const int head = Own::head(kSide ? p.t : p.s, n);
    const Pair<Reader<S>, Reader<T>> row{{p.s, n, head}, {p.t, n, head}, head, int(p.vocab), p.mask};
    for (int i = thread(); i < numbers; i += threads()) m.coef[i] = task.coef[n * numbers + i];
    sync();
    for (int k = thread(); k < K; k += threads()) m.terms[k] = Term(m.coef, K, k, g);
    sync();
    const Slope slope(m.coef, m.terms, K, g, p.narrow());
    const Writer<typename Own::Element> out(task.out, n, head);
    const bool known = label >= 0 && label < p.vocab && (!p.mask || p.mask[label]);
    const int y = known && thread() == 0 ? int(label) : -1;
    const Redo<typename Own::Element> redo(slope, out, 0, row.vocab, y, y, known ? row.s.at(label + head) : 0,
                                           known ? row.t.at(label + head) : 0);
    spread_packs<Pair<Reader<S>, Reader<T>>::kAtOnce>(row, slope, out, 0, out.packs(), slope.heavy);
    sync();
    redo.store();
  }
}

}  // namespace kd::gpu
