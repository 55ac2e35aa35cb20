// A training step: value and gradient of a row in one launch.
#pragma once
#include "row.h"

namespace kd::gpu {

// Value, coefficients and terms of row n, whose factor is g, from its statistics.
KD_DEVICE void end_row(const StepTask& task, const Program& program, const Memory& m, const double* record, int64_t n,
                       double g, bool writes) {
  const int K = program.points();
  if (thread() == 0) {
    end_statistics(m, record, K);
    const double value = finish_row(program, m.args, m.stats, m.registers, 1, 0, m.coef);
    if (writes) task.value[n] = value * g;
  }
  sync();
  for (int k = thread(); k < K; k += threads()) m.terms[k] = Term(m.coef + k * kCoefs, g);
  sync();
}

// A row that counts nothing: no value, no slope.
KD_DEVICE void skip_row(const StepTask& task, const Memory& m, int K, int64_t n, bool writes) {
  if (thread() == 0) {
    for (int i = 0; i < (K + 1) * kCoefs; ++i) m.coef[i] = 0;
    if (writes) task.value[n] = 0;
  }
  sync();
}

struct Weights {
  const Factor& f;
  double over;
  KD_DEVICE explicit Weights(const Factor& f) : f(f), over(f.divisor != 0 ? f.divisor : *f.kept > 1 ? *f.kept : 1) {}
  KD_DEVICE double operator()(int64_t n) const { return (f.weight ? f.weight[n * f.weight_step] : 1) / over; }
};

// Two sweeps over a row: bytes 2 w a class for the sums, again for the slopes (what the caches have kept: the second
// sweep starts where the first ended), w for the gradient; 2 K exponentials.
template <typename S, typename T, int K> KD_KERNEL(kThreads) step_kernel(KD_PARAMS StepTask task) {
  const Problem& p = task.problem;
  const Memory m = memory_of(p);
  const Program program = load_program(p, m);
  Team team{m.scratch, nullptr, 0, 1, 0, 0};
  const Weights weights(task.factor);
  for (int64_t n = block(); n < p.rows; n += blocks()) {
    const int64_t label = p.labels ? p.labels[n] : -1;
    const double g = p.labels && label == p.ignore ? 0 : weights(n);
    const int head = Reader<S>::head(p.s, n);
    const Pair<Reader<S>, Reader<T>> row{{p.s, n, head}, {p.t, n, head}, head, int(p.vocab), p.mask};
    if (g != 0) {
      load_points(p, program, m, n);
      if (thread() == 0) begin_statistics(row, p, m, label);
      const double* record = nullptr;
      for (int from = 0; from < program.points(); from += K)
        record = reduce_points<K>(row, program, m, team, from, 0, row.packs(), label);
      end_row(task, program, m, record, n, g, true);
    } else {
      skip_row(task, m, program.points(), n, true);
    }
    const Slope slope(m.coef, m.terms, program.points(), g, label, p.narrow());
    const Writer<S> out(task.out, n, head);
    spread_packs(row, slope, out, 0, out.packs());
    sync();
  }
}

}  // namespace kd::gpu
