// Operators of the losses that compare whole rows, and of the metrics. Stable ABI; described in kdkernels/rankops.py.
#include <tuple>

#include "arguments.h"
#include "compare.h"

namespace {

using namespace kd;

struct Call {
  Batch x;
  const double* args;
  int64_t columns, stride, kind, width;
  Type type;  // of the gradient
  bool wide;
  Call(const Tensor& s, const Tensor& t, const MaybeTensor& labels, const MaybeTensor& mask, const Tensor& args,
       int64_t kind, int64_t vocab, int64_t ignore, int side)
      : x(batch(s, t, labels, mask, vocab, ignore)), args(args.const_data_ptr<double>()), columns(args.size(1)),
        stride(args.size(0) == 1 ? 0 : columns), kind(kind), width(width_of(side ? t : s)),
        type(side ? x.t.type : x.s.type), wide(is_wide(x.s.type, x.t.type)) {
    STD_TORCH_CHECK(args.dim() == 2 && columns >= SHIFTS && args.is_contiguous() &&
                        (args.size(0) == 1 || args.size(0) == x.rows),
                    "kdkernels: args must be (1 or N, 5 + shifts) contiguous float64");
    STD_TORCH_CHECK(kind >= PEARSON && kind <= ULD, "kdkernels: kind must be in [0, 4]");
  }
  static bool is_wide(Type s, Type t) { return s == Type::f64 || t == Type::f64; }

  // g (1 or N): null where no gradient is wanted.
  void run(const double* g, int64_t step, int side, const Gradient* to, double* value) const {
    const int64_t grain = 1 + (1 << 13) / (x.vocab + 256);
    Turns turns(x.rows, grain, to);
    torch::stable::parallel_for(0, x.rows, grain, [&](int64_t, int64_t) {
      for (int64_t lo, hi; turns.take(&lo, &hi);)
        for (int64_t n = lo; n < hi; ++n) value[n] = row(n, g ? g[n * step] : 0, side, to);
    });
  }

 private:
  double row(int64_t n, double g, int side, const Gradient* to) const {
    const RowOut out{to, type, n, x.vocab, width};
    const bool counts = x.kept(n) && g != 0;
    if (to && !counts) out.fill(0);
    if (!x.kept(n)) return 0;
    return compare_row(x, n, kind, args + n * stride, columns - SHIFTS, wide, side, g, counts ? out : out.none());
  }
};

Tensor compare(const Tensor& s, const Tensor& t, const MaybeTensor& labels, const MaybeTensor& mask, const Tensor& args,
               int64_t kind, int64_t vocab, int64_t ignore) {
  const Call call(s, t, labels, mask, args, kind, vocab, ignore, 0);
  Tensor value = torch::stable::new_empty(s, {call.x.rows}, ScalarType::Double);
  call.run(nullptr, 0, 0, nullptr, value.mutable_data_ptr<double>());
  return value;
}

std::tuple<Tensor, Tensor> compare_step(const Tensor& grad, const Tensor& s, const Tensor& t, const MaybeTensor& labels,
                                        const MaybeTensor& mask, const Tensor& args, int64_t kind, int64_t vocab,
                                        int64_t ignore, int64_t side) {
  STD_TORCH_CHECK(side == 0 || (side == 1 && (kind == PEARSON || kind == ULD)),
                  "kdkernels: this loss has no gradient for the teacher");
  const Call call(s, t, labels, mask, args, kind, vocab, ignore, int(side));
  Tensor value = torch::stable::new_empty(s, {call.x.rows}, ScalarType::Double), out = empty_as(side ? t : s);
  const Gradient to(out.mutable_data_ptr(), call.x.rows, call.width * (side ? call.x.t : call.x.s).size(), true);
  call.run(grad.const_data_ptr<double>(), step_of(grad, call.x.rows, "grad"), int(side), &to, value.mutable_data_ptr<double>());
  return {value, out};
}

// f(row, float or double) over the rows of x.
template <typename F> void over_rows(const Batch& x, F f) {
  const bool wide = x.s.type == Type::f64 || (x.t.data && x.t.type == Type::f64);
  torch::stable::parallel_for(0, x.rows, 1 + (1 << 12) / (x.vocab + 256), [&](int64_t lo, int64_t hi) {
    for (int64_t n = lo; n < hi; ++n) wide ? f(n, double()) : f(n, float());
  });
}

template <typename R> struct MetricScratch {
  std::vector<R> s, t;
  std::vector<double> ranks;
  KendallScratch<R> w;
  // False if the row holds a NaN.
  bool load(const Logits& x, int64_t row, int64_t n, std::vector<R>& to) {
    to.resize(n);
    widen_all(x.type, x.row(row), n, to.data());
    return std::none_of(to.begin(), to.end(), [](R v) { return v != v; });
  }
};

Tensor rankdata(const Tensor& a) {
  const Batch x = batch(a, {}, {}, {}, width_of(a), 0);
  Tensor out = torch::stable::new_empty(a, {x.rows, x.vocab}, ScalarType::Double);
  double* to = out.mutable_data_ptr<double>();
  over_rows(x, [&]<typename R>(int64_t n, R) {
    auto& m = kept_by_thread<MetricScratch<R>>();
    double* rank = to + n * x.vocab;
    if (!m.load(x.s, n, x.vocab, m.s)) return (void)std::fill_n(rank, x.vocab, NAN);
    m.w.s.sort(m.s.data(), x.vocab);
    centred_ranks(m.w.s, rank);
    for (int64_t i = 0; i < x.vocab; ++i) rank[i] = (rank[i] + double(x.vocab) + 1) / 2;
  });
  return out;
}

// Spearman's rho of 16-bit numbers, from their histograms: integers throughout.
double rho_by_bits(const Pair<uint16_t>& z) {
  SpearmanScratch& w = kept_by_thread<SpearmanScratch>();
  BitTables& b = w.bits;
  b.count(z);
  const int64_t q = b.own_ranks(z.n);
  int64_t joint = 0;
  for (const uint16_t bits : b.used_s) joint += b.own_rank[bits] * b.ranks(bits);
  b.clear();
  return double(joint) / std::sqrt(double(q)) / std::sqrt(double(b.squares));
}

template <typename R> double rho_by_sort(const R* s, const R* t, int64_t n, MetricScratch<R>& m) {
  m.ranks.resize(2 * n);
  double *own = m.ranks.data(), *other = own + n;
  m.w.s.sort(s, n);
  m.w.t.sort(t, n);
  const int64_t q = centred_ranks(m.w.s, own), r = centred_ranks(m.w.t, other);
  int64_t joint = 0;
  for (int64_t i = 0; i < n; ++i) joint += int64_t(own[i]) * int64_t(other[i]);
  return double(joint) / std::sqrt(double(q)) / std::sqrt(double(r));
}

// Per row, NaN for a NaN or a constant in it: Spearman's rho, or Kendall's tau-b.
Tensor agreement(const Tensor& a, const Tensor& b, bool kendall) {
  const Batch x = batch(a, b, {}, {}, width_of(a), 0);
  Tensor out = torch::stable::new_empty(a, {x.rows}, ScalarType::Double);
  double* to = out.mutable_data_ptr<double>();
  const bool bits = !kendall && is_half(x.s.type) && is_half(x.t.type) && by_bits(x.vocab);
  over_rows(x, [&]<typename R>(int64_t n, R) {
    auto& m = kept_by_thread<MetricScratch<R>>();
    const auto* s = reinterpret_cast<const uint16_t*>(x.s.row(n));
    const auto* t = reinterpret_cast<const uint16_t*>(x.t.row(n));
    if (bits && !Special(x.s.type).nan_among(s, x.vocab) && !Special(x.t.type).nan_among(t, x.vocab)) {
      to[n] = rho_by_bits({s, t, x.vocab, nullptr, false});
      return;
    }
    const bool fine = m.load(x.s, n, x.vocab, m.s) & m.load(x.t, n, x.vocab, m.t);
    if (!fine) to[n] = NAN;
    else to[n] = kendall ? kendall_tau_b(m.s.data(), m.t.data(), x.vocab, m.w)
                         : rho_by_sort(m.s.data(), m.t.data(), x.vocab, m);
  });
  return out;
}
Tensor spearman(const Tensor& a, const Tensor& b) { return agreement(a, b, false); }
Tensor kendall_tau(const Tensor& a, const Tensor& b) { return agreement(a, b, true); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def("compare(Tensor student, Tensor teacher, Tensor? labels, Tensor? mask, Tensor args, int kind, SymInt vocab, "
        "int ignore_index) -> Tensor");
  m.def("compare_step(Tensor grad, Tensor student, Tensor teacher, Tensor? labels, Tensor? mask, Tensor args, "
        "int kind, SymInt vocab, int ignore_index, int side) -> (Tensor, Tensor)");
  m.def("rankdata(Tensor a) -> Tensor");
  m.def("spearman(Tensor a, Tensor b) -> Tensor");
  m.def("kendall_tau(Tensor a, Tensor b) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("compare", TORCH_BOX(&compare));
  m.impl("compare_step", TORCH_BOX(&compare_step));
  m.impl("rankdata", TORCH_BOX(&rankdata));
  m.impl("spearman", TORCH_BOX(&spearman));
  m.impl("kendall_tau", TORCH_BOX(&kendall_tau));
}
