// Rows on threads: which instruction set, how the work is shared, and the three operations over a batch.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "rows.h"

namespace kd {

inline int detected() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}
// KDKERNELS_ISA=0|1|2|3 lowers it (baseline, AVX2, AVX-512, the same with bfloat16), for tests.
inline int instruction_set() {
  static const int chosen = [] {
    const char* asked = std::getenv("KDKERNELS_ISA");
    return asked && asked[0] >= '0' && asked[0] <= '3' ? std::min(asked[0] - '0', detected()) : detected();
  }();
  return chosen;
}
template <typename R> const Tiles<R>& tiles();
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PICK(t) \
  static const auto& x = *std::array{&base::t, &avx2::t, &avx512::t, &avx512_bf16::t}[instruction_set()]; \
  return x
#else
#define PICK(t) return base::t
#endif
template <> inline const Tiles<float>& tiles() { PICK(f32); }
template <> inline const Tiles<double>& tiles() { PICK(f64); }

// Row n of args (1 or N, 3 + 2K).
struct Args {
  const double* data;
  int64_t stride;
  const double* operator[](int64_t n) const { return data + n * stride; }
};

// A chunk of rows is worth a thread from about 32k classes on; what a row costs apart from them is worth 1024.
inline int64_t grain(int64_t vocab) { return 1 + (1 << 15) / (vocab + 1024); }
// Below this many rows their segments are shared among the threads as well; the bits are the same either way.
constexpr int64_t kFewRows = 64;
// The narrowest rows too are computed in double: with few classes the rounding of single weights does not average out.
constexpr int64_t kNarrow = 32;

// The sizes of one call.
struct Shape {
  int64_t rows, K, width, segments;
  bool wide, split;
  Shape(int64_t rows, int64_t points, int64_t width, bool wide)
      : rows(rows), K(points), width(width), segments(kd::segments(width)), wide(wide),
        split(rows < kFewRows && segments > 1) {}
  int64_t stats() const { return (K + 1) * kStats; }
  int64_t coefs() const { return (K + 1) * kCoefs; }
};

// f(scratch, row, segment) over the rows, or over their segments where there are few rows.
template <typename F> void each(const Shape& z, int64_t vocab, F f) {
  const int64_t parts = z.split ? z.segments : 1;
  torch::stable::parallel_for(0, z.rows * parts, z.split ? 1 : grain(vocab), [&](int64_t lo, int64_t hi) {
    Scratch scratch;
    for (int64_t i = lo; i < hi; ++i) f(scratch, i / parts, i % parts);
  });
}

inline void reduce_all(const Batch& x, const Shape& z, const Program& p, const Args& args, double* out) {
  std::vector<double> parts(z.split ? z.rows * z.segments * z.stats() : 0);
  each(z, x.vocab, [&](Scratch& w, int64_t n, int64_t i) {
    auto reduce = [&]<typename R>(const Tiles<R>& isa) {
      if (!z.split) return reduce_row(isa, x, n, p, args[n], out + n * z.stats(), w);
      double* part = parts.data() + (n * z.segments + i) * z.stats();
      if (x.kept(n)) reduce_segment(isa, x, n, i, p, args[n], part, w.points<R>());
    };
    z.wide ? reduce(tiles<double>()) : reduce(tiles<float>());
  });
  if (!z.split) return;
  for (int64_t n = 0; n < z.rows; ++n) {
    double* stats = out + n * z.stats();
    const double* part = parts.data() + n * z.segments * z.stats();
    std::copy(part, part + z.stats(), stats);
    if (!x.kept(n)) continue;
    for (int64_t i = 1; i < z.segments; ++i)
      merge_segments(int(z.K), stats, part + i * z.stats(), x.labels && x.labels[n] / kSegment == i);
    finish_row(int(z.K), stats);
  }
}

inline void rows_all(const Shape& z, const Program& p, const Args& args, const double* stats, int64_t sides,
                     double* value, double* coef) {
  torch::stable::parallel_for(0, z.rows, 64, [&](int64_t lo, int64_t hi) {
    std::vector<double> scratch(2 * p.registers());
    for (int64_t n = lo; n < hi; ++n)
      value[n] = value_and_coefs(p, args[n], stats + n * z.stats(), int(sides), z.rows * z.coefs(), scratch.data(),
                                 coef + n * z.coefs());
  });
}

// A gradient larger than the caches is written past them, onto pages that are faulted in 2 MB at a time.
struct Gradient {
  char* data;
  int64_t row;
  bool stream;
  Gradient(void* to, int64_t rows, int64_t row, bool fresh)
      : data(static_cast<char*>(to)), row(row), stream(rows * row >= 8 << 20) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t page = 2 << 20;
    const uintptr_t first = (uintptr_t(data) + page - 1) / page * page;
    const uintptr_t last = (uintptr_t(data) + rows * row) / page * page;
    if (fresh && stream && first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  }
};

// Parts of the rows to whichever thread is free: rows that are left out cost nothing, and a thread may lose its core.
// Where there are many, they are of 2 MB of the gradient: two threads seldom wait for the same fresh page. The last ones
// are smaller, so that no thread works long after the others.
class Turns {
 public:
  Turns(int64_t rows, int64_t grain, const Gradient* to)
      : rows_(rows), grain_(grain), most_(to ? (2 << 20) / std::max<int64_t>(to->row, 1) : 1),
        shares_(2 * int64_t(torch::stable::get_num_threads())) {}
  bool take(int64_t* lo, int64_t* hi) {
    *lo = next_.load();
    do {
      const int64_t left = rows_ - *lo;
      *hi = *lo + std::min(left, std::max({grain_, int64_t(1), std::min(most_, left / shares_)}));
    } while (*lo < rows_ && !next_.compare_exchange_weak(*lo, *hi));
    return *lo < rows_;
  }

 private:
  std::atomic<int64_t> next_{0};
  const int64_t rows_, grain_, most_, shares_;
};

inline void spread_all(const Batch& x, const Shape& z, const double* coef, const double* grad, int64_t step, int side,
                       const Gradient& to) {
  each(z, x.vocab, [&](Scratch&, int64_t n, int64_t i) {
    const int64_t first = z.split ? i * kSegment : 0, end = z.split ? std::min(z.width, first + kSegment) : z.width;
    char* out = to.data + n * to.row;
    const double *c = coef + n * z.coefs(), g = grad[n * step];
    z.wide ? spread_part(tiles<double>(), x, n, int(z.K), c, g, side, first, end, to.stream, out)
           : spread_part(tiles<float>(), x, n, int(z.K), c, g, side, first, end, to.stream, out);
  });
}

// reduce, rows and spread to the student of one row after the other: its gradient is written while it is in cache.
class RowSteps {
 public:
  RowSteps(const Batch& x, const Shape& z, const Program& p, const Args& args)
      : x_(x), z_(z), p_(p), args_(args), room_(2 * p.registers() + z.stats() + z.coefs()) {}

  double operator()(int64_t n, double g, bool stream, char* out) {
    return z_.wide ? run(tiles<double>(), n, g, stream, out) : run(tiles<float>(), n, g, stream, out);
  }

 private:
  template <typename R> double run(const Tiles<R>& isa, int64_t n, double g, bool stream, char* out) {
    double *stats = room_.data() + 2 * p_.registers(), *coef = stats + z_.stats();
    reduce_row(isa, x_, n, p_, args_[n], stats, w_);
    const double value = value_and_coefs(p_, args_[n], stats, 1, 0, room_.data(), coef);
    spread_part(isa, x_, n, int(z_.K), coef, g, 0, 0, z_.width, stream, out);
    return value;
  }
  const Batch& x_;
  const Shape& z_;
  const Program& p_;
  const Args& args_;
  Scratch w_;
  std::vector<double> room_;
};

// The same of a batch. coef: room for all rows if they are split.
inline void step_rows(const Batch& x, const Shape& z, const Program& p, const Args& args, const double* g,
                      double* value, double* coef, const Gradient& to) {
  if (z.split) {
    std::vector<double> stats(z.rows * z.stats());
    Shape reading = z;
    reading.segments = segments(x.vocab);
    reduce_all(x, reading, p, args, stats.data());
    rows_all(z, p, args, stats.data(), 1, value, coef);
    return spread_all(x, z, coef, g, 1, 0, to);
  }
  torch::stable::parallel_for(0, x.rows, grain(x.vocab), [&](int64_t lo, int64_t hi) {
    RowSteps step(x, z, p, args);
    for (int64_t n = lo; n < hi; ++n) value[n] = step(n, g[n], to.stream, to.data + n * to.row);
  });
}

}  // namespace kd
