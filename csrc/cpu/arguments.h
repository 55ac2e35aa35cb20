// What an operator is given, in the kernels' terms. Stable ABI.
#pragma once
#include <tuple>

#include "../tensors.h"
#include "parallel.h"

namespace kd {

inline Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double: return Type::f64;
    case ScalarType::Float: return Type::f32;
    case ScalarType::Half: return Type::f16;
    case ScalarType::BFloat16: return Type::bf16;
    default: STD_TORCH_CHECK(false, "kdkernels: logits must be float64, float32, float16 or bfloat16");
  }
}

inline Logits logits(const Tensor& x) {
  const Strides at(x);
  return {static_cast<const char*>(x.const_data_ptr()), type_of(x), at.inner, at.outer_stride, at.inner_stride};
}

inline Batch batch(const Tensor& s, const MaybeTensor& t, const MaybeTensor& labels, const MaybeTensor& mask,
                   int64_t vocab, int64_t ignore) {
  Batch x;
  x.s = logits(s);
  x.rows = rows_of(s);
  x.vocab = vocab;
  x.ignore = ignore;
  check_rows(s, t, vocab);
  if (t) x.t = logits(*t);
  x.labels = labels_of(labels, x.rows);
  for (int64_t n = 0; x.labels && n < x.rows; ++n)
    STD_TORCH_CHECK(x.labels[n] == ignore || x.labels[n] == kElsewhere || (x.labels[n] >= 0 && x.labels[n] < vocab),
                    "kdkernels: labels must be in [0, ", vocab, ") or ignore_index=", ignore, ", got ", x.labels[n],
                    " at row ", n);
  x.mask = static_cast<const bool*>(mask_of(mask, vocab));
  return x;
}

inline Args args_of(const Tensor& args, int64_t rows, int points) {
  const int64_t step = args_step(args, rows, points);
  return {args.const_data_ptr<double>(), step};
}

inline bool is_double(const Tensor& s, const MaybeTensor& t, int64_t vocab) {
  return vocab <= kNarrow || s.scalar_type() == ScalarType::Double || (t && t->scalar_type() == ScalarType::Double);
}

// weight / divisor of every row; divisor 0 stands for the number of kept rows.
inline std::vector<double> factors(const Batch& x, const MaybeTensor& weight, double divisor) {
  int64_t kept = 0;
  for (int64_t n = 0; n < x.rows; ++n) kept += x.kept(n);
  const double over = divisor != 0 ? divisor : double(std::max<int64_t>(kept, 1));
  const double* w = weight ? weight->const_data_ptr<double>() : nullptr;
  const int64_t step = weight ? step_of(*weight, x.rows, "weight") : 0;
  std::vector<double> out(x.rows);
  for (int64_t n = 0; n < x.rows; ++n) out[n] = x.kept(n) ? (w ? w[n * step] : 1) / over : 0;
  return out;
}

// Where a step writes: `out`, which may be the student itself.
inline Gradient gradient_of(const Batch& x, const Tensor& s, Tensor& out, bool fresh) {
  check_out(out, s);
  return Gradient(out.mutable_data_ptr(), x.rows, width_of(s) * x.s.size(), fresh);
}

inline Tensor total_of(const Batch& x, const Tensor& s, const std::vector<double>& g, const std::vector<double>& value) {
  double sum = 0;
  for (int64_t n = 0; n < x.rows; ++n)
    if (x.kept(n) && g[n] != 0) sum += g[n] * value[n];
  const bool wide = s.scalar_type() == ScalarType::Double;
  Tensor total = torch::stable::new_empty(s, {}, wide ? ScalarType::Double : ScalarType::Float);
  if (wide) *total.mutable_data_ptr<double>() = sum;
  else *total.mutable_data_ptr<float>() = float(sum);
  return total;
}

// The operators step and step_out of a function that writes the gradient and returns the sum of the weighted values.
using Step = Tensor(const Tensor& s, const MaybeTensor& t, const MaybeTensor& labels, const MaybeTensor& mask,
                    const Tensor& args, const Tensor& program, const MaybeTensor& weight, double divisor, int64_t vocab,
                    int64_t ignore, Tensor& out, bool fresh);
template <Step* run>
std::tuple<Tensor, Tensor> step(const Tensor& s, const MaybeTensor& t, const MaybeTensor& labels,
                                const MaybeTensor& mask, const Tensor& args, const Tensor& program,
                                const MaybeTensor& weight, double divisor, int64_t vocab, int64_t ignore) {
  Tensor out = empty_as(s);
  Tensor total = run(s, t, labels, mask, args, program, weight, divisor, vocab, ignore, out, true);
  return {total, out};
}
template <Step* run>
Tensor step_out(const Tensor& s, const MaybeTensor& t, const MaybeTensor& labels, const MaybeTensor& mask,
                const Tensor& args, const Tensor& program, const MaybeTensor& weight, double divisor, int64_t vocab,
                int64_t ignore, Tensor out) {
  return run(s, t, labels, mask, args, program, weight, divisor, vocab, ignore, out, false);
}

}  // namespace kd
