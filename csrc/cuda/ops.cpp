// Operators of the cuda backend: kdkernels::cuda_..., the same as the cpu's (csrc/cpu/ops.cpp). Stable ABI, no CUDA header.
#include <torch/csrc/stable/accelerator.h>

#include <cstring>
#include <string>
#include <tuple>

#include "../tensors.h"
#include "launch.h"

#ifndef KD_DISPATCH
#define KD_DISPATCH CUDA  // the tests' emulator makes it CPU
#endif

namespace {

using namespace kd;
using namespace kd::gpu;

#ifdef USE_CUDA
using Guard = torch::stable::accelerator::DeviceGuard;
void* stream_of(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}
void check(int error, const char* what) {
  char* message = nullptr;
  torch_c10_cuda_check_msg(error, __FILE__, what, __LINE__, true, &message);
  if (!message) return;
  const std::string text(message);
  torch_c10_cuda_free_error_msg(message);
  STD_TORCH_CHECK(false, text);
}
#else
struct Guard { explicit Guard(int64_t) {} };
void* stream_of(const Tensor&) { return nullptr; }
void check(int error, const char* what) { STD_TORCH_CHECK(error == 0, "kdkernels: ", what, " failed: ", error); }
#endif

Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::Half: return Type::f16;
    case ScalarType::BFloat16: return Type::bf16;
    default: STD_TORCH_CHECK(false, "kdkernels: logits on a GPU must be float32, float16 or bfloat16");
  }
}
Matrix matrix(const Tensor& x) {
  const Strides at(x);
  return {x.const_data_ptr(), type_of(x), at.inner, at.outer_stride, at.inner_stride};
}
bool on_host(const Tensor& x) { return x.device().type() == torch::headeronly::DeviceType::CPU; }

// The program, and the arguments where all rows have the same: read here, on the host.
void set_program(Problem& p, const Tensor& program, const Tensor& args, int64_t rows) {
  STD_TORCH_CHECK(on_host(program), "kdkernels: program must be on the CPU");
  const Program x = program_of(program);
  const int K = x.points();
  STD_TORCH_CHECK(!x.elements(), "kdkernels: backend 'cuda' has no kernels for separable losses");
  p.count = int(program.numel());
  const int64_t step = args_step(args, rows, K);
  const bool inlined = on_host(args) && args.size(0) == 1;
  STD_TORCH_CHECK(p.count + (inlined ? 3 + 2 * K : 0) <= kNumbers,
                  "kdkernels: this loss is too long for backend 'cuda' (", p.count, " numbers); use 'triton'");
  std::memcpy(p.numbers, x.data, p.count * sizeof(double));
  if (inlined) {
    std::memcpy(p.numbers + p.count, args.const_data_ptr(), (3 + 2 * K) * sizeof(double));
  } else {
    p.row_args = args.const_data_ptr<double>();
    p.args_stride = step;
  }
}

void set_rows(Problem& p, const Tensor& s, const MaybeTensor& t, const MaybeTensor& labels, const MaybeTensor& mask,
              int64_t vocab, int64_t ignore) {
  p.s = matrix(s);
  p.t = t ? matrix(*t) : p.s;
  p.rows = rows_of(s);
  p.vocab = vocab;
  p.ignore = ignore;
  check_rows(s, t, vocab);
  p.labels = labels_of(labels, p.rows);
  p.mask = static_cast<const uint8_t*>(mask_of(mask, vocab));
}

Tensor cuda_reduce(const Tensor& s, const MaybeTensor& t, const MaybeTensor& labels, const MaybeTensor& mask,
                   const Tensor& args, const Tensor& program, int64_t vocab, int64_t ignore) {
  const Guard guard(s.get_device_index());
  ReduceTask task{};
  set_rows(task.problem, s, t, labels, mask, vocab, ignore);
  set_program(task.problem, program, args, task.problem.rows);
  Tensor stats = doubles(s, {task.problem.rows, task.problem.points() + 1, kStats});
  task.stats = stats.mutable_data_ptr<double>();
  check(reduce(task, stream_of(s)), "reduce");
  return stats;
}

std::tuple<Tensor, Tensor> cuda_rows(const Tensor& stats, const Tensor& args, const Tensor& program, int64_t sides) {
  const Guard guard(stats.get_device_index());
  const int64_t N = stats.size(0), K1 = stats.size(1);
  RowsTask task{};
  task.problem.rows = N;
  set_program(task.problem, program, args, N);
  task.stats = stats_of(stats, task.problem.points());
  const int64_t registers = 6 * (K1 - 1) + 4 + task.problem.length();
  Tensor value = doubles(stats, {N}), coef = doubles(stats, {sides, N, K1, kCoefs});
  Tensor scratch = doubles(stats, {N, 2 * registers});
  task.registers = scratch.mutable_data_ptr<double>();
  task.value = value.mutable_data_ptr<double>();
  task.coef = coef.mutable_data_ptr<double>();
  task.sides = int(sides);
  check(rows(task, stream_of(stats)), "rows");
  return {value, coef};
}

Tensor cuda_spread(const Tensor& grad, const Tensor& s, const MaybeTensor& t, const MaybeTensor& labels,
                   const MaybeTensor& mask, const Tensor& coef, int64_t vocab, int64_t ignore, int64_t side) {
  const Guard guard(s.get_device_index());
  SpreadTask task{};
  set_rows(task.problem, s, t, labels, mask, vocab, ignore);
  const Tensor& own = side_of(s, t, side);
  task.coef = coefs_of(coef, task.problem.rows);
  Tensor out = empty_as(own);
  task.problem.numbers[0] = double(coef.size(1) - 1);
  task.grad = grad.const_data_ptr<double>();
  task.grad_step = step_of(grad, task.problem.rows, "grad");
  task.side = int(side);
  task.out = {out.mutable_data_ptr(), width_of(own), false};
  check(spread(task, stream_of(s)), "spread");
  return out;
}

// The sum of the weighted values; the gradient goes to `out`, which may be the student itself.
Tensor step_to(const Tensor& s, const MaybeTensor& t, const MaybeTensor& labels, const MaybeTensor& mask,
               const Tensor& args, const Tensor& program, const MaybeTensor& weight, double divisor, int64_t vocab,
               int64_t ignore, Tensor& out, bool accumulate, int64_t form) {
  const Guard guard(s.get_device_index());
  void* stream = stream_of(s);
  StepTask task{};
  set_rows(task.problem, s, t, labels, mask, vocab, ignore);
  set_program(task.problem, program, args, task.problem.rows);
  const int64_t rows = task.problem.rows;
  check_out(out, s);
  Tensor parts = doubles(s, {kMaxBlocks + 2}), sum = torch::stable::new_empty(s, {}, ScalarType::Float);
  double* memory = parts.mutable_data_ptr<double>();
  task.total = {memory + 2, memory, reinterpret_cast<int*>(memory + 1), sum.mutable_data_ptr<float>()};
  task.factor = {weight ? weight->const_data_ptr<double>() : nullptr,
                 weight ? step_of(*weight, rows, "weight") : 0, divisor, task.total.kept};
  const bool counts = divisor == 0 && labels;
  if (divisor == 0 && !labels) task.factor.divisor = double(std::max<int64_t>(rows, 1));
  check(begin(counts ? task.problem.labels : nullptr, rows, ignore, task.total, stream), "begin");
  task.out = {out.mutable_data_ptr(), width_of(s), accumulate};
  check(step(task, int(form), stream), "step");
  return sum;
}

std::tuple<Tensor, Tensor> cuda_step(const Tensor& s, const MaybeTensor& t, const MaybeTensor& labels,
                                     const MaybeTensor& mask, const Tensor& args, const Tensor& program,
                                     const MaybeTensor& weight, double divisor, int64_t vocab, int64_t ignore,
                                     int64_t form) {
  Tensor out = empty_as(s);
  Tensor sum = step_to(s, t, labels, mask, args, program, weight, divisor, vocab, ignore, out, false, form);
  return {sum, out};
}

Tensor cuda_step_out(const Tensor& s, const MaybeTensor& t, const MaybeTensor& labels, const MaybeTensor& mask,
                     const Tensor& args, const Tensor& program, const MaybeTensor& weight, double divisor,
                     int64_t vocab, int64_t ignore, Tensor out, bool accumulate, int64_t form) {
  return step_to(s, t, labels, mask, args, program, weight, divisor, vocab, ignore, out, accumulate, form);
}

void cuda_rescale(Tensor x, const Tensor& factor) {
  const Guard guard(x.get_device_index());
  const bool wide = factor.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(x.is_contiguous() && factor.numel() == 1 && (wide || factor.scalar_type() == ScalarType::Float),
                  "kdkernels: rescale takes a contiguous tensor and one float32 or float64 factor");
  check(rescale(x.mutable_data_ptr(), type_of(x), x.numel(), factor.const_data_ptr(), wide, stream_of(x)), "rescale");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def("cuda_reduce(Tensor student, Tensor? teacher, Tensor? labels, Tensor? mask, Tensor args, Tensor program, "
        "SymInt vocab, int ignore_index) -> Tensor");
  m.def("cuda_rows(Tensor stats, Tensor args, Tensor program, int sides) -> (Tensor, Tensor)");
  m.def("cuda_spread(Tensor grad, Tensor student, Tensor? teacher, Tensor? labels, Tensor? mask, Tensor coef, "
        "SymInt vocab, int ignore_index, int side) -> Tensor");
  m.def("cuda_step(Tensor student, Tensor? teacher, Tensor? labels, Tensor? mask, Tensor args, Tensor program, "
        "Tensor? weight, float divisor, SymInt vocab, int ignore_index, int form) -> (Tensor, Tensor)");
  m.def("cuda_step_out(Tensor student, Tensor? teacher, Tensor? labels, Tensor? mask, Tensor args, Tensor program, "
        "Tensor? weight, float divisor, SymInt vocab, int ignore_index, Tensor(a!) out, bool accumulate, int form) -> Tensor");
  m.def("cuda_rescale(Tensor(a!) x, Tensor factor) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, KD_DISPATCH, m) {
  m.impl("cuda_reduce", TORCH_BOX(&cuda_reduce));
  m.impl("cuda_rows", TORCH_BOX(&cuda_rows));
  m.impl("cuda_spread", TORCH_BOX(&cuda_spread));
  m.impl("cuda_step", TORCH_BOX(&cuda_step));
  m.impl("cuda_step_out", TORCH_BOX(&cuda_step_out));
  m.impl("cuda_rescale", TORCH_BOX(&cuda_rescale));
}

#include "rankops.inl"
