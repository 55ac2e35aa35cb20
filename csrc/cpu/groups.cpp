// Moments of a row by groups of classes, and what slopes at them are at every class. Stable ABI; see kdkernels/groups.py.
#include "arguments.h"
#include "lapsum.h"
#include "live.h"

namespace {

using namespace kd;

constexpr int kMoments = 3;  // of a group: log-partition of the student's row, of the teacher's, mean of a t - b s
constexpr int kLanes = 4;    // sums of one group in turn: none waits for the one before

struct Call {
  Batch x;
  const double* args;
  int64_t stride;          // of args
  const int64_t* groups;   // of each class; null: the label is group 1, the rest group 0
  int64_t count;
  bool wide;
  Call(const Tensor& s, const Tensor& t, const MaybeTensor& labels, const MaybeTensor& mask, const Tensor& args,
       const MaybeTensor& groups, int64_t count, int64_t vocab, int64_t ignore)
      : x(batch(s, t, labels, mask, vocab, ignore)), args(args.const_data_ptr<double>()),
        stride(args.size(0) == 1 ? 0 : args.size(1)),
        groups(groups ? groups->const_data_ptr<int64_t>() : nullptr), count(count), wide(is_double(s, t, vocab)) {
    STD_TORCH_CHECK(args.dim() == 2 && args.size(1) >= 2 && args.is_contiguous() &&
                        (args.size(0) == 1 || args.size(0) == x.rows),
                    "kdkernels: args must be (1 or N, 2 or more) contiguous float64");
    STD_TORCH_CHECK(groups ? groups->scalar_type() == ScalarType::Long && groups->is_contiguous() &&
                                 groups->dim() == 1 && groups->size(0) >= vocab
                           : labels.has_value() && count == 2,
                    "kdkernels: groups must be (V,) contiguous int64, or there are labels and 2 groups");
    for (int64_t i = 0; groups && i < vocab; ++i)
      STD_TORCH_CHECK(this->groups[i] >= 0 && this->groups[i] < count, "kdkernels: groups must be in [0, count)");
  }

  // f(row, scratch) over the rows, in the width that is computed in.
  template <typename F> void each(F f) const {
    torch::stable::parallel_for(0, x.rows, grain(x.vocab), [&](int64_t lo, int64_t hi) {
      for (int64_t n = lo; n < hi; ++n) wide ? f(n, double()) : f(n, float());
    });
  }
  int64_t group(int64_t n, int64_t i) const { return groups ? groups[i] : int64_t(i == x.labels[n]); }
};

template <typename R> struct GroupScratch {
  Live<R> live;
  std::vector<R> q, p, out;
  std::vector<int64_t> at;
  std::vector<double> top, sums;
};

// w.at: the group of each live class.
template <typename R> Pair<R> find(const Call& c, int64_t n, GroupScratch<R>& w) {
  const Pair<R> z = w.live.find(c.x, n, 0, true);
  w.at.resize(z.n);
  for (int64_t i = 0; i < z.n; ++i) w.at[i] = c.group(n, z.at ? z.at[i] : i);
  return z;
}

// e^(scale x - top of its group), where top is finite.
template <typename R>
void weights(const R* x, const Pair<R>& z, double scale, const double* top, int step, const std::vector<int64_t>& at,
             std::vector<R>& to) {
  to.resize(z.n);
  for (int64_t i = 0; i < z.n; ++i) {
    const double y = (scale * double(x[i]) - top[at[i] * step]) * kLog2e;
    to[i] = y > -1e6 ? R(y) : R(-1e6);  // a NaN too: the group has no class
  }
  exp2_in_place(to.data(), z.n);
}

template <typename R> void moments_of(const Call& c, int64_t n, double* out) {
  auto& w = kept_by_thread<GroupScratch<R>>();
  const int64_t G = c.count;
  std::fill(out, out + G * kMoments, 0.);
  if (!c.x.kept(n)) return;
  const Pair<R> z = find(c, n, w);
  if (z.nan) return std::fill(out, out + G * kMoments, NAN);
  const double b = c.args[n * c.stride], a = c.args[n * c.stride + 1];
  w.top.assign(2 * G, -INFINITY);
  bool some_s = false, some_t = false;
  for (int64_t i = 0; i < z.n; ++i) {
    double* top = w.top.data() + 2 * w.at[i];
    if (z.s[i] > top[0]) top[0] = z.s[i];
    if (z.t[i] > top[1]) top[1] = z.t[i];
  }
  for (int64_t g = 0; g < G; ++g) {
    some_s |= w.top[2 * g] > -INFINITY;
    some_t |= w.top[2 * g + 1] > -INFINITY;
    w.top[2 * g] *= b;
    w.top[2 * g + 1] *= a;
  }
  if (!some_s || !some_t) return std::fill(out, out + G * kMoments, NAN);  // no distribution
  weights(z.s, z, b, w.top.data(), 2, w.at, w.q);
  weights(z.t, z, a, w.top.data() + 1, 2, w.at, w.p);
  w.sums.assign(kLanes * G * kMoments, 0.);
  for (int64_t i = 0; i < z.n; ++i) {
    double* sum = w.sums.data() + (i % kLanes * G + w.at[i]) * kMoments;
    sum[0] += w.q[i];
    sum[1] += w.p[i];
    if (w.p[i] > 0) sum[2] += double(w.p[i]) * (a * double(z.t[i]) - b * double(z.s[i]));
  }
  for (int64_t g = 0; g < G; ++g, out += kMoments) {
    double sum[kMoments] = {};
    for (int lane = 0; lane < kLanes; ++lane)
      for (int k = 0; k < kMoments; ++k) sum[k] += w.sums[(lane * G + g) * kMoments + k];
    out[0] = sum[0] > 0 ? w.top[2 * g] + std::log(sum[0]) : -INFINITY;
    out[1] = sum[1] > 0 ? w.top[2 * g + 1] + std::log(sum[1]) : -INFINITY;
    out[2] = sum[1] > 0 ? sum[2] / sum[1] : 0;
  }
}

// Of one side: the student's q_i b gL - p_i b gM, the teacher's p_i a (gP + gM (1 + x_i - M)), within the groups.
template <typename R>
void gradient_of_row(const Call& c, int64_t n, const double* m, const double* g, int side, const RowOut& out) {
  auto& w = kept_by_thread<GroupScratch<R>>();
  if (!c.x.kept(n)) return out.fill(0);
  const Pair<R> z = find(c, n, w);
  if (z.nan || z.n == 0) return out.fill(NAN);
  const double b = c.args[n * c.stride], a = c.args[n * c.stride + 1];
  weights(z.t, z, a, m + 1, kMoments, w.at, w.p);
  if (!side) weights(z.s, z, b, m, kMoments, w.at, w.q);
  out.write(z, w.out, [&](int64_t i) {
    const double *slope = g + w.at[i] * kMoments, *own = m + w.at[i] * kMoments;
    const double p = w.p[i];
    if (!side) return b * (scaled(w.q[i], slope[0]) - scaled(p, slope[2]));
    if (p == 0) return 0.;
    return a * p * (slope[1] + scaled(slope[2], 1 + (a * double(z.t[i]) - b * double(z.s[i]) - own[2])));
  });
}

Tensor moments(const Tensor& s, const Tensor& t, const MaybeTensor& labels, const MaybeTensor& mask, const Tensor& args,
               const MaybeTensor& groups, int64_t count, int64_t vocab, int64_t ignore) {
  const Call c(s, t, labels, mask, args, groups, count, vocab, ignore);
  Tensor out = torch::stable::new_empty(s, {c.x.rows, count, kMoments}, ScalarType::Double);
  double* to = out.mutable_data_ptr<double>();
  c.each([&]<typename R>(int64_t n, R) { moments_of<R>(c, n, to + n * count * kMoments); });
  return out;
}

Tensor spread(const Tensor& slopes, const Tensor& moments, const Tensor& s, const Tensor& t, const MaybeTensor& labels,
              const MaybeTensor& mask, const Tensor& args, const MaybeTensor& groups, int64_t count, int64_t vocab,
              int64_t ignore, int64_t side) {
  const Call c(s, t, labels, mask, args, groups, count, vocab, ignore);
  for (const Tensor* x : {&slopes, &moments})
    STD_TORCH_CHECK(x->is_contiguous() && x->numel() == c.x.rows * count * kMoments,
                    "kdkernels: moments must be (N, G, 3) contiguous float64");
  const Tensor& own = side ? t : s;
  const Type type = side ? c.x.t.type : c.x.s.type;
  const int64_t width = width_of(own), step = count * kMoments;
  Tensor out = empty_as(own);
  const Gradient to(out.mutable_data_ptr(), c.x.rows, width * (side ? c.x.t : c.x.s).size(), true);
  const double *m = moments.const_data_ptr<double>(), *g = slopes.const_data_ptr<double>();
  c.each([&]<typename R>(int64_t n, R) {
    gradient_of_row<R>(c, n, m + n * step, g + n * step, int(side), {&to, type, n, c.x.vocab, width});
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def("group_moments(Tensor student, Tensor teacher, Tensor? labels, Tensor? mask, Tensor args, Tensor? groups, "
        "int count, SymInt vocab, int ignore_index) -> Tensor");
  m.def("group_spread(Tensor slopes, Tensor moments, Tensor student, Tensor teacher, Tensor? labels, Tensor? mask, "
        "Tensor args, Tensor? groups, int count, SymInt vocab, int ignore_index, int side) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("group_moments", TORCH_BOX(&moments));
  m.impl("group_spread", TORCH_BOX(&spread));
}
