// Operators of the cpu backend, and the schemas that the cuda backend shares. Stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <optional>
#include <tuple>

#include "rows.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using namespace kd;

int instruction_set() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}
template <typename R> const Tiles<R>& tiles();
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PICK(t) static const auto& x = *std::array{&base::t, &avx2::t, &avx512::t}[instruction_set()]; return x
#else
#define PICK(t) return base::t
#endif
template <> const Tiles<float>& tiles() { PICK(f32); }
template <> const Tiles<double>& tiles() { PICK(f64); }

Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double: return Type::f64;
    case ScalarType::Float: return Type::f32;
    case ScalarType::Half: return Type::f16;
    case ScalarType::BFloat16: return Type::bf16;
    default: STD_TORCH_CHECK(false, "kdkernels: logits must be float64, float32, float16 or bfloat16");
  }
}

Logits logits(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3 && (x.size(2) <= 1 || x.stride(2) == 1), "kdkernels: logits must be (A, B, W), W dense");
  return {static_cast<const char*>(x.const_data_ptr()), type_of(x), x.size(1) ? x.size(1) : 1, x.stride(0), x.stride(1)};
}

Batch batch(const Tensor& s, const MaybeTensor& t, const MaybeTensor& labels, const MaybeTensor& mask, int64_t vocab,
            int64_t ignore) {
  Batch x;
  x.s = logits(s);
  x.rows = s.size(0) * s.size(1);
  x.vocab = vocab;
  x.ignore = ignore;
  STD_TORCH_CHECK(vocab >= 1 && vocab <= s.size(2), "kdkernels: vocab must be in [1, W]");
  if (t) {
    x.t = logits(*t);
    STD_TORCH_CHECK(t->size(0) == s.size(0) && t->size(1) == s.size(1) && vocab <= t->size(2),
                    "kdkernels: teacher and student have different rows");
  }
  if (labels) {
    STD_TORCH_CHECK(labels->scalar_type() == ScalarType::Long && labels->numel() == x.rows && labels->is_contiguous(),
                    "kdkernels: labels must be (N,) contiguous int64");
    x.labels = labels->const_data_ptr<int64_t>();
    for (int64_t n = 0; n < x.rows; ++n)
      STD_TORCH_CHECK(x.labels[n] == ignore || (x.labels[n] >= 0 && x.labels[n] < vocab), "kdkernels: labels must be in [0, ",
                      vocab, ") or ignore_index=", ignore, ", got ", x.labels[n], " at row ", n);
  }
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->numel() == vocab && mask->is_contiguous(),
                    "kdkernels: mask must be (vocab,) bool");
    x.mask = static_cast<const bool*>(mask->const_data_ptr());
  }
  return x;
}

struct Args {
  const double* data;
  int64_t stride;
  Args(const Tensor& args, int64_t rows, int points)
      : data(args.const_data_ptr<double>()), stride(args.size(0) == 1 ? 0 : args.size(1)) {
    STD_TORCH_CHECK(args.dim() == 2 && args.size(1) == 3 + 2 * points && args.is_contiguous() &&
                        (args.size(0) == 1 || args.size(0) == rows),
                    "kdkernels: args must be (1 or N, 3 + 2K) contiguous float64");
  }
  const double* operator[](int64_t n) const { return data + n * stride; }
};

Program program_of(const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Double && x.dim() == 1 && x.numel() >= 4 && x.is_contiguous(),
                  "kdkernels: program must be a contiguous float64 vector");
  const Program p{x.const_data_ptr<double>()};
  STD_TORCH_CHECK(x.numel() == 4 + p.points() + 5 * p.length(), "kdkernels: program is damaged");
  return p;
}

// A chunk of rows is worth a thread from about 32k classes on.
int64_t grain(int64_t vocab) { return 1 + (1 << 15) / vocab; }
// Narrow rows too are computed in double: with few classes the rounding of single weights does not average out.
constexpr int64_t kNarrow = 512;
bool is_double(const Tensor& s, const MaybeTensor& t, int64_t vocab) {
  return vocab <= kNarrow || s.scalar_type() == ScalarType::Double || (t && t->scalar_type() == ScalarType::Double);
}

Tensor reduce(const Tensor& s, const MaybeTensor& t, const MaybeTensor& labels, const MaybeTensor& mask,
              const Tensor& args, const Tensor& program, int64_t vocab, int64_t ignore) {
  const Program p = program_of(program);
  const Batch x = batch(s, t, labels, mask, vocab, ignore);
  const Args row_args(args, x.rows, p.points());
  Tensor stats = torch::stable::new_empty(s, {x.rows, p.points() + 1, kStats}, ScalarType::Double);
  double* out = stats.mutable_data_ptr<double>();
  const int64_t width = (p.points() + 1) * kStats;
  const bool wide = is_double(s, t, vocab);
  torch::stable::parallel_for(0, x.rows, grain(vocab), [&](int64_t lo, int64_t hi) {
    for (int64_t n = lo; n < hi; ++n)
      wide ? reduce_row(tiles<double>(), x, n, p, row_args[n], out + n * width)
           : reduce_row(tiles<float>(), x, n, p, row_args[n], out + n * width);
  });
  return stats;
}

std::tuple<Tensor, Tensor> rows(const Tensor& stats, const Tensor& args, const Tensor& program, int64_t sides) {
  const Program p = program_of(program);
  const int64_t N = stats.size(0), K1 = p.points() + 1;
  STD_TORCH_CHECK(stats.dim() == 3 && stats.size(1) == K1 && stats.size(2) == kStats && stats.is_contiguous(),
                  "kdkernels: stats must be (N, K + 1, 7) contiguous");
  STD_TORCH_CHECK(sides == 1 || sides == 2, "kdkernels: sides must be 1 or 2");
  const Args row_args(args, N, p.points());
  Tensor value = torch::stable::new_empty(stats, {N}, ScalarType::Double);
  Tensor coef = torch::stable::new_empty(stats, {sides, N, K1, kCoefs}, ScalarType::Double);
  const double* in = stats.const_data_ptr<double>();
  double *v = value.mutable_data_ptr<double>(), *c = coef.mutable_data_ptr<double>();
  torch::stable::parallel_for(0, N, 256, [&](int64_t lo, int64_t hi) {
    std::vector<double> scratch(2 * p.registers());
    for (int64_t n = lo; n < hi; ++n)
      v[n] = value_and_coefs(p, row_args[n], in + n * K1 * kStats, int(sides), N * K1 * kCoefs, scratch.data(),
                             c + n * K1 * kCoefs);
  });
  return {value, coef};
}

Tensor spread(const Tensor& grad, const Tensor& s, const MaybeTensor& t, const MaybeTensor& labels,
              const MaybeTensor& mask, const Tensor& coef, int64_t vocab, int64_t ignore, int64_t side) {
  const Batch x = batch(s, t, labels, mask, vocab, ignore);
  STD_TORCH_CHECK(side == 0 || t, "kdkernels: no teacher to spread to");
  const Tensor& own = side ? *t : s;
  const int64_t K = coef.size(1) - 1, width = own.size(2);
  STD_TORCH_CHECK(coef.dim() == 3 && coef.size(0) == x.rows && coef.size(2) == kCoefs && coef.is_contiguous(),
                  "kdkernels: coef must be (N, K + 1, 10) contiguous");
  STD_TORCH_CHECK(grad.is_contiguous() && (grad.numel() == 1 || grad.numel() == x.rows), "kdkernels: grad must be (1 or N,)");
  Tensor out = torch::stable::new_empty(own, {own.size(0), own.size(1), width});
  char* d = static_cast<char*>(out.mutable_data_ptr());
  const double *c = coef.const_data_ptr<double>(), *g = grad.const_data_ptr<double>();
  const int64_t step = grad.numel() == 1 ? 0 : 1, bytes = width * (side ? x.t : x.s).size();
  const bool wide = is_double(s, t, vocab);
  torch::stable::parallel_for(0, x.rows, grain(vocab), [&](int64_t lo, int64_t hi) {
    for (int64_t n = lo; n < hi; ++n) {
      const double* cn = c + n * (K + 1) * kCoefs;
      wide ? spread_row(tiles<double>(), x, n, int(K), cn, g[n * step], int(side), width, d + n * bytes)
           : spread_row(tiles<float>(), x, n, int(K), cn, g[n * step], int(side), width, d + n * bytes);
    }
  });
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
  m.def("isa() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("reduce", TORCH_BOX(&reduce));
  m.impl("rows", TORCH_BOX(&rows));
  m.impl("spread", TORCH_BOX(&spread));
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&isa)); }
