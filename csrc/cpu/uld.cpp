// Distance of two rows of probabilities, each sorted. Stable ABI; signatures as those of ranks.cpp, which has no teacher
// that needs a softmax.
#include <tuple>

#include "arguments.h"
#include "lapsum.h"
#include "live.h"

namespace {

using namespace kd;

template <typename R> struct UldScratch {
  Live<R> live;
  Order<R> order[2];
  std::vector<R> p[2], slope, out;
};

// Probabilities of the live entries of a row; false if there are none.
template <typename R> bool softmax(const R* x, int64_t n, double scale, std::vector<R>& p) {
  p.resize(n);
  R top = -std::numeric_limits<R>::infinity();
  for (int64_t i = 0; i < n; ++i) top = std::max(top, x[i]);
  if (!(top > -std::numeric_limits<R>::infinity())) return false;
  for (int64_t i = 0; i < n; ++i) p[i] = R((double(x[i]) - double(top)) * scale * kLog2e);
  exp2_in_place(p.data(), n);
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += p[i];
  for (int64_t i = 0; i < n; ++i) p[i] = R(p[i] / total);
  return true;
}

// g times the gradient by the logits of `side` goes to `out`. Of equal logits each gets the mean of their signs.
template <typename R> double row(const Batch& x, int64_t n, const double* scale, int side, double g, const RowOut& out) {
  auto& w = kept_by_thread<UldScratch<R>>();
  const Pair<R> z = w.live.find(x, n, 0, true);
  const R* logits[2] = {z.s, z.t};
  bool bad = z.nan || z.n == 0;
  for (int k = 0; k < 2 && !bad; ++k) bad = !softmax(logits[k], z.n, scale[k], w.p[k]);
  if (bad) {
    if (out.to) out.fill(NAN);
    return NAN;
  }
  for (int k = 0; k < 2; ++k) w.order[k].sort(logits[k], z.n);
  const Order<R>&own = w.order[side], &other = w.order[1 - side];
  const std::vector<R>&p = w.p[side], &q = w.p[1 - side];
  const auto gap = [&](int64_t r) { return double(p[own.at(r)]) - double(q[other.at(r)]); };
  double value = 0;
  for (int64_t r = 0; r < z.n; ++r) value += std::fabs(gap(r));
  if (!out.to) return value;
  double mean = 0;
  w.slope.resize(z.n);
  own.runs([&](int64_t first, int64_t end) {
    double signs = 0;
    for (int64_t r = first; r < end; ++r) signs += double(gap(r) > 0) - double(gap(r) < 0);
    signs /= double(end - first);
    for (int64_t r = first; r < end; ++r) w.slope[own.at(r)] = R(signs);
  });
  for (int64_t i = 0; i < z.n; ++i) mean += double(p[i]) * w.slope[i];
  out.write(z, w.out, [&](int64_t i) { return g * scale[side] * p[i] * (w.slope[i] - mean); });
  return value;
}

// g (1 or N): null where no gradient is wanted.
void run(const Batch& x, const Tensor& args, const double* g, int64_t step, int side, Type type, int64_t width,
         const Gradient* to, double* value) {
  STD_TORCH_CHECK(args.dim() == 2 && args.size(1) == 2 && args.is_contiguous() &&
                      (args.size(0) == 1 || args.size(0) == x.rows),
                  "kdkernels: args must be (1 or N, 2) contiguous float64");
  const double* scales = args.const_data_ptr<double>();
  const int64_t stride = args.size(0) == 1 ? 0 : 2;
  const bool wide = x.s.type == Type::f64 || x.t.type == Type::f64;
  torch::stable::parallel_for(0, x.rows, 1 + (1 << 12) / (x.vocab + 256), [&](int64_t lo, int64_t hi) {
    for (int64_t n = lo; n < hi; ++n) {
      const RowOut out{to, type, n, x.vocab, width};
      const double by = g ? g[n * step] : 0, *scale = scales + n * stride;
      const bool counts = x.kept(n) && by != 0;
      if (to && !counts) out.fill(0);
      const RowOut& wanted = counts ? out : out.none();
      value[n] = !x.kept(n) ? 0 : wide ? row<double>(x, n, scale, side, by, wanted)
                                       : row<float>(x, n, scale, side, by, wanted);
    }
  });
}

Tensor uld(const Tensor& s, const Tensor& t, const MaybeTensor& labels, const MaybeTensor& mask, const Tensor& args,
           int64_t, int64_t vocab, int64_t ignore) {
  const Batch x = batch(s, t, labels, mask, vocab, ignore);
  Tensor value = torch::stable::new_empty(s, {x.rows}, ScalarType::Double);
  run(x, args, nullptr, 0, 0, x.s.type, 0, nullptr, value.mutable_data_ptr<double>());
  return value;
}

std::tuple<Tensor, Tensor> uld_step(const Tensor& grad, const Tensor& s, const Tensor& t, const MaybeTensor& labels,
                                    const MaybeTensor& mask, const Tensor& args, int64_t, int64_t vocab,
                                    int64_t ignore, int64_t side) {
  const Batch x = batch(s, t, labels, mask, vocab, ignore);
  const Tensor& own = side ? t : s;
  const Logits& logits = side ? x.t : x.s;
  Tensor value = torch::stable::new_empty(s, {x.rows}, ScalarType::Double), out = empty_as(own);
  const int64_t width = width_of(own);
  const Gradient to(out.mutable_data_ptr(), x.rows, width * logits.size(), true);
  run(x, args, grad.const_data_ptr<double>(), step_of(grad, x.rows, "grad"), int(side), logits.type, width, &to,
      value.mutable_data_ptr<double>());
  return {value, out};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def("uld(Tensor student, Tensor teacher, Tensor? labels, Tensor? mask, Tensor args, int kind, SymInt vocab, "
        "int ignore_index) -> Tensor");
  m.def("uld_step(Tensor grad, Tensor student, Tensor teacher, Tensor? labels, Tensor? mask, Tensor args, int kind, "
        "SymInt vocab, int ignore_index, int side) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("uld", TORCH_BOX(&uld));
  m.impl("uld_step", TORCH_BOX(&uld_step));
}
