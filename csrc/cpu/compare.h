// One row of any loss that compares whole rows.
#pragma once
#include "correlation.h"
#include "grid.h"
#include "pairs.h"
#include "plackett.h"
#include "uld.h"

namespace kd {

enum Kind : int64_t { PEARSON, SPEARMAN, PLACKETT_LUCE, KENDALL, ULD };
// Columns of args: 1/T of the student, 1/T of the teacher, tau, top_k (0: all), the kind's switch, shifts.
enum Column { STUDENT_T, TEACHER_T, TAU, TOP, SWITCH, SHIFTS };

template <typename R>
double row_value(const Batch& x, int64_t n, int64_t kind, const double* a, int64_t shifts, int side, double g,
                 const RowOut& out) {
  const bool on = a[SWITCH] != 0;
  const auto finish = [&](const Pair<R>& z, auto compute) {
    if (!z.nan) return double(compute());
    if (out.to) out.fill(NAN);
    return double(NAN);
  };
  if (kind == PEARSON) {
    auto& w = kept_by_thread<PearsonScratch<R>>();
    const Pair<R> z = w.live.find(x, n, 0, on);
    const auto wide = [&] { return row_value<double>(x, n, kind, a, shifts, side, g, out); };
    return finish(z, [&] { return pearson(z, on, a[STUDENT_T], a[TEACHER_T], side, g, out, w, wide); });
  }
  if (kind == PLACKETT_LUCE) {
    auto& w = kept_by_thread<PlackettScratch<R>>();
    const Pair<R> z = w.live.find(x, n, int64_t(a[TOP]));
    return finish(z, [&] { return plackett_luce(z, on, a[STUDENT_T], a[TEACHER_T], g, out, w); });
  }
  if (kind == ULD) {
    auto& w = kept_by_thread<UldScratch<R>>();
    const Pair<R> z = w.live.find(x, n, 0, true);
    return finish(z, [&] { return uld(z, a, side, g, out, w); });
  }
  auto& w = kept_by_thread<PairsScratch<R>>();
  const Pair<R> z = w.live.find(x, n, int64_t(a[TOP]));
  return finish(z, [&] { return kendall(z, a[TAU], a + SHIFTS, shifts, g, out, w); });
}

// The value of row n; g times its gradient by the logits of `side` goes to `out`. wide: one of the rows is float64.
inline double compare_row(const Batch& x, int64_t n, int64_t kind, const double* a, int64_t shifts, bool wide, int side,
                          double g, const RowOut& out) {
  if (kind == SPEARMAN) return spearman_row(x, n, {a[TAU], int64_t(a[TOP]), a[SWITCH] != 0}, g, out);
  return wide ? row_value<double>(x, n, kind, a, shifts, side, g, out)
              : row_value<float>(x, n, kind, a, shifts, side, g, out);
}

}  // namespace kd
