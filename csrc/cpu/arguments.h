// What an operator is given, in the kernels' terms. Stable ABI.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>

#include "parallel.h"

namespace kd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double: return Type::f64;
    case ScalarType::Float: return Type::f32;
    case ScalarType::Half: return Type::f16;
    case ScalarType::BFloat16: return Type::bf16;
    default: STD_TORCH_CHECK(false, "kdkernels: logits must be float64, float32, float16 or bfloat16");
  }
}

// (N, W) or (A, B, W), W dense.
inline Logits logits(const Tensor& x) {
  const int64_t d = x.dim();
  STD_TORCH_CHECK((d == 2 || d == 3) && (x.size(d - 1) <= 1 || x.stride(d - 1) == 1),
                  "kdkernels: logits must be (N, W) or (A, B, W), W dense");
  const int64_t inner = x.size(d - 2) ? x.size(d - 2) : 1;
  return {static_cast<const char*>(x.const_data_ptr()), type_of(x), inner, d == 3 ? x.stride(0) : 0, x.stride(d - 2)};
}
inline int64_t width_of(const Tensor& x) { return x.size(x.dim() - 1); }
inline int64_t rows_of(const Tensor& x) { return x.dim() == 3 ? x.size(0) * x.size(1) : x.size(0); }
inline Tensor empty_as(const Tensor& x) {
  if (x.dim() == 2) return torch::stable::new_empty(x, {x.size(0), x.size(1)});
  return torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
}

inline Batch batch(const Tensor& s, const MaybeTensor& t, const MaybeTensor& labels, const MaybeTensor& mask,
                   int64_t vocab, int64_t ignore) {
  Batch x;
  x.s = logits(s);
  x.rows = rows_of(s);
  x.vocab = vocab;
  x.ignore = ignore;
  STD_TORCH_CHECK(vocab >= 1 && vocab <= width_of(s), "kdkernels: vocab must be in [1, W]");
  if (t) {
    x.t = logits(*t);
    STD_TORCH_CHECK(rows_of(*t) == x.rows && vocab <= width_of(*t),
                    "kdkernels: teacher and student have different rows");
  }
  if (labels) {
    STD_TORCH_CHECK(labels->scalar_type() == ScalarType::Long && labels->numel() == x.rows && labels->is_contiguous(),
                    "kdkernels: labels must be (N,) contiguous int64");
    x.labels = labels->const_data_ptr<int64_t>();
    for (int64_t n = 0; n < x.rows; ++n)
      STD_TORCH_CHECK(x.labels[n] == ignore || x.labels[n] == kElsewhere || (x.labels[n] >= 0 && x.labels[n] < vocab),
                      "kdkernels: labels must be in [0, ", vocab, ") or ignore_index=", ignore, ", got ", x.labels[n],
                      " at row ", n);
  }
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->numel() == vocab && mask->is_contiguous(),
                    "kdkernels: mask must be (vocab,) bool");
    x.mask = static_cast<const bool*>(mask->const_data_ptr());
  }
  return x;
}

inline int64_t step_of(const Tensor& grad, int64_t rows) {
  STD_TORCH_CHECK(grad.is_contiguous() && (grad.numel() == 1 || grad.numel() == rows),
                  "kdkernels: grad must be (1 or N,)");
  return grad.numel() == 1 ? 0 : 1;
}

inline Args args_of(const Tensor& args, int64_t rows, int points) {
  STD_TORCH_CHECK(args.dim() == 2 && args.size(1) == 3 + 2 * points && args.is_contiguous() &&
                      (args.size(0) == 1 || args.size(0) == rows),
                  "kdkernels: args must be (1 or N, 3 + 2K) contiguous float64");
  return {args.const_data_ptr<double>(), args.size(0) == 1 ? 0 : args.size(1)};
}

inline Program program_of(const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Double && x.dim() == 1 && x.numel() >= 4 && x.is_contiguous(),
                  "kdkernels: program must be a contiguous float64 vector");
  const Program p{x.const_data_ptr<double>()};
  STD_TORCH_CHECK(x.numel() == 4 + p.points() + 5 * p.length() + p.elements(), "kdkernels: program is damaged");
  return p;
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
  const int64_t step = weight ? step_of(*weight, x.rows) : 0;
  std::vector<double> out(x.rows);
  for (int64_t n = 0; n < x.rows; ++n) out[n] = x.kept(n) ? (w ? w[n * step] : 1) / over : 0;
  return out;
}

// Where a step writes: `out`, which may be the student itself.
inline Gradient gradient_of(const Batch& x, const Tensor& s, Tensor& out, bool fresh) {
  STD_TORCH_CHECK(out.is_contiguous() && out.numel() == x.rows * width_of(s) && out.scalar_type() == s.scalar_type(),
                  "kdkernels: out must be contiguous, of the student's shape and dtype");
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

}  // namespace kd
