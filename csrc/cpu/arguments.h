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

}  // namespace kd
