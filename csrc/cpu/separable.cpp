// Operators of the separable losses. Stable ABI; kdkernels/ops.py describes what they share with the others.
#include "separable.h"

namespace {

using namespace kd;

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

// Of a vocabulary shard. stats (N, K, 7): of the whole rows, at the points and behind them -> (N, 5), the fields of
// ElementSums over this rank's classes.
Tensor sums(const Tensor& s, const Tensor& t, const MaybeTensor& labels, const MaybeTensor& mask, const Tensor& args,
            const Tensor& program, const Tensor& stats, int64_t vocab, int64_t ignore) {
  const Call call(s, t, labels, mask, &args, program, vocab, ignore);
  const Shape less = call.points();
  STD_TORCH_CHECK(stats.scalar_type() == ScalarType::Double && stats.is_contiguous() &&
                      stats.numel() == less.rows * less.stats(),
                  "kdkernels: stats must be (N, K, 7) contiguous float64");
  const std::vector<ElementSums> sum = call.all_sums(less, stats.const_data_ptr<double>(), true);
  Tensor out = torch::stable::new_empty(s, {less.rows, 5}, ScalarType::Double);
  double* to = out.mutable_data_ptr<double>();
  for (int64_t n = 0; n < less.rows; ++n) {
    ElementSums all{};
    for (int64_t j = 0; j < less.segments; ++j) all.add(sum[n * less.segments + j]);
    for (const double x : {all.total, all.q, all.p, all.xq, all.xp}) *to++ = x;
  }
  return out;
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
  m.def("separable_sums(Tensor student, Tensor teacher, Tensor? labels, Tensor? mask, Tensor args, Tensor program, "
        "Tensor stats, SymInt vocab, int ignore_index) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("separable_reduce", TORCH_BOX(&reduce));
  m.impl("separable_spread", TORCH_BOX(&spread));
  m.impl("separable_step", TORCH_BOX(&step<step_to>));
  m.impl("separable_step_out", TORCH_BOX(&step_out<step_to>));
  m.impl("separable_sums", TORCH_BOX(&sums));
}
