// Operators of the cpu backend, and the schemas that the cuda backend shares. Stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <optional>
#include <tuple>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "rows.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using namespace kd;

int detected() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}
// KDKERNELS_ISA=0|1|2 lowers it (baseline, AVX2, AVX-512), for tests.
int instruction_set() {
  static const int chosen = [] {
    const char* asked = std::getenv("KDKERNELS_ISA");
    return asked && asked[0] >= '0' && asked[0] <= '2' ? std::min(asked[0] - '0', detected()) : detected();
  }();
  return chosen;
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
// Below this many rows their segments are shared among the threads as well; the bits are the same either way.
constexpr int64_t kFewRows = 64;
// The narrowest rows too are computed in double: with few classes the rounding of single weights does not average out.
constexpr int64_t kNarrow = 32;
bool is_double(const Tensor& s, const MaybeTensor& t, int64_t vocab) {
  return vocab <= kNarrow || s.scalar_type() == ScalarType::Double || (t && t->scalar_type() == ScalarType::Double);
}

// The sizes of one call.
struct Shape {
  int64_t rows, K, width, segments;
  bool wide, split;
  Shape(const Batch& x, int64_t points, int64_t width, bool wide)
      : rows(x.rows), K(points), width(width), segments(kd::segments(width)), wide(wide),
        split(x.rows < kFewRows && segments > 1) {}
  int64_t stats() const { return (K + 1) * kStats; }
  int64_t coefs() const { return (K + 1) * kCoefs; }
};

// f(row) over the rows, or f(row, segment) over their segments where there are few rows.
template <typename F> void each(const Shape& z, int64_t vocab, F f) {
  const int64_t parts = z.split ? z.segments : 1;
  torch::stable::parallel_for(0, z.rows * parts, z.split ? 1 : grain(vocab), [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; ++i) f(i / parts, i % parts);
  });
}

void reduce_all(const Batch& x, const Shape& z, const Program& p, const Args& args, double* out) {
  std::vector<double> parts(z.split ? z.rows * z.segments * z.stats() : 0);
  each(z, x.vocab, [&](int64_t n, int64_t i) {
    std::vector<double> part(z.stats());
    auto reduce = [&](const auto& isa) {
      if (!z.split) return reduce_row(isa, x, n, p, args[n], out + n * z.stats(), part.data());
      if (x.kept(n)) reduce_segment(isa, x, n, i, p, args[n], parts.data() + (n * z.segments + i) * z.stats());
    };
    z.wide ? reduce(tiles<double>()) : reduce(tiles<float>());
  });
  if (!z.split) return;
  for (int64_t n = 0; n < z.rows; ++n) {
    double* stats = out + n * z.stats();
    const double* part = parts.data() + n * z.segments * z.stats();
    std::copy(part, part + z.stats(), stats);
    if (!x.kept(n)) continue;
    for (int64_t i = 1; i < z.segments; ++i)
      merge_segments(int(z.K), stats, part + i * z.stats(), x.labels && x.labels[n] / kSegment == i);
    finish_row(int(z.K), stats);
  }
}

void rows_all(const Shape& z, const Program& p, const Args& args, const double* stats, int64_t sides, double* value,
              double* coef) {
  torch::stable::parallel_for(0, z.rows, 64, [&](int64_t lo, int64_t hi) {
    std::vector<double> scratch(2 * p.registers());
    for (int64_t n = lo; n < hi; ++n)
      value[n] = value_and_coefs(p, args[n], stats + n * z.stats(), int(sides), z.rows * z.coefs(), scratch.data(),
                                 coef + n * z.coefs());
  });
}

// A gradient larger than the caches is written past them, onto pages that are faulted in 2 MB at a time.
struct Gradient {
  char* data;
  int64_t row;
  bool stream;
  Gradient(Tensor& x, int size, bool fresh)
      : data(static_cast<char*>(x.mutable_data_ptr())), row(x.size(2) * size), stream(x.numel() * size >= 8 << 20) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t page = 2 << 20;
    const uintptr_t first = (uintptr_t(data) + page - 1) / page * page, last = (uintptr_t(data) + x.numel() * size) / page * page;
    if (fresh && stream && first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  }
};

void spread_all(const Batch& x, const Shape& z, const double* coef, const double* grad, int64_t step, int side,
                const Gradient& to) {
  each(z, x.vocab, [&](int64_t n, int64_t i) {
    const int64_t first = z.split ? i * kSegment : 0, end = z.split ? std::min(z.width, first + kSegment) : z.width;
    char* out = to.data + n * to.row;
    const double *c = coef + n * z.coefs(), g = grad[n * step];
    z.wide ? spread_part(tiles<double>(), x, n, int(z.K), c, g, side, first, end, to.stream, out)
           : spread_part(tiles<float>(), x, n, int(z.K), c, g, side, first, end, to.stream, out);
  });
}

Tensor reduce(const Tensor& s, const MaybeTensor& t, const MaybeTensor& labels, const MaybeTensor& mask,
              const Tensor& args, const Tensor& program, int64_t vocab, int64_t ignore) {
  const Program p = program_of(program);
  const Batch x = batch(s, t, labels, mask, vocab, ignore);
  const Args row_args(args, x.rows, p.points());
  Tensor stats = torch::stable::new_empty(s, {x.rows, p.points() + 1, kStats}, ScalarType::Double);
  reduce_all(x, Shape(x, p.points(), vocab, is_double(s, t, vocab)), p, row_args, stats.mutable_data_ptr<double>());
  return stats;
}

std::tuple<Tensor, Tensor> rows(const Tensor& stats, const Tensor& args, const Tensor& program, int64_t sides) {
  const Program p = program_of(program);
  const int64_t N = stats.size(0), K1 = p.points() + 1;
  STD_TORCH_CHECK(stats.dim() == 3 && stats.size(1) == K1 && stats.size(2) == kStats && stats.is_contiguous(),
                  "kdkernels: stats must be (N, K + 1, 7) contiguous");
  Batch x;
  x.rows = N;
  Tensor value = torch::stable::new_empty(stats, {N}), coef = torch::stable::new_empty(stats, {sides, N, K1, kCoefs});
  rows_all(Shape(x, K1 - 1, 1, true), p, Args(args, N, p.points()), stats.const_data_ptr<double>(), sides,
           value.mutable_data_ptr<double>(), coef.mutable_data_ptr<double>());
  return {value, coef};
}

int64_t step_of(const Tensor& grad, int64_t rows) {
  STD_TORCH_CHECK(grad.is_contiguous() && (grad.numel() == 1 || grad.numel() == rows), "kdkernels: grad must be (1 or N,)");
  return grad.numel() == 1 ? 0 : 1;
}

Tensor spread(const Tensor& grad, const Tensor& s, const MaybeTensor& t, const MaybeTensor& labels,
              const MaybeTensor& mask, const Tensor& coef, int64_t vocab, int64_t ignore, int64_t side) {
  const Batch x = batch(s, t, labels, mask, vocab, ignore);
  STD_TORCH_CHECK(side == 0 || t, "kdkernels: no teacher to spread to");
  const Tensor& own = side ? *t : s;
  STD_TORCH_CHECK(coef.dim() == 3 && coef.size(0) == x.rows && coef.size(2) == kCoefs && coef.is_contiguous(),
                  "kdkernels: coef must be (N, K + 1, 10) contiguous");
  Tensor out = torch::stable::new_empty(own, {own.size(0), own.size(1), own.size(2)});
  spread_all(x, Shape(x, coef.size(1) - 1, own.size(2), is_double(s, t, vocab)), coef.const_data_ptr<double>(),
             grad.const_data_ptr<double>(), step_of(grad, x.rows), int(side), Gradient(out, (side ? x.t : x.s).size(), true));
  return out;
}

// weight / divisor of every row; divisor 0 stands for the number of kept rows.
std::vector<double> factors(const Batch& x, const MaybeTensor& weight, double divisor) {
  int64_t kept = 0;
  for (int64_t n = 0; n < x.rows; ++n) kept += x.kept(n);
  const double over = divisor != 0 ? divisor : double(std::max<int64_t>(kept, 1));
  const double* w = weight ? weight->const_data_ptr<double>() : nullptr;
  const int64_t step = weight ? step_of(*weight, x.rows) : 0;
  std::vector<double> out(x.rows);
  for (int64_t n = 0; n < x.rows; ++n) out[n] = x.kept(n) ? (w ? w[n * step] : 1) / over : 0;
  return out;
}

// reduce, rows and spread to the student in one go: a row's gradient is written while the row is in cache.
void step_rows(const Batch& x, const Shape& z, const Program& p, const Args& args, const double* g, double* value,
               double* coef, const Gradient& to) {
  if (z.split) {
    std::vector<double> stats(z.rows * z.stats());
    Shape reading = z;
    reading.segments = segments(x.vocab);
    reduce_all(x, reading, p, args, stats.data());
    rows_all(z, p, args, stats.data(), 1, value, coef);
    return spread_all(x, z, coef, g, 1, 0, to);
  }
  torch::stable::parallel_for(0, x.rows, grain(x.vocab), [&](int64_t lo, int64_t hi) {
    std::vector<double> scratch(2 * p.registers() + 2 * z.stats());
    double *stats = scratch.data() + 2 * p.registers(), *part = stats + z.stats();
    for (int64_t n = lo; n < hi; ++n) {
      double* c = coef + n * z.coefs();
      auto row = [&](const auto& isa) {
        reduce_row(isa, x, n, p, args[n], stats, part);
        value[n] = value_and_coefs(p, args[n], stats, 1, 0, scratch.data(), c);
        spread_part(isa, x, n, int(z.K), c, g[n], 0, 0, z.width, to.stream, to.data + n * to.row);
      };
      z.wide ? row(tiles<double>()) : row(tiles<float>());
    }
  });
}

// (sum of the weighted values, coef); the gradient goes to `out`, which may be the student itself.
std::tuple<Tensor, Tensor> step_to(const Tensor& s, const MaybeTensor& t, const MaybeTensor& labels,
                                   const MaybeTensor& mask, const Tensor& args, const Tensor& program,
                                   const MaybeTensor& weight, double divisor, int64_t vocab, int64_t ignore, Tensor& out,
                                   bool fresh) {
  const Program p = program_of(program);
  const Batch x = batch(s, t, labels, mask, vocab, ignore);
  STD_TORCH_CHECK(out.is_contiguous() && out.numel() == x.rows * s.size(2) && out.scalar_type() == s.scalar_type(),
                  "kdkernels: out must be contiguous, of the student's shape and dtype");
  Tensor coef = torch::stable::new_empty(s, {1, x.rows, p.points() + 1, kCoefs}, ScalarType::Double);
  const std::vector<double> g = factors(x, weight, divisor);
  std::vector<double> value(x.rows);
  step_rows(x, Shape(x, p.points(), s.size(2), is_double(s, t, vocab)), p, Args(args, x.rows, p.points()), g.data(),
            value.data(), coef.mutable_data_ptr<double>(), Gradient(out, x.s.size(), fresh));
  double sum = 0;
  for (int64_t n = 0; n < x.rows; ++n)
    if (x.kept(n)) sum += g[n] * value[n];
  const bool wide = s.scalar_type() == ScalarType::Double;
  Tensor total = torch::stable::new_empty(s, {}, wide ? ScalarType::Double : ScalarType::Float);
  if (wide) *total.mutable_data_ptr<double>() = sum;
  else *total.mutable_data_ptr<float>() = float(sum);
  return {total, coef};
}

std::tuple<Tensor, Tensor, Tensor> step(const Tensor& s, const MaybeTensor& t, const MaybeTensor& labels,
                                        const MaybeTensor& mask, const Tensor& args, const Tensor& program,
                                        const MaybeTensor& weight, double divisor, int64_t vocab, int64_t ignore) {
  Tensor out = torch::stable::new_empty(s, {s.size(0), s.size(1), s.size(2)});
  auto [total, coef] = step_to(s, t, labels, mask, args, program, weight, divisor, vocab, ignore, out, true);
  return {total, coef, out};
}

Tensor step_out(const Tensor& s, const MaybeTensor& t, const MaybeTensor& labels, const MaybeTensor& mask,
                const Tensor& args, const Tensor& program, const MaybeTensor& weight, double divisor, int64_t vocab,
                int64_t ignore, Tensor out) {
  return std::get<0>(step_to(s, t, labels, mask, args, program, weight, divisor, vocab, ignore, out, false));
}

Tensor exp2_of(const Tensor& x) {
  STD_TORCH_CHECK(x.is_contiguous() && (type_of(x) == Type::f32 || type_of(x) == Type::f64), "kdkernels: exp2 takes floats");
  Tensor out = torch::stable::new_empty(x, {x.numel()});
  const int64_t n = x.numel();
  for (int64_t i = 0; i < n; i += kTile) {
    const int count = int(std::min<int64_t>(n - i, kTile));
    if (type_of(x) == Type::f32) tiles<float>().exp2(x.const_data_ptr<float>() + i, count, out.mutable_data_ptr<float>() + i);
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
        "Tensor? weight, float divisor, SymInt vocab, int ignore_index) -> (Tensor, Tensor, Tensor)");
  m.def("step_out(Tensor student, Tensor? teacher, Tensor? labels, Tensor? mask, Tensor args, Tensor program, "
        "Tensor? weight, float divisor, SymInt vocab, int ignore_index, Tensor(a!) out) -> Tensor");
  m.def("exp2(Tensor x) -> Tensor");
  m.def("isa() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("reduce", TORCH_BOX(&reduce));
  m.impl("rows", TORCH_BOX(&rows));
  m.impl("spread", TORCH_BOX(&spread));
  m.impl("step", TORCH_BOX(&step));
  m.impl("step_out", TORCH_BOX(&step_out));
  m.impl("exp2", TORCH_BOX(&exp2_of));
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&isa)); }
