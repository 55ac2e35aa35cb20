// A training step: value and gradient of a row in one launch.
#pragma once
#include "row.h"

namespace kd::gpu {

// Value, coefficients and terms of row n, whose factor is g, from its statistics.
KD_DEVICE void end_row(const StepTask& task, const Memory& m, const Head& head, double g, bool writes) {
  const int K = task.problem.points();
  if (thread() < 32) {
    if (thread() == 0) end_statistics(m, head, K);
    sync_warp();
    const double value = finish_row(m.numbers, m.args, m.stats, m.registers, m.coef);
    if (thread() == 0 && writes) *sum_of_rows() += value * g;
    for (int k = thread(); k < K; k += 32) m.terms[k] = Term(m.coef, K, k, g);
  }
  sync();
}

// The gradient of packs [first, end) and of classes [begin, finish), whose row has the statistics in `m` and at `head`.
template <typename P, typename O>
KD_DEVICE void spread_row(const StepTask& task, const Memory& m, const Head* head, const P& row, const Writer<O>& out,
                          double g, int64_t label, int first, int end, int begin, int finish) {
  const int K = task.problem.points();
  const Slope slope(m.coef, m.terms, K, g, task.problem.narrow());
  const double* last = m.stats + K * kStats;
  const int y = label >= 0 && label < row.vocab ? int(label) : -1, i = thread();
  const bool maximum = i && i < 3 && slope.heavy && head;
  const Redo<O> redo(slope, out, begin, finish, i == 0 ? y : maximum ? int(i == 1 ? head->s_class : head->t_class) : -1, y,
                     float(!maximum ? last[0] : i == 1 ? head->s_max : head->s_at),
                     float(!maximum ? last[1] : i == 1 ? head->t_at : head->t_max));
  if (out.accumulate) sync();  // what was there has been read
  spread_packs<P::kOnChip ? P::kAtOnce : 1>(row, slope, out, first, end, false);
  sync();
  redo.store();
}

// A row that counts nothing: no slope.
KD_DEVICE void skip_row(const Memory& m, int K) {
  for (int i = thread(); i < (K + 1) * kCoefs; i += threads()) m.coef[i] = 0;
  sync();
}

struct Weights {
  const Factor& f;
  double over;
  KD_DEVICE explicit Weights(const Factor& f) : f(f), over(f.divisor != 0 ? f.divisor : *f.kept > 1 ? *f.kept : 1) {}
  // Of row n; 0 where it is left out.
  KD_DEVICE double operator()(const Problem& p, int64_t n) const {
    return p.labels && p.labels[n] == p.ignore ? 0 : (f.weight ? f.weight[n * f.weight_step] : 1) / over;
  }
};

// The blocks' sums, to the total: each leaves its own, and the last to be done adds them up, always in the same order.
KD_DEVICE void end_step(const Total& total, double* parts) {
  if (thread() == 0) {
    total.parts[block()] = *sum_of_rows();
    *last_block() = arrive(total.done) == blocks() - 1;
  }
  sync();
  if (!*last_block()) return;
  double sum = 0;
  for (int i = thread(); i < blocks(); i += threads()) sum += load_shared_by_blocks(total.parts + i);
  sum = sum_of_threads(sum, parts);
  if (thread() == 0) *total.sum = float(sum);
}

// Two sweeps over a row: bytes 2 w a class for the sums, again for the slopes (what the caches have kept: the second
// sweep starts where the first ended), w for the gradient; 2 K exponentials.
template <typename S, typename T, int K> KD_KERNEL(kThreads, 2) step_kernel(KD_PARAMS StepTask task) {
  const Problem& p = task.problem;
  const Memory m = memory_of(p);
  const Program program = load_program(p, m);
  Team team{m.scratch, nullptr, 0, 1, 0, 0};
  const Weights weights(task.factor);
  for (int64_t n = block(); n < p.rows; n += blocks()) {
    const int64_t label = p.labels ? p.labels[n] : -1;
    const double g = weights(p, n);
    const int head = Reader<S>::head(p.s, n);
    const Pair<Reader<S>, Reader<T>> row{{p.s, n, head}, {p.t, n, head}, head, int(p.vocab), p.mask};
    const Head* sums = nullptr;
    if (g != 0) {
      if (p.row_args) load_points(p, m, p.row_args + n * p.args_stride);
      begin_statistics(row, p, m, label);
      for (int from = 0; from < program.points(); from += K)
        sums = reduce_points<K>(row, program, m, team, from, 0, row.packs(), label);
      end_row(task, m, *sums, g, true);
    } else {
      skip_row(m, program.points());
    }
    const Writer<S> out(task.out, n, head);
    spread_row(task, m, sums, row, out, g, label, 0, out.packs(), 0, row.vocab);
  }
  end_step(task.total, m.parts);
}

}  // namespace kd::gpu
