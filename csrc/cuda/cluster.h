// A training step in one pass: the blocks of a cluster hold a pair of rows in their shared memory, a slice each.
#pragma once
#include "step.h"

namespace kd::gpu {

// packs: of a slice. stage: bytes that a slice of both rows takes.
struct ClusterTask { StepTask step; int packs, stages, stage; };

// Classes [first, end) of one matrix's row: 16-byte pieces by a bulk copy, what sticks out at its ends by threads.
template <typename X> struct Slice {
  const char *from, *to, *inner, *outer;

  KD_DEVICE Slice(const Matrix& x, int64_t n, int64_t first, int64_t end) {
    const X* row = static_cast<const X*>(x.data) + x.offset(n);
    from = reinterpret_cast<const char*>(row + first);
    to = reinterpret_cast<const char*>(end > first ? row + end : row + first);
    inner = from + (16 - reinterpret_cast<uintptr_t>(from) % 16) % 16;
    outer = to - reinterpret_cast<uintptr_t>(to) % 16;
    if (inner >= outer) inner = outer = to;
  }
  // Where the row's byte `at` stands: addresses keep their remainder by 16.
  KD_DEVICE char* place(char* memory, const char* at) const {
    return memory + reinterpret_cast<uintptr_t>(from) % 16 + (at - from);
  }
  KD_DEVICE uint32_t bulk() const { return uint32_t(outer - inner); }
  KD_DEVICE void copy(char* memory, uint64_t* barrier) const {
    if (bulk()) bulk_copy(place(memory, inner), inner, bulk(), barrier);
  }
  KD_DEVICE void copy_ends(char* memory) const {  // fewer than 32 elements
    const int before = int(inner - from) / int(sizeof(X)), after = int(to - outer) / int(sizeof(X));
    if (thread() >= before + after) return;
    const char* at = thread() < before ? from + thread() * sizeof(X) : outer + (thread() - before) * sizeof(X);
    *reinterpret_cast<X*>(place(memory, at)) = *reinterpret_cast<const X*>(at);
  }
  // The element at position 0 of pack 0.
  KD_DEVICE const X* base(char* memory, int64_t first, int head) const {
    return reinterpret_cast<const X*>(place(memory, from)) - (first + head);
  }
};

// This block's packs of a row.
struct Share {
  int first, end, begin, finish, head;  // packs, and classes
  KD_DEVICE Share(int head, int packs, int rank, int vocab) : first(packs * rank), head(head) {
    const int all = (vocab + head + kPack - 1) / kPack;
    end = first + packs < all ? first + packs : all;
    begin = first * kPack - head > 0 ? first * kPack - head : 0;
    finish = end * kPack - head < vocab ? end * kPack - head : vocab;
    if (first >= end) end = first, finish = begin;
  }
};

template <typename S, typename T> struct Stage {
  char *s, *t;
  uint64_t* barrier;
  bool alone;  // the teacher's row is the student's

  KD_DEVICE Stage(const ClusterTask& task, const Memory& m, int i)
      : s(m.data + i * task.stage), t(s), barrier(m.barriers + i), alone(task.step.problem.s.data == task.step.problem.t.data) {
    if (!alone) t += s_bytes(task.packs);
  }
  KD_HD static int s_bytes(int packs) { return packs * kPack * int(sizeof(S)) + 32; }
  KD_HD static int bytes(int packs) { return s_bytes(packs) + packs * kPack * int(sizeof(T)) + 32; }

  // A warp's work; all threads have finished with what was here.
  KD_DEVICE void fill(const Problem& p, int64_t n, const Share& share) const {
    const Slice<S> from_s(p.s, n, share.begin, share.finish);
    const Slice<T> from_t(p.t, n, share.begin, share.finish);
    from_s.copy_ends(s);
    if (!alone) from_t.copy_ends(t);
    if (thread()) return;
    fence_copies();
    barrier_expect(barrier, from_s.bulk() + (alone ? 0 : from_t.bulk()));
    from_s.copy(s, barrier);
    if (!alone) from_t.copy(t, barrier);
  }
  KD_DEVICE auto row(const Problem& p, int64_t n, const Share& share) const {
    const Slice<S> from_s(p.s, n, share.begin, share.finish);
    const Slice<T> from_t(p.t, n, share.begin, share.finish);
    using Rows = Pair<Reader<S, true>, Reader<T, true>>;
    return Rows{Reader<S, true>(from_s.base(s, share.begin, share.head)),
                Reader<T, true>(from_t.base(t, share.begin, share.head)), share.head, int(p.vocab), p.mask};
  }
};

// Reads 2 w bytes a class, writes w; 2 K exponentials. Row n + 1 is on its way while row n is worked on.
template <typename S, typename T, int K> KD_KERNEL(2 * kThreads, 1) cluster_kernel(KD_PARAMS ClusterTask task) {
#ifdef KD_CLUSTERS
  const StepTask& step = task.step;
  const Problem& p = step.problem;
  const Memory m = memory_of(p, true);
  const Program program = load_program(p, m);
  const int rank = cluster_rank(), ranks = cluster_size(), count = program.points();
  const int64_t clusters = blocks() / ranks;
  Team team{m.scratch, m.exchange, rank, ranks, Memory::exchange_size(count), 0};
  const Weights weights(step.factor);
  const auto share_of = [&](int64_t n) { return Share(Reader<S>::head(p.s, n), task.packs, rank, int(p.vocab)); };
  const auto fill = [&](int64_t n, int stage) {
    if (thread() < 32 && n < p.rows && weights(p, n) != 0) Stage<S, T>(task, m, stage).fill(p, n, share_of(n));
  };
  if (thread() == 0)
    for (int i = 0; i < task.stages; ++i) barrier_init(m.barriers + i);
  if (thread() == 0) fence_copies();
  sync();
  cluster_sync();  // the others' shared memory is there to be written to
  int64_t n = block() / ranks;
  for (int i = 0; i < task.stages; ++i) fill(n + i * clusters, i);
  sync();  // what threads have copied themselves is there; later a row's own barriers see to that
  uint32_t phases = 0;
  for (int stage = 0; n < p.rows; n += clusters, stage = stage + 1 == task.stages ? 0 : stage + 1) {
    const int64_t label = p.labels ? p.labels[n] : -1;
    const double g = weights(p, n);
    const Share share = share_of(n);
    const Stage<S, T> here(task, m, stage);
    const auto row = here.row(p, n, share);
    const Head* sums = nullptr;
    if (g != 0) {
      if (p.row_args) load_points(p, m, p.row_args + n * p.args_stride);
      const Pair<Reader<S>, Reader<T>> whole{{p.s, n, share.head}, {p.t, n, share.head}, share.head, int(p.vocab), p.mask};
      begin_statistics(whole, p, m, label);
      barrier_wait(here.barrier, phases >> stage & 1);
      phases ^= 1u << stage;
      for (int from = 0; from < count; from += K)
        sums = reduce_points<K>(row, program, m, team, from, share.first, share.end, label);
      end_row(step, m, *sums, g, rank == 0);
    } else {
      skip_row(m, count);
    }
    const Writer<S> out(step.out, n, share.head);
    const int end = share.first + task.packs;
    spread_row(step, m, sums, row, out, g, label, share.first, end < out.packs() ? end : out.packs(), share.begin,
               share.finish);
    fill(n + task.stages * clusters, stage);
    if (task.stages == 1) sync();
  }
  end_step(step.total, m.parts);
  cluster_sync();  // nobody leaves while others may still write here
#endif
}

}  // namespace kd::gpu
