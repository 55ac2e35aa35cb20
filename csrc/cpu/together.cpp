// A loss of the log-partition and losses that compare orders, all of a row while it is in cache. Stable ABI; described
// in kdkernels/together.py.
#include <tuple>

#include "arguments.h"
#include "compare.h"

namespace {

using namespace kd;

// Columns of a comparison: its kind and the number of shifts; then its args.
constexpr int kKind = 0, kShifts = 1, kArgs = 2;

struct Comparisons {
  const double *data, *factors;
  int64_t count, rows, columns, weights;
  Comparisons(const Tensor& x, const Tensor& factors, int64_t rows)
      : data(x.const_data_ptr<double>()), factors(factors.const_data_ptr<double>()), count(x.size(0)), rows(x.size(1)),
        columns(x.size(2)), weights(factors.size(1)) {
    STD_TORCH_CHECK(x.dim() == 3 && x.is_contiguous() && count && columns >= kArgs + SHIFTS &&
                        (this->rows == 1 || this->rows == rows),
                    "kdkernels: comparisons must be (R, 1 or N, 7 + shifts) contiguous float64");
    STD_TORCH_CHECK(factors.dim() == 2 && factors.is_contiguous() && factors.size(0) == count &&
                        (weights == 1 || weights == rows),
                    "kdkernels: factors must be (R, 1 or N) contiguous float64");
    for (int64_t k = 0; k < count; ++k) {
      const double* c = of(k, 0);
      const auto kind = int64_t(c[kKind]), shifts = int64_t(c[kShifts]);
      STD_TORCH_CHECK(kind >= PEARSON && kind <= KENDALL && shifts >= 0 && shifts <= columns - kArgs - SHIFTS,
                      "kdkernels: comparisons are damaged");
    }
  }
  const double* of(int64_t k, int64_t n) const { return data + (k * rows + (rows == 1 ? 0 : n)) * columns; }
  double factor(int64_t k, int64_t n) const { return factors[k * weights + (weights == 1 ? 0 : n)]; }
  // Whether each writes to so few classes that they are best added where the gradient goes.
  bool few(int64_t vocab) const {
    for (int64_t k = 0; k < count; ++k)
      if (const double top = of(k, 0)[kArgs + TOP]; !(top > 0 && top * RowOut::kFew < double(vocab))) return false;
    return true;
  }
};

// The weighted value of row n; its gradient is added to `base`, a row in cache, and goes to `to` with the last one.
double compare_all(const Batch& x, int64_t n, const Comparisons& all, bool wide, int64_t width, char* base,
                   const Gradient& to) {
  const Gradient here(base, 1, 0, false);
  double total = 0;
  for (int64_t k = 0; k < all.count; ++k) {
    const double *c = all.of(k, n), g = all.factor(k, n);
    const bool last = k + 1 == all.count;
    const RowOut out{last ? &to : &here, x.s.type, last ? n : 0, x.vocab, width, base};
    if (x.kept(n) && g != 0)
      total += g * compare_row(x, n, int64_t(c[kKind]), c + kArgs, int64_t(c[kShifts]), wide, 0, g, out);
    else
      out.fill(0);
  }
  return total;
}

std::tuple<Tensor, Tensor> together_step(const Tensor& s, const Tensor& t, const MaybeTensor& labels,
                                         const MaybeTensor& mask, const Tensor& args, const Tensor& program,
                                         const MaybeTensor& weight, double divisor, const Tensor& factors_of,
                                         const Tensor& comparisons, int64_t vocab, int64_t ignore, bool alone) {
  const Program p = program_of(program);
  const Batch x = batch(s, t, labels, mask, vocab, ignore);
  const Batch first = alone ? batch(s, {}, labels, mask, vocab, ignore) : x;
  const Comparisons all(comparisons, factors_of, x.rows);
  const std::vector<double> g = factors(x, weight, divisor);
  const Shape z(x.rows, p.points(), width_of(s), is_double(s, t, vocab));
  const Args row_args = args_of(args, x.rows, p.points());
  const bool wide = x.s.type == Type::f64 || x.t.type == Type::f64, few = all.few(vocab);
  Tensor out = empty_as(s);
  const Gradient to = gradient_of(x, s, out, true);
  std::vector<double> value(x.rows);
  Turns turns(x.rows, grain(vocab), &to);
  torch::stable::parallel_for(0, x.rows, grain(vocab), [&](int64_t, int64_t) {
    RowSteps step(first, z, p, row_args);
    std::vector<char> room(few ? 0 : to.row);
    for (int64_t lo, hi; turns.take(&lo, &hi);)
      for (int64_t n = lo; n < hi; ++n) {
        char* base = few ? to.data + n * to.row : room.data();
        const double own = step(n, g[n], few && to.stream, base);
        value[n] = (x.kept(n) && g[n] != 0 ? g[n] * own : 0) + compare_all(x, n, all, wide, z.width, base, to);
      }
  });
  return {total_of(x, s, std::vector<double>(x.rows, 1), value), out};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def("together_step(Tensor student, Tensor teacher, Tensor? labels, Tensor? mask, Tensor args, Tensor program, "
        "Tensor? weight, float divisor, Tensor factors, Tensor comparisons, SymInt vocab, int ignore_index, bool alone) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) { m.impl("together_step", TORCH_BOX(&together_step)); }
