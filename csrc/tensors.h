// What the operators of both libraries check of the tensors they are given. Stable ABI.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>

#include "moments.h"

namespace kd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline int64_t width_of(const Tensor& x) { return x.size(x.dim() - 1); }
inline int64_t rows_of(const Tensor& x) { return x.dim() == 3 ? x.size(0) * x.size(1) : x.size(0); }
inline Tensor empty_as(const Tensor& x) {
  if (x.dim() == 2) return torch::stable::new_empty(x, {x.size(0), x.size(1)});
  return torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
}
inline Tensor doubles(const Tensor& like, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape), ScalarType::Double);
}

// Where the rows of (A, B, W) are, or of (N, W) with A = 1: row n is (n / inner, n % inner). Strides in elements.
struct Strides {
  int64_t inner, outer_stride, inner_stride;
  explicit Strides(const Tensor& x) {
    const int64_t d = x.dim();
    STD_TORCH_CHECK((d == 2 || d == 3) && (x.size(d - 1) <= 1 || x.stride(d - 1) == 1),
                    "kdkernels: logits must be (N, W) or (A, B, W), W dense");
    inner = std::max<int64_t>(x.size(d - 2), 1);
    outer_stride = d == 3 ? x.stride(0) : 0;
    inner_stride = x.stride(d - 2);
  }
};

inline void check_rows(const Tensor& s, const MaybeTensor& t, int64_t vocab) {
  STD_TORCH_CHECK(vocab >= 1 && vocab <= width_of(s), "kdkernels: vocab must be in [1, W]");
  STD_TORCH_CHECK(!t || (rows_of(*t) == rows_of(s) && vocab <= width_of(*t)),
                  "kdkernels: teacher and student have different rows");
}
inline const int64_t* labels_of(const MaybeTensor& labels, int64_t rows) {
  if (!labels) return nullptr;
  STD_TORCH_CHECK(labels->scalar_type() == ScalarType::Long && labels->numel() == rows && labels->is_contiguous(),
                  "kdkernels: labels must be (N,) contiguous int64");
  return labels->const_data_ptr<int64_t>();
}
inline const void* mask_of(const MaybeTensor& mask, int64_t vocab) {
  if (!mask) return nullptr;
  STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->numel() == vocab && mask->is_contiguous(),
                  "kdkernels: mask must be (vocab,) bool");
  return mask->const_data_ptr();
}
// 0 where there is one number for all rows.
inline int64_t step_of(const Tensor& x, int64_t rows, const char* name) {
  STD_TORCH_CHECK(x.is_contiguous() && (x.numel() == 1 || x.numel() == rows), "kdkernels: ", name, " must be (1 or N,)");
  return x.numel() == 1 ? 0 : 1;
}
inline Program program_of(const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Double && x.dim() == 1 && x.numel() >= 4 && x.is_contiguous(),
                  "kdkernels: program must be a contiguous float64 vector");
  const Program p{x.const_data_ptr<double>()};
  STD_TORCH_CHECK(x.numel() == 4 + p.points() + 5 * p.length() + p.elements(), "kdkernels: program is damaged");
  return p;
}
// The step from row to row, 0 where all rows have the same arguments.
inline int64_t args_step(const Tensor& args, int64_t rows, int points) {
  STD_TORCH_CHECK(args.dim() == 2 && args.size(1) == 3 + 2 * points && args.is_contiguous() &&
                      (args.size(0) == 1 || args.size(0) == rows) && args.scalar_type() == ScalarType::Double,
                  "kdkernels: args must be (1 or N, 3 + 2K) contiguous float64");
  return args.size(0) == 1 ? 0 : args.size(1);
}
inline const double* stats_of(const Tensor& x, int points) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(1) == points + 1 && x.size(2) == kStats && x.is_contiguous(),
                  "kdkernels: stats must be (N, K + 1, 7) contiguous");
  return x.const_data_ptr<double>();
}
inline const double* coefs_of(const Tensor& x, int64_t rows) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == rows && x.size(2) == kCoefs && x.is_contiguous(),
                  "kdkernels: coef must be (N, K + 1, 10) contiguous");
  return x.const_data_ptr<double>();
}
inline const Tensor& side_of(const Tensor& s, const MaybeTensor& t, int64_t side) {
  STD_TORCH_CHECK(side == 0 || t, "kdkernels: no teacher to spread to");
  return side ? *t : s;
}
inline void check_out(const Tensor& out, const Tensor& s) {
  STD_TORCH_CHECK(out.is_contiguous() && out.numel() == rows_of(s) * width_of(s) && out.scalar_type() == s.scalar_type(),
                  "kdkernels: out must be contiguous, of the student's shape and dtype");
}

}  // namespace kd
