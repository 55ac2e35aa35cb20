// Operators of the cpu backend, and the schemas that the cuda backend shares. Stable ABI.
#include "arguments.h"

namespace {

using namespace kd;

Tensor reduce(const Tensor& s, const MaybeTensor& t, const MaybeTensor& labels, const MaybeTensor& mask,
              const Tensor& args, const Tensor& program, int64_t vocab, int64_t ignore) {
  const Program p = program_of(program);
  const Batch x = batch(s, t, labels, mask, vocab, ignore);
  const Args row_args = args_of(args, x.rows, p.points());
  Tensor stats = torch::stable::new_empty(s, {x.rows, p.points() + 1, kStats}, ScalarType::Double);
  reduce_all(x, Shape(x.rows, p.points(), vocab, is_double(s, t, vocab)), p, row_args, stats.mutable_data_ptr<double>());
  return stats;
}

std::tuple<Tensor, Tensor> rows(const Tensor& stats, const Tensor& args, const Tensor& program, int64_t sides) {
  const Program p = program_of(program);
  const int64_t N = stats.size(0), K1 = p.points() + 1;
  const double* from = stats_of(stats, p.points());
  Tensor value = torch::stable::new_empty(stats, {N}), coef = torch::stable::new_empty(stats, {sides, N, K1, kCoefs});
  rows_all(Shape(N, K1 - 1, 1, true), p, args_of(args, N, p.points()), from, sides,
           value.mutable_data_ptr<double>(), coef.mutable_data_ptr<double>());
  return {value, coef};
}

Tensor spread(const Tensor& grad, const Tensor& s, const MaybeTensor& t, const MaybeTensor& labels,
              const MaybeTensor& mask, const Tensor& coef, int64_t vocab, int64_t ignore, int64_t side) {
  const Batch x = batch(s, t, labels, mask, vocab, ignore);
  const Tensor& own = side_of(s, t, side);
  Tensor out = empty_as(own);
  const Gradient to(out.mutable_data_ptr(), x.rows, width_of(own) * (side ? x.t : x.s).size(), true);
  spread_all(x, Shape(x.rows, coef.size(1) - 1, width_of(own), is_double(s, t, vocab)), coefs_of(coef, x.rows),
             grad.const_data_ptr<double>(), step_of(grad, x.rows, "grad"), int(side), to);
  return out;
}

// The sum of the weighted values; the gradient goes to `out`, which may be the student itself.
Tensor step_to(const Tensor& s, const MaybeTensor& t, const MaybeTensor& labels, const MaybeTensor& mask,
               const Tensor& args, const Tensor& program, const MaybeTensor& weight, double divisor, int64_t vocab,
               int64_t ignore, Tensor& out, bool fresh) {
  const Program p = program_of(program);
  const Batch x = batch(s, t, labels, mask, vocab, ignore);
  const std::vector<double> g = factors(x, weight, divisor);
  const Shape z(x.rows, p.points(), width_of(s), is_double(s, t, vocab));
  std::vector<double> value(x.rows), coef(z.split ? x.rows * z.coefs() : 0);
  const Gradient to = gradient_of(x, s, out, fresh);
  step_rows(x, z, p, args_of(args, x.rows, p.points()), g.data(), value.data(), coef.data(), to);
  return total_of(x, s, g, value);
}

Tensor exp2_of(const Tensor& x) {
  const bool single = type_of(x) == Type::f32;
  STD_TORCH_CHECK(x.is_contiguous() && (single || type_of(x) == Type::f64), "kdkernels: exp2 takes floats and doubles");
  Tensor out = torch::stable::new_empty(x, {x.numel()});
  const int64_t n = x.numel();
  for (int64_t i = 0; i < n; i += kTile) {
    const int count = int(std::min<int64_t>(n - i, kTile));
    if (single) tiles<float>().exp2(x.const_data_ptr<float>() + i, count, out.mutable_data_ptr<float>() + i);
    else tiles<double>().exp2(x.const_data_ptr<double>() + i, count, out.mutable_data_ptr<double>() + i);
  }
  return out;
}

int64_t isa() { return instruction_set(); }

}  // namespace

STABLE_TORCH_LIBRARY(kdkernels, m) {
  m.def("reduce(Tensor student, Tensor? teacher, Tensor? labels, Tensor? mask, Tensor args, Tensor program, "
        "SymInt vocab, int ignore_index) -> Tensor");
  m.def("rows(Tensor stats, Tensor args, Tensor program, int sides) -> (Tensor, Tensor)");
  m.def("spread(Tensor grad, Tensor student, Tensor? teacher, Tensor? labels, Tensor? mask, Tensor coef, "
        "SymInt vocab, int ignore_index, int side) -> Tensor");
  m.def("step(Tensor student, Tensor? teacher, Tensor? labels, Tensor? mask, Tensor args, Tensor program, "
        "Tensor? weight, float divisor, SymInt vocab, int ignore_index) -> (Tensor, Tensor)");
  m.def("step_out(Tensor student, Tensor? teacher, Tensor? labels, Tensor? mask, Tensor args, Tensor program, "
        "Tensor? weight, float divisor, SymInt vocab, int ignore_index, Tensor(a!) out) -> Tensor");
  m.def("exp2(Tensor x) -> Tensor");
  m.def("isa() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("reduce", TORCH_BOX(&reduce));
  m.impl("rows", TORCH_BOX(&rows));
  m.impl("spread", TORCH_BOX(&spread));
  m.impl("step", TORCH_BOX(&step<step_to>));
  m.impl("step_out", TORCH_BOX(&step_out<step_to>));
  m.impl("exp2", TORCH_BOX(&exp2_of));
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&isa)); }
