// One row on one team of threads: sums, statistics, value, coefficients. What the kernels share.
#pragma once
#include "careful.h"
#include "spread.h"

namespace kd::gpu {

// Of a block: a multiprocessor has registers for two with all that a thread may have (255), or for one of twice the size.
constexpr int kThreads = 128;
static_assert(2 * kThreads <= 32 * kMaxWarps);
constexpr int kStages = 4;  // rows that a cluster has on their way or in work, at most

// The block's shared memory. Everything of a row is double; `data` is what a cluster keeps of the logits.
struct Memory {
  double *numbers, *args, *registers, *stats, *coef, *parts, *total, *scratch, *exchange;
  uint64_t* barriers;
  Pivots* heads;
  Point* points;
  Term* terms;
  char* data;

  KD_HD Memory(char* base, int K, int length, int numbers_, bool cluster) {
    double* at = reinterpret_cast<double*>(base);
    const auto take = [&](int n) { double* mine = at; at += n + n % 2; return mine; };  // 16 bytes: as aligned as any type
    take(2);  // sum_of_rows() and last_block()
    numbers = take(numbers_);
    args = take(3 + 2 * K);
    registers = take(2 * (6 * K + 4 + length));
    stats = take((K + 1) * kStats);
    coef = take((K + 1) * kCoefs);
    heads = reinterpret_cast<Pivots*>(take(kMaxWarps * int(sizeof(Pivots)) / 8));
    parts = take(kMaxWarps * (3 * K + 1));
    total = take(record_size(K));
    scratch = take(kMaxWarps * 6);
    exchange = cluster ? take(2 * kMaxRanks * exchange_size(K)) : nullptr;
    barriers = reinterpret_cast<uint64_t*>(cluster ? take(kStages) : nullptr);
    points = reinterpret_cast<Point*>(take(((K + kMaxPoints) * sizeof(Point) + 7) / 8));
    terms = reinterpret_cast<Term*>(take((K * sizeof(Term) + 7) / 8));
    data = reinterpret_cast<char*>(base + (reinterpret_cast<char*>(at) - base + 127) / 128 * 128);
  }
  KD_HD static int exchange_size(int K) { return record_size(K) > 6 ? record_size(K) : 6; }
  static int bytes(int K, int length, int numbers, bool cluster) {
    char* const none = nullptr;
    return int(Memory(none, K, length, numbers, cluster).data - none);
  }
};

KD_DEVICE double* sum_of_rows() { return reinterpret_cast<double*>(shared()); }
KD_DEVICE int* last_block() { return reinterpret_cast<int*>(shared() + 8); }

KD_DEVICE Memory memory_of(const Problem& p, bool cluster = false) {
  return Memory(shared(), p.points(), p.length(), p.count, cluster);
}

// The points of row n; all threads have passed a barrier when it returns.
KD_DEVICE void load_points(const Problem& p, const Memory& m, const double* args) {
  const int K = p.points();
  for (int i = thread(); i < 3 + 2 * K; i += threads()) m.args[i] = args[i];
  sync();
  const Program program{m.numbers};
  for (int k = thread(); k < K + kMaxPoints; k += threads()) {
    if (k >= K) {
      m.points[k] = Point();
      continue;
    }
    Point mine(program, m.args, k, p.narrow()), last;
    int place = 0;
    for (int j = 0; j < K; ++j) {
      const Point other(program, m.args, j, p.narrow());
      if (!other.before(mine)) continue;
      if (!place++ || last.before(other)) last = other;
    }
    mine.twice = place && mine.is_twice(last);
    m.points[place] = mine;
  }
  sync();
}
// The program, and the points where all rows have the same, to shared memory.
KD_DEVICE Program load_program(const Problem& p, const Memory& m) {
  for (int i = thread(); i < p.count; i += threads()) m.numbers[i] = p.numbers[i];
  if (thread() == 0) *sum_of_rows() = 0;
  sync();
  if (!p.row_args) load_points(p, m, p.numbers + p.count);
  return Program{m.numbers};
}

// Statistics of the row at points [from, from + K), to m.stats: the sums of packs [first, end) on every member of the
// team, and careful points once more. Returns the record of the sums; all threads have passed a barrier.
template <int K, typename P>
KD_DEVICE const Head* reduce_points(const P& row, const Program& program, const Memory& m, Team& team, int from,
                                      int first, int end, int64_t label) {
  const Point* points = m.points + from;
  const int left = program.points() - from, count = left < K ? left : K;
  const int size = record_size(count);
  bool excludes = false;
  for (int k = 0; k < count; ++k) excludes |= points[k].exclude;
  Sums<K> sums(points);
  if (P::kOnChip) {
    sums.at = pivots_of(row, first, end);
    sums.at.lift_over_warp();
    settle(sums, points, m.heads);
  }
  add_packs(sums, points, row, first, end, excludes && label >= 0 && label < row.vocab ? int(label) : -1);
  if (!P::kOnChip) settle(sums, points, m.heads);
  const double mine = collect(sums, points, count, m.parts);
  if (team.ranks > 1) {
    const double* all = team.share(mine, size);
    if (thread() < 32) merge_records(all, team.ranks, team.size, points, count, m.total);
  } else if (thread() < size) {
    m.total[thread()] = mine;
  }
  sync();
  const Head& head = *reinterpret_cast<const Head*>(m.total);
  const double s0 = finite_or_0(head.s_max), t0 = finite_or_0(head.t_max);
  for (int k = 0; k < count; ++k) {
    const Point& p = points[k];
    const int flags = program.flags(p.index);
    const Tilt at(program, m.args, p.index);
    const double* sum = m.total + kHead + 3 * k;
    Moments x = Moments::empty();
    // Light in the sums: a mixture whose heavy classes are light in both rows, a row that is nearly all its label.
    if (p.kind == CAREFUL || (sum[0] < 1e-3 && (p.kind == OF_BOTH || flags & EXCLUDE)))
      x = careful(team, row, first, end, label, at, flags, s0, t0);
    else if (thread() == 0 && sum[0] > 0)
      x = {scaled(at.b, s0) + scaled(at.a, t0), sum[0], head.s_pivot(p) + sum[1] / sum[0],
           head.t_pivot(p) + sum[2] / sum[0], 0, 0, 0};
    if (thread() == 0) reinterpret_cast<Moments*>(m.stats)[p.index] = x;
  }
  if (from + K < program.points()) sync();  // the next points' records go where this one has been read
  return &head;
}

// The label's logits, by a thread of the warp that has the least to sum up. Before the statistics of a team are known: once
// they are, a member may write its gradient over them.
template <typename P> KD_DEVICE void begin_statistics(const P& row, const Problem& p, const Memory& m, int64_t label) {
  if (thread() != threads() - 1) return;
  double* last = m.stats + p.points() * kStats;
  const bool known = label >= 0 && label < p.vocab, dead = known && p.mask && !p.mask[label];
  last[0] = known ? dead ? -INFINITY : double(row.s.at(label + row.head)) : 0;
  last[1] = known ? dead ? -INFINITY : double(row.t.at(label + row.head)) : 0;
  last[4] = !p.labels || known || label == kElsewhere ? 1 : -1;  // -1: NaN, and no gradient
}

// The rest of the last line, and NaN throughout where the row holds NaN or +inf, or has no such label. One thread's work.
KD_DEVICE void end_statistics(const Memory& m, const Head& head, int K) {
  double* last = m.stats + K * kStats;
  last[2] = finite_or_0(head.s_max);
  last[3] = finite_or_0(head.t_max);
  last[5] = int(head.odd) & INFINITE;
  last[6] = 0;
  if (int(head.odd) & DAMAGED || last[4] < 0)
    for (int i = 0; i < K * kStats; ++i) m.stats[i] = NAN;
}

// Value of a row, and m.coef, from m.stats; a warp's work, a lane for each point. Out of line for the registers of the
// rest. As value_and_coefs(), which has one thread.
KD_SLOW double finish_row(const double* numbers, const double* args, const double* stats, double* registers,
                          double* coef) {
  const Program program{numbers};
  const int K = program.points(), lane = thread() % 32;
  const Row row = row_of(stats + K * kStats);
  const Moments* x = reinterpret_cast<const Moments*>(stats);
  double* adjoints = registers + program.registers();
  bool nothing = row.keep <= 0;
  for (int k = lane; k < K; k += 32) nothing |= point_inputs(program, args, k, x[k], row, registers);
  sync_warp();
  if (lane == 0) {
    label_inputs(program, args, row, registers);
    evaluate(program, registers);
    differentiate(program, registers, adjoints);
  }
  sync_warp();
  const double value = registers[program.out()], poison = any(nothing) || value != value ? NAN : 0;
  if (row.keep > 0) {
    for (int k = lane; k < K; k += 32) point_coefs(program, args, k, x[k], row, adjoints, 0, poison, coef);
    if (lane == 0) label_coefs(program, args, row, adjoints, 0, poison, 0, coef);
  } else {
    for (int i = lane; i < (K + 1) * kCoefs; i += 32) coef[i] = 0;
  }
  sync_warp();
  return value + poison;
}

// A class whose slope three threads make in double, to replace what the others will have written: the label, which has a
// slope of its own and which points may leave out, and where the points can cancel those of the largest logits.
template <typename O> struct Redo {
  O* to = nullptr;
  float d;

  KD_DEVICE Redo(const Slope& slope, const Writer<O>& out, int begin, int end, int at, int label, float s, float t) {
    if (slope.nothing || slope.damaged || at < begin || at >= end) return;
    to = out.base + out.head + at;
    d = slope_in_double(slope.coef, slope.K, slope.g, s, t, slope.s_max, slope.t_max, at == label);
    if (out.accumulate) d += widen(*to);
  }
  KD_DEVICE void store() const {
    if (to) narrow(d, to);
  }
};

}  // namespace kd::gpu
