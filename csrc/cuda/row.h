// One row on one team of threads: sums, statistics, value, coefficients. What the kernels share.
#pragma once
#include "careful.h"
#include "spread.h"

namespace kd::gpu {

constexpr int kThreads = 384;  // 512 would leave each too few registers
constexpr int kStages = 4;  // rows that a cluster has on their way or in work, at most

// The block's shared memory. Everything of a row is double; `data` is what a cluster keeps of the logits.
struct Memory {
  double *numbers, *args, *registers, *stats, *coef, *records, *scratch, *exchange;
  uint64_t* barriers;
  Point* points;
  Term* terms;
  char* data;

  KD_HD Memory(char* base, int K, int length, int numbers_, bool cluster) {
    double* at = reinterpret_cast<double*>(base);
    const auto take = [&](int n) { double* mine = at; at += n; return mine; };
    numbers = take(numbers_);
    args = take(3 + 2 * K);
    registers = take(2 * (6 * K + 4 + length));
    stats = take((K + 1) * kStats);
    coef = take((K + 1) * kCoefs);
    records = take(kMaxWarps * record_size(K));
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

KD_DEVICE Memory memory_of(const Problem& p, bool cluster = false) {
  return Memory(shared(), p.points(), p.length(), p.count, cluster);
}

// The program, and the arguments where all rows have the same, to shared memory.
KD_DEVICE Program load_program(const Problem& p, const Memory& m) {
  for (int i = thread(); i < p.count; i += threads()) m.numbers[i] = p.numbers[i];
  if (!p.row_args)
    for (int i = thread(); i < 3 + 2 * p.points(); i += threads()) m.args[i] = p.numbers[p.count + i];
  sync();
  return Program{m.numbers};
}

// The points of row n; all threads have passed a barrier when it returns.
KD_DEVICE void load_points(const Problem& p, const Program& program, const Memory& m, int64_t n) {
  const int K = program.points();
  if (p.row_args) {
    for (int i = thread(); i < 3 + 2 * K; i += threads()) m.args[i] = p.row_args[n * p.args_stride + i];
    sync();
  }
  for (int k = thread(); k < K + kMaxPoints; k += threads())
    m.points[k] = k < K ? Point(program, m.args, k, p.narrow()) : Point();
  sync();
}

// Statistics of the row at points [from, from + K), to m.stats: the sums of packs [first, end) on every member of the
// team, and careful points once more. Returns the record of the sums; all threads have passed a barrier.
template <int K, typename P>
KD_DEVICE const double* reduce_points(const P& row, const Program& program, const Memory& m, Team& team, int from,
                                      int first, int end, int64_t label) {
  const Point* points = m.points + from;
  const int left = program.points() - from, count = left < K ? left : K;
  const int size = record_size(count), warp = thread() / 32;
  bool excludes = false;
  for (int k = 0; k < count; ++k) excludes |= points[k].exclude;
  Sums<K> sums;
  add_packs(sums, points, row, first, end, excludes ? label : -1);
  write_record(sums, points, count, m.records + warp * size);
  sync();
  if (warp == 0) merge_records(m.records, threads() / 32, size, points, count, m.records);
  sync();
  if (team.ranks > 1) {
    const double* all = team.share(m.records, size);
    if (warp == 0) merge_records(all, team.ranks, team.size, points, count, m.records);
    sync();
  }
  const double* record = m.records;
  const double s0 = finite_or_0(record[0]), t0 = finite_or_0(record[1]);
  for (int k = 0; k < count; ++k) {
    const int flags = program.flags(from + k);
    const Tilt at(program, m.args, from + k);
    const double z = record[5 + 3 * k];
    // Light in the sums: a mixture whose heavy classes are light in both rows, a row that is nearly all its label.
    const bool light = z < 1e-3 && (points[k].kind == OF_BOTH || flags & EXCLUDE);
    Moments x = Moments::empty();
    if (light || points[k].kind == CAREFUL) {
      x = careful(team, row, first, end, label, at, flags, s0, t0);
    } else if (z > 0) {
      const double s = record_pivot(record, points[k], false), t = record_pivot(record, points[k], true);
      x = {scaled(at.b, s0) + scaled(at.a, t0), z, s + record[6 + 3 * k] / z, t + record[7 + 3 * k] / z, 0, 0, 0};
    }
    if (thread() == 0) reinterpret_cast<Moments*>(m.stats)[from + k] = x;
  }
  if (from + K < program.points()) sync();  // the next points' records go where this one has been read
  return record;
}

// The label's logits, one thread's work; before the statistics of a team are known: once they are, a member may write
// its gradient over them.
template <typename P> KD_DEVICE void begin_statistics(const P& row, const Problem& p, const Memory& m, int64_t label) {
  double* last = m.stats + p.points() * kStats;
  const bool known = label >= 0 && label < p.vocab;
  const bool dead = known && p.mask && !p.mask[label];
  last[0] = known ? dead ? -INFINITY : double(row.s.at(label + row.head)) : 0;
  last[1] = known ? dead ? -INFINITY : double(row.t.at(label + row.head)) : 0;
  last[4] = !p.labels || known || label == kElsewhere ? 1 : -1;  // -1: NaN, and no gradient
}

// The rest of the last line, and NaN throughout where the row holds NaN or +inf, or has no such label.
KD_DEVICE void end_statistics(const Memory& m, const double* record, int K) {
  double* last = m.stats + K * kStats;
  last[2] = finite_or_0(record[0]);
  last[3] = finite_or_0(record[1]);
  last[5] = last[6] = 0;
  if (record[4] != 0 || last[4] < 0)
    for (int i = 0; i < K * kStats; ++i) m.stats[i] = NAN;
}

// One thread's work, kept out of line for the registers of the rest.
KD_SLOW double finish_row(const Program& program, const double* args, const double* stats, double* registers,
                          int sides, int64_t side_stride, double* coef) {
  return value_and_coefs(program, args, stats, sides, side_stride, registers, coef);
}

}  // namespace kd::gpu
