// The first choices of both rows, and what their distributions share. Stable ABI; described in kdkernels/rankops.py.
#include "arguments.h"
#include "live.h"

namespace {

using namespace kd;

// The largest logit and the first class that has it, or the first NaN.
struct First {
  bool odd;  // the row may hold a NaN
  double top = -INFINITY, at = 0;
  template <typename R> void see(const R* x, int n, int64_t first) {
    R high;
    const bool special = tiles<R>().peak(x, n, &high) | odd;  // it passes over what is not finite
    if (top != top || !(special || double(high) > top)) return;
    for (int i = 0; i < n; ++i) {
      if (!(double(x[i]) > top || x[i] != x[i])) continue;
      top = x[i];
      at = double(first + i);
      if (x[i] != x[i] || (!special && x[i] == high)) return;
    }
  }
};

template <typename R> void row(const Batch& x, int64_t n, const Share (&share)[2], double* out) {
  alignas(64) R copy[2][kTile], e[kTile];
  First first[2] = {{!std::isfinite(share[0].lam)}, {!std::isfinite(share[1].lam)}};
  double common = 0;
  for (int64_t i = 0; i < x.vocab; i += kTile) {
    const int count = int(std::min<int64_t>(x.vocab - i, kTile));
    const R* at[2];
    for (int side = 0; side < 2; ++side) {
      at[side] = logits_of(x, side, n, i, count, copy[side]);
      first[side].see(at[side], count, i);
    }
    tiles<R>().columns.lesser(at[0], share[0], at[1], share[1], count, e);
    common += tiles<R>().columns.sum(e, count);
  }
  const bool fine = std::isfinite(share[0].lam) && std::isfinite(share[1].lam);
  const double found[] = {first[0].top, first[0].at, first[1].top, first[1].at, fine ? common : NAN};
  std::copy(found, found + 5, out);
}

Tensor agreement(const Tensor& s, const Tensor& t, const MaybeTensor& labels, const MaybeTensor& mask,
                 const Tensor& args, const Tensor& lse, int64_t vocab, int64_t ignore) {
  const Batch x = batch(s, t, labels, mask, vocab, ignore);
  STD_TORCH_CHECK(args.dim() == 2 && args.size(1) >= 2 && (args.size(0) == 1 || args.size(0) == x.rows) &&
                      args.is_contiguous() && lse.is_contiguous() && lse.numel() == 2 * x.rows &&
                      args.scalar_type() == ScalarType::Double && lse.scalar_type() == ScalarType::Double,
                  "kdkernels: args must be (1 or N, 2 or more), lse (2, N) contiguous float64");
  const double *scales = args.const_data_ptr<double>(), *logs = lse.const_data_ptr<double>();
  const int64_t step = args.size(0) == 1 ? 0 : args.size(1);
  const bool wide = is_double(s, t, vocab);
  Tensor out = doubles(s, {x.rows, 5});
  double* to = out.mutable_data_ptr<double>();
  torch::stable::parallel_for(0, x.rows, grain(vocab), [&](int64_t lo, int64_t hi) {
    for (int64_t n = lo; n < hi; ++n) {
      const double* scale = scales + n * step;
      const Share share[2] = {{scale[0], 0, -logs[n]}, {scale[1], 0, -logs[x.rows + n]}};
      if (!x.kept(n)) std::fill_n(to + 5 * n, 5, NAN);
      else wide ? row<double>(x, n, share, to + 5 * n) : row<float>(x, n, share, to + 5 * n);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def("agreement(Tensor student, Tensor teacher, Tensor? labels, Tensor? mask, Tensor args, Tensor lse, "
        "SymInt vocab, int ignore_index) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) { m.impl("agreement", TORCH_BOX(&agreement)); }
