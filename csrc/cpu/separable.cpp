// Operators of the separable losses. Stable ABI; kdkernels/ops.py describes what they share with the others.
#include <tuple>

#include "separable.h"

namespace {

using namespace kd;

Tensor reduce(const Tensor& s, const Tensor& t, const MaybeTensor& labels, const MaybeTensor& mask, const Tensor& args,
              const Tensor& program, int64_t vocab, int64_t ignore) {
  const Call call(s, t, labels, mask, &args, program, vocab, ignore);
  const Shape z(call.x.rows, call.p.points(), vocab, call.wide);
  Tensor stats = torch::stable::new_empty(s, {z.rows, z.K + 1, kStats}, ScalarType::Double);
  call.reduce(z, true, stats.mutable_data_ptr<double>());
  return stats;
}

Tensor spread(const Tensor& grad, const Tensor& s, const Tensor& t, const MaybeTensor& labels, const MaybeTensor& mask,
              const Tensor& coef, const Tensor& program, int64_t vocab, int64_t ignore, int64_t side) {
  const Call call(s, t, labels, mask, nullptr, program, vocab, ignore);
  const Tensor& own = side ? t : s;
  const Shape z(call.x.rows, call.p.points(), width_of(own), call.wide);
  STD_TORCH_CHECK(coef.numel() == z.rows * z.coefs() && coef.is_contiguous(),
                  "kdkernels: coef must be (N, K + 1, 10) contiguous");
  Tensor out = empty_as(own);
  const Gradient to(out.mutable_data_ptr(), z.rows, z.width * (side ? call.x.t : call.x.s).size(), true);
  call.spread(z, coef.const_data_ptr<double>(), grad.const_data_ptr<double>(), step_of(grad, z.rows), int(side), to);
  return out;
}

Tensor step_to(const Tensor& s, const Tensor& t, const MaybeTensor& labels, const MaybeTensor& mask, const Tensor& args,
               const Tensor& program, const MaybeTensor& weight, double divisor, int64_t vocab, int64_t ignore,
               Tensor& out, bool fresh) {
  const Call call(s, t, labels, mask, &args, program, vocab, ignore);
  const Gradient to = gradient_of(call.x, s, out, fresh);
  const std::vector<double> g = factors(call.x, weight, divisor);
  std::vector<double> value(call.x.rows);
  call.step(Shape(call.x.rows, call.p.points(), width_of(s), call.wide), g.data(), value.data(), to);
  return total_of(call.x, s, g, value);
}

std::tuple<Tensor, Tensor> step(const Tensor& s, const Tensor& t, const MaybeTensor& labels, const MaybeTensor& mask,
                                const Tensor& args, const Tensor& program, const MaybeTensor& weight, double divisor,
                                int64_t vocab, int64_t ignore) {
  Tensor out = empty_as(s);
  Tensor total = step_to(s, t, labels, mask, args, program, weight, divisor, vocab, ignore, out, true);
  return {total, out};
}

Tensor step_out(const Tensor& s, const Tensor& t, const MaybeTensor& labels, const MaybeTensor& mask,
                const Tensor& args, const Tensor& program, const MaybeTensor& weight, double divisor, int64_t vocab,
                int64_t ignore, Tensor out) {
  return step_to(s, t, labels, mask, args, program, weight, divisor, vocab, ignore, out, false);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def("separable_reduce(Tensor student, Tensor teacher, Tensor? labels, Tensor? mask, Tensor args, Tensor program, "
        "SymInt vocab, int ignore_index) -> Tensor");
  m.def("separable_spread(Tensor grad, Tensor student, Tensor teacher, Tensor? labels, Tensor? mask, Tensor coef, "
        "Tensor program, SymInt vocab, int ignore_index, int side) -> Tensor");
  m.def("separable_step(Tensor student, Tensor teacher, Tensor? labels, Tensor? mask, Tensor args, Tensor program, "
        "Tensor? weight, float divisor, SymInt vocab, int ignore_index) -> (Tensor, Tensor)");
  m.def("separable_step_out(Tensor student, Tensor teacher, Tensor? labels, Tensor? mask, Tensor args, Tensor program, "
        "Tensor? weight, float divisor, SymInt vocab, int ignore_index, Tensor(a!) out) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("separable_reduce", TORCH_BOX(&reduce));
  m.impl("separable_spread", TORCH_BOX(&spread));
  m.impl("separable_step", TORCH_BOX(&step));
  m.impl("separable_step_out", TORCH_BOX(&step_out));
}
