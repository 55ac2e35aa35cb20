// Operators of the separable losses. Stable ABI; kdkernels/ops.py describes what they share with the others.
#include "arguments.h"

namespace {

using namespace kd;

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

  void reduce(const Shape& z, bool both, double* stats) const {
    const Shape less(z.rows, reduced(), x.vocab, wide);
    std::vector<double> part(z.rows * less.stats());
    std::vector<ElementSums> sum(z.rows * less.segments);
    reduce_all(x, less, reduction(), args, part.data());
    each(less, x.vocab, [&](Scratch&, int64_t n, int64_t i) {
      if (!x.kept(n)) return;
      const double* own = part.data() + n * less.stats();
      const LogWeights w = log_weights(args[n], own, reduced());
      with([&]<typename R>(const Tiles<R>& isa) {
        std::vector<R> work;
        for (int64_t j = less.split ? i : 0; j < (less.split ? i + 1 : less.segments); ++j)
          sum[n * less.segments + j] = sums(isa, n, j, w, own + reduced() * kStats, both, work, static_cast<R*>(nullptr));
      });
    });
    for (int64_t n = 0; n < z.rows; ++n) {
      const double* own = part.data() + n * less.stats();
      double* to = stats + n * z.stats();
      std::fill(to, to + z.stats(), 0.);
      if (!x.kept(n)) continue;
      std::copy_n(own, less.stats(), to);
      ElementSums all{};
      for (int64_t j = 0; j < less.segments; ++j) all.add(sum[n * less.segments + j]);
      put_sums(all, log_weights(args[n], own, reduced()), reduced(), args[n], to);
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
      put_sums(all, w, reduced(), args[n], stats);
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

Tensor reduce(const Tensor& s, const MaybeTensor& t, const MaybeTensor& labels, const MaybeTensor& mask,
              const Tensor& args, const Tensor& program, int64_t vocab, int64_t ignore) {
  const Call call(s, t, labels, mask, &args, program, vocab, ignore);
  const Shape z(call.x.rows, call.p.points(), vocab, call.wide);
  Tensor stats = torch::stable::new_empty(s, {z.rows, z.K + 1, kStats}, ScalarType::Double);
  call.reduce(z, true, stats.mutable_data_ptr<double>());
  return stats;
}

Tensor spread(const Tensor& grad, const Tensor& s, const MaybeTensor& t, const MaybeTensor& labels,
              const MaybeTensor& mask, const Tensor& coef, const Tensor& program, int64_t vocab, int64_t ignore,
              int64_t side) {
  const Call call(s, t, labels, mask, nullptr, program, vocab, ignore);
  const Tensor& own = side_of(s, t, side);
  const Shape z(call.x.rows, call.p.points(), width_of(own), call.wide);
  Tensor out = empty_as(own);
  const Gradient to(out.mutable_data_ptr(), z.rows, z.width * (side ? call.x.t : call.x.s).size(), true);
  call.spread(z, coefs_of(coef, z.rows), grad.const_data_ptr<double>(), step_of(grad, z.rows, "grad"), int(side), to);
  return out;
}

Tensor step_to(const Tensor& s, const MaybeTensor& t, const MaybeTensor& labels, const MaybeTensor& mask,
               const Tensor& args, const Tensor& program, const MaybeTensor& weight, double divisor, int64_t vocab,
               int64_t ignore, Tensor& out, bool fresh) {
  const Call call(s, t, labels, mask, &args, program, vocab, ignore);
  const Gradient to = gradient_of(call.x, s, out, fresh);
  const std::vector<double> g = factors(call.x, weight, divisor);
  std::vector<double> value(call.x.rows);
  call.step(Shape(call.x.rows, call.p.points(), width_of(s), call.wide), g.data(), value.data(), to);
  return total_of(call.x, s, g, value);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def("separable_reduce(Tensor student, Tensor? teacher, Tensor? labels, Tensor? mask, Tensor args, Tensor program, "
        "SymInt vocab, int ignore_index) -> Tensor");
  m.def("separable_spread(Tensor grad, Tensor student, Tensor? teacher, Tensor? labels, Tensor? mask, Tensor coef, "
        "Tensor program, SymInt vocab, int ignore_index, int side) -> Tensor");
  m.def("separable_step(Tensor student, Tensor? teacher, Tensor? labels, Tensor? mask, Tensor args, Tensor program, "
        "Tensor? weight, float divisor, SymInt vocab, int ignore_index) -> (Tensor, Tensor)");
  m.def("separable_step_out(Tensor student, Tensor? teacher, Tensor? labels, Tensor? mask, Tensor args, Tensor program, "
        "Tensor? weight, float divisor, SymInt vocab, int ignore_index, Tensor(a!) out) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("separable_reduce", TORCH_BOX(&reduce));
  m.impl("separable_spread", TORCH_BOX(&spread));
  m.impl("separable_step", TORCH_BOX(&step<step_to>));
  m.impl("separable_step_out", TORCH_BOX(&step_out<step_to>));
}
