// A call of a separable loss's operators: its points are reduced first, then its sums over the classes.
#pragma once
#include "arguments.h"

namespace kd {

struct Call {
  Batch x;
  Program p;
  Elements e;
  Args args;
  bool wide;
  std::vector<double> head;  // the program without the sums: what is reduced first
  // args: null where the coefficients are known already.
  Call(const Tensor& s, const MaybeTensor& t, const MaybeTensor& labels, const MaybeTensor& mask, const Tensor* args,
       const Tensor& program, int64_t vocab, int64_t ignore)
      : x(batch(s, t, labels, mask, vocab, ignore)), p(program_of(program)),
        e{p.data + 4 + p.points() + 5 * p.length()},
        args(args ? args_of(*args, x.rows, p.points()) : Args{nullptr, 0}), wide(is_double(s, t, vocab)) {
    STD_TORCH_CHECK(t && p.points() >= 3 && e.valid(p.elements()), "kdkernels: program is not of a separable loss");
    head = {double(p.points() - 1), 0, 0, 0};
    for (int k = 0; k + 1 < p.points(); ++k) head.push_back(p.flags(k));
  }
  int reduced() const { return p.points() - 1; }
  Program reduction() const { return {head.data()}; }

  // f(isa) with the vectors of the width that is computed in.
  template <typename F> void with(F f) const { wide ? f(tiles<double>()) : f(tiles<float>()); }

  template <typename R>
  ElementSums sums(const Tiles<R>& isa, int64_t n, int64_t segment, const LogWeights& w, const double* last, bool both,
                   std::vector<R>& work, R* slope) const {
    return element_sums(isa, x, n, segment * kSegment, std::min(x.vocab, (segment + 1) * kSegment), e, w, last, both,
                        work, slope);
  }

  Shape points() const { return {x.rows, reduced(), x.vocab, wide}; }

  // Of the segments of every row, from the statistics at the points.
  std::vector<ElementSums> all_sums(const Shape& less, const double* part, bool both) const {
    std::vector<ElementSums> sum(less.rows * less.segments);
    each(less, x.vocab, [&](Scratch&, int64_t n, int64_t i) {
      if (!x.kept(n)) return;
      const double* own = part + n * less.stats();
      const LogWeights w = log_weights(args[n], own, reduced());
      with([&]<typename R>(const Tiles<R>& isa) {
        std::vector<R> work;
        for (int64_t j = less.split ? i : 0; j < (less.split ? i + 1 : less.segments); ++j)
          sum[n * less.segments + j] = sums(isa, n, j, w, own + reduced() * kStats, both, work, static_cast<R*>(nullptr));
      });
    });
    return sum;
  }

  void reduce(const Shape& z, bool both, double* stats) const {
    const Shape less = points();
    std::vector<double> part(z.rows * less.stats());
    reduce_all(x, less, reduction(), args, part.data());
    const std::vector<ElementSums> sum = all_sums(less, part.data(), both);
    for (int64_t n = 0; n < z.rows; ++n) {
      const double* own = part.data() + n * less.stats();
      double* to = stats + n * z.stats();
      std::fill(to, to + z.stats(), 0.);
      if (!x.kept(n)) continue;
      std::copy_n(own, less.stats(), to);
      ElementSums all{};
      for (int64_t j = 0; j < less.segments; ++j) all.add(sum[n * less.segments + j]);
      put_sums(all, log_weights(args[n], own, reduced()), reduced(), to);
    }
  }

  // Statistics, value and coefficients of a row, and its gradient, while it is in cache.
  template <typename R>
  double step_row(const Tiles<R>& isa, const Shape& z, int64_t n, double g, const Gradient& to, Scratch& scratch,
                  std::vector<double>& numbers, std::vector<R>& work, std::vector<R>& slope) const {
    numbers.resize(2 * p.registers() + z.stats() + z.coefs());
    slope.resize(x.vocab);
    double *stats = numbers.data() + 2 * p.registers(), *coef = stats + z.stats();
    std::fill(stats, stats + z.stats(), 0.);
    if (x.kept(n)) {
      reduce_row(isa, x, n, reduction(), args[n], stats, scratch);
      const LogWeights w = log_weights(args[n], stats, reduced());
      ElementSums all{};
      for (int64_t i = 0; i < segments(x.vocab); ++i)
        all.add(sums(isa, n, i, w, stats + reduced() * kStats, false, work, slope.data()));
      put_sums(all, w, reduced(), stats);
    }
    const double value = value_and_coefs(p, args[n], stats, 1, 0, numbers.data(), coef);
    const ElementSlopes<R> more(e, coef, p.points(), 0, slope.data(), work);
    spread_part(isa, x, n, p.points(), coef, g, 0, 0, z.width, to.stream, to.data + n * to.row, &more);
    return value;
  }

  void spread(const Shape& z, const double* coef, const double* grad, int64_t step, int side, const Gradient& to) const {
    each(z, x.vocab, [&](Scratch&, int64_t n, int64_t i) {
      const int64_t first = z.split ? i * kSegment : 0, end = z.split ? std::min(z.width, first + kSegment) : z.width;
      with([&]<typename R>(const Tiles<R>& isa) {
        std::vector<R> work;
        const double* own = coef + n * z.coefs();
        const ElementSlopes<R> more(e, own, p.points(), side, nullptr, work);
        spread_part(isa, x, n, p.points(), own, grad[n * step], side, first, end, to.stream, to.data + n * to.row, &more);
      });
    });
  }

  void step(const Shape& z, const double* g, double* value, const Gradient& to) const {
    if (z.split) {
      std::vector<double> stats(z.rows * z.stats()), coef(z.rows * z.coefs());
      reduce(z, false, stats.data());
      rows_all(z, p, args, stats.data(), 1, value, coef.data());
      return spread(z, coef.data(), g, 1, 0, to);
    }
    torch::stable::parallel_for(0, x.rows, grain(x.vocab), [&](int64_t lo, int64_t hi) {
      with([&]<typename R>(const Tiles<R>& isa) {
        Scratch scratch;
        std::vector<double> numbers;
        std::vector<R> work, slope;
        for (int64_t n = lo; n < hi; ++n)
          value[n] = step_row(isa, z, n, g[n], to, scratch, numbers, work, slope);
      });
    });
  }
};

}  // namespace kd
