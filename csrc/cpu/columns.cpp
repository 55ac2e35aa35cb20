// Pearson's correlation of the probabilities of each class over the rows of a batch, 1 - rho on average, and its gradient.
// Stable ABI; described in kdkernels/correlation.py.
//
// rho knows no scale: u = q / m - 1, m the class's mean over the rows, keeps its digits where the rows hardly differ and
// where one of them has all, and a class that is unlikely everywhere counts as any other. Per logit two exponentials for
// the row's log-partition, two for u and v, and two more in the gradient; three and two reads, of which a block of
// classes has all but one in cache.
#include <tuple>

#include "arguments.h"
#include "live.h"

namespace {

using namespace kd;

constexpr int64_t kBlock = 1 << 15;  // logits of a side that are worked on at a time
enum Term { BY_BOTH, BY_S, CONSTANT_S, MEAN_S_OF, BY_T, CONSTANT_T, MEAN_T_OF, kTerms };

// rows (N, 8): a Share of either side, and the sum over the classes of q_i times the slope by it, of either side.
struct RowOf {
  Share share[2];
  double slope[2];
};
static_assert(sizeof(RowOf) == 8 * sizeof(double));

// What is known of the classes: the logarithms of the means, and the slope's terms.
template <typename R> struct Classes {
  double* mean[2];
  R* term[kTerms];
  Classes(Tensor& means, Tensor& terms, int64_t vocab) {
    for (int k = 0; k < 2; ++k) mean[k] = means.mutable_data_ptr<double>() + k * vocab;
    for (int k = 0; k < kTerms; ++k) term[k] = terms.mutable_data_ptr<R>() + k * vocab;
  }
  ClassTerms<R> of(int side, int64_t first) const {
    R* const* own = term + (side ? BY_T : BY_S);
    return {own[0] + first, term[BY_BOTH] + first, own[1] + first, own[2] + first};
  }
};

template <typename R> struct Scratch {
  std::vector<R> x, u[2], factor;
  std::vector<double> sums;
  std::vector<char> alive;
};

// The rows' shares, from their log-partitions; false if one of them is no distribution.
bool find_shares(const Batch& x, const Args& scales, bool wide, const std::vector<int64_t>& kept, RowOf* rows) {
  const double program[] = {2, 0, 0, 0, 0, 0};
  const Shape z(x.rows, 2, x.vocab, wide);
  std::vector<double> stats(x.rows * z.stats()), args;
  for (int64_t n = 0; n < (scales.stride ? x.rows : 1); ++n)
    for (const double a : {scales[n][0], scales[n][1], 1., 1., 0., 0., 1.}) args.push_back(a);
  const Args own{args.data(), scales.stride ? 7 : 0};
  reduce_all(x, z, {program}, own, stats.data());
  bool fine = true;
  for (const int64_t n : kept)
    for (int side = 0; side < 2; ++side) {
      const double* at = stats.data() + n * z.stats();
      const double scale = own[n][side], top = at[2 * kStats + 2 + side];
      const double lam = log_weight(scale * top, reinterpret_cast<const Moments*>(at)[side]);
      rows[n].share[side] = {scale, top, lam};
      fine &= std::isfinite(lam);
    }
  return fine;
}

template <typename R> class Block {
 public:
  Block(const Batch& x, const std::vector<int64_t>& kept, const RowOf* rows, const Classes<R>& out)
      : x_(x), kept_(kept), rows_(rows), out_(out), loops_(tiles<R>().columns) {}

  // Of classes [first, first + n): how many live, the sum of 1 - rho, and (2, kept) sums of the slopes by q.
  int64_t run(int64_t first, int n, int sides, double* value, double* slope) {
    auto& w = kept_by_thread<Scratch<R>>();
    w.x.resize(n);
    w.factor.resize(n);
    w.sums.assign(6 * n, -INFINITY);
    w.alive.assign(n, false);
    char* alive = w.alive.data();
    for (int side = 0; side < 2; ++side) {
      double* mean = out_.mean[side] + first;
      std::fill(mean, mean + n, -INFINITY);
      each(side, first, n, [&](int64_t, const R* at, const Share& q) { loops_.highest(at, n, q, mean); });
      for (int i = 0; i < n; ++i) alive[i] |= mean[i] > -INFINITY;
      deviations(side, first, n, mean);
    }
    double* sums = w.sums.data();
    std::fill(sums, sums + 5 * n, 0.);
    for (size_t j = 0; j < kept_.size(); ++j) loops_.products(w.u[0].data() + j * n, w.u[1].data() + j * n, n, n, sums);
    int64_t count = 0;
    *value = 0;
    for (int i = 0; i < n; ++i) {
      const double rho = finish(sums + i, n, first + i, alive[i]);
      if (alive[i]) { *value += 1 - rho; ++count; }
    }
    for (size_t j = 0; j < kept_.size(); ++j)
      for (int side = 0; side < sides; ++side) {
        const R *own = w.u[side].data() + j * n, *other = w.u[1 - side].data() + j * n;
        slope[side * kept_.size() + j] = loops_.slope_sum(own, other, n, out_.of(side, first));
      }
    return count;
  }

 private:
  template <typename F> void each(int side, int64_t first, int n, F f) {
    R* copy = kept_by_thread<Scratch<R>>().x.data();
    for (size_t j = 0; j < kept_.size(); ++j)
      f(int64_t(j), logits_of(x_, side, kept_[j], first, n, copy), rows_[kept_[j]].share[side]);
  }

  // mean: on the way in the largest logarithm of each class, then that of its mean.
  void deviations(int side, int64_t first, int n, double* mean) {
    auto& w = kept_by_thread<Scratch<R>>();
    double* total = w.sums.data();
    std::fill(total, total + n, 0.);
    for (int i = 0; i < n; ++i) mean[i] = mean[i] > -INFINITY ? mean[i] : 0;
    w.u[side].resize(kept_.size() * n);
    R* u = w.u[side].data();
    each(side, first, n, [&](int64_t j, const R* at, const Share& q) {
      loops_.shares(at, n, q, mean, u + j * n);
      loops_.add_up(u + j * n, n, total);
    });
    for (int i = 0; i < n; ++i) {
      const bool some = total[i] > 0;  // else the class is impossible in all rows
      const double top = mean[i];
      mean[i] += some ? std::log(total[i] / double(kept_.size())) : 0;
      w.factor[i] = some ? R(std::exp(top - mean[i])) : R(0);  // of the rounded mean, which is all the gradient knows
      out_.term[side ? MEAN_T_OF : MEAN_S_OF][first + i] = some ? R(std::exp(mean[i])) : R(0);
    }
    each(side, first, n, [&](int64_t j, const R* at, const Share& q) {
      loops_.deviations(at, n, q, mean, w.factor.data(), u + j * n, u + j * n);
    });
  }

  // rho of class i from its sums, `step` apart; and the terms of its slope.
  double finish(const double* sums, int step, int64_t i, bool alive) const {
    const double rows = double(kept_.size()), u = sums[0] / rows, v = sums[step] / rows;  // what rounding has left
    const double uu = sums[2 * step] - rows * u * u, uv = sums[3 * step] - rows * u * v;
    const double vv = sums[4 * step] - rows * v * v, noise = 1e-26 * rows;  // what equal probabilities differ by
    const bool varied = alive && uu > noise && vv > noise;
    const double both = varied ? 1 / (std::sqrt(uu) * std::sqrt(vv)) : 0, rho = varied ? uv * both : 0;
    const double by_u = varied ? rho / uu : 0, by_v = varied ? rho / vv : 0;
    const double terms[] = {-both, by_u, both * v - by_u * u, by_v, both * u - by_v * v};
    const int at[] = {BY_BOTH, BY_S, CONSTANT_S, BY_T, CONSTANT_T};
    for (int k = 0; k < 5; ++k) out_.term[at[k]][i] = R(terms[k]);
    return rho;
  }

  const Batch& x_;
  const std::vector<int64_t>& kept_;
  const RowOf* rows_;
  const Classes<R>& out_;
  const Columns<R>& loops_;
};

std::vector<int64_t> kept_rows(const Batch& x) {
  std::vector<int64_t> kept;
  for (int64_t n = 0; n < x.rows; ++n)
    if (x.kept(n)) kept.push_back(n);
  return kept;
}

template <typename R> void all_classes(const Batch& x, const std::vector<int64_t>& kept, RowOf* rows,
                                       const Classes<R>& out, int sides, double* value) {
  const int64_t count = int64_t(kept.size());
  const int64_t width = std::clamp<int64_t>(kBlock / std::max<int64_t>(count, 1) / 64 * 64, 64, kTile);
  const int64_t blocks = (x.vocab + width - 1) / width;
  std::vector<double> values(blocks), slopes(blocks * 2 * count);
  std::vector<int64_t> live(blocks);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t lo, int64_t hi) {
    Block<R> block(x, kept, rows, out);
    for (int64_t b = lo; b < hi; ++b)
      live[b] = block.run(b * width, int(std::min(width, x.vocab - b * width)), sides, &values[b],
                          &slopes[b * 2 * count]);
  });
  double total = 0, classes = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    total += values[b];
    classes += double(live[b]);
    for (int side = 0; side < 2; ++side)
      for (int64_t j = 0; j < count; ++j) rows[kept[j]].slope[side] += slopes[(b * 2 + side) * count + j];
  }
  value[1] = 1 / std::max(classes, 1.);
  value[0] = total * value[1];
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& s, const Tensor& t, const MaybeTensor& labels,
                                                   const MaybeTensor& mask, const Tensor& args, int64_t vocab,
                                                   int64_t ignore, int64_t sides) {
  const Batch x = batch(s, t, labels, mask, vocab, ignore);
  STD_TORCH_CHECK(args.dim() == 2 && args.size(1) == 2 && args.is_contiguous() &&
                      (args.size(0) == 1 || args.size(0) == x.rows),
                  "kdkernels: args must be (1 or N, 2) contiguous float64");
  const bool wide = is_double(s, t, vocab);
  Tensor value = doubles(s, {2}), rows = doubles(s, {x.rows, 8}), means = doubles(s, {2, vocab});
  Tensor terms = torch::stable::new_empty(s, {kTerms, vocab}, wide ? ScalarType::Double : ScalarType::Float);
  double* to = value.mutable_data_ptr<double>();
  RowOf* own = static_cast<RowOf*>(rows.mutable_data_ptr());
  std::fill(own, own + x.rows, RowOf{});
  const std::vector<int64_t> kept = kept_rows(x);
  const Args scales{args.const_data_ptr<double>(), args.size(0) == 1 ? 0 : 2};
  if (!find_shares(x, scales, wide, kept, own)) {
    to[0] = NAN;
    to[1] = 1;
    for (const int64_t n : kept) own[n].slope[0] = own[n].slope[1] = NAN;
  } else if (wide) {
    all_classes<double>(x, kept, own, {means, terms, vocab}, int(sides), to);
  } else {
    all_classes<float>(x, kept, own, {means, terms, vocab}, int(sides), to);
  }
  return {value, means, terms, rows};
}

template <typename R>
void spread_row(const Batch& x, const RowOf& row, const Classes<R>& of, int side, double g, const RowOut& out) {
  const Columns<R>& loops = tiles<R>().columns;
  auto& w = kept_by_thread<Scratch<R>>();
  w.x.resize(kTile);
  w.factor.assign(kTile, R(1));
  for (auto& u : w.u) u.resize(kTile);
  R *e = w.u[0].data(), *v = w.u[1].data(), *one = w.factor.data();
  out.put_tiles<R>([&](int64_t first, int n, R* u) {
    const R* at = logits_of(x, 1 - side, out.row, first, n, w.x.data());
    const double* mean = of.mean[1 - side] + first;
    loops.shares(at, n, row.share[1 - side], mean, e);
    loops.deviations(at, n, row.share[1 - side], mean, one, e, v);
    at = logits_of(x, side, out.row, first, n, w.x.data());
    mean = of.mean[side] + first;
    loops.shares(at, n, row.share[side], mean, e);
    loops.deviations(at, n, row.share[side], mean, one, e, u);
    loops.slopes(e, v, n, of.of(side, first), row.slope[side], g * row.share[side].scale, u);
  });
}

Tensor spread(const Tensor& grad, const Tensor& s, const Tensor& t, const MaybeTensor& labels, const MaybeTensor& mask,
              Tensor means, Tensor terms, const Tensor& rows, int64_t vocab, int64_t ignore, int64_t side) {
  const Batch x = batch(s, t, labels, mask, vocab, ignore);
  const bool wide = is_double(s, t, vocab);
  STD_TORCH_CHECK(means.numel() == 2 * vocab && terms.numel() == kTerms * vocab && rows.numel() == 8 * x.rows &&
                      terms.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float),
                  "kdkernels: these are not of class_correlation");
  const Tensor& own = side ? t : s;
  const Logits& logits = side ? x.t : x.s;
  Tensor out = empty_as(own);
  const Gradient to(out.mutable_data_ptr(), x.rows, width_of(own) * logits.size(), true);
  const double g = *grad.const_data_ptr<double>();
  const RowOf* row = static_cast<const RowOf*>(rows.const_data_ptr());
  torch::stable::parallel_for(0, x.rows, 1, [&](int64_t lo, int64_t hi) {
    for (int64_t n = lo; n < hi; ++n) {
      const RowOut at{&to, logits.type, n, vocab, width_of(own)};
      const double spoilt = row[n].slope[side];
      if (!x.kept(n) || g == 0 || spoilt != spoilt) at.fill(x.kept(n) && g != 0 ? NAN : 0);
      else if (wide) spread_row<double>(x, row[n], {means, terms, vocab}, int(side), g, at);
      else spread_row<float>(x, row[n], {means, terms, vocab}, int(side), g, at);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def("class_correlation(Tensor student, Tensor teacher, Tensor? labels, Tensor? mask, Tensor args, SymInt vocab, "
        "int ignore_index, int sides) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("class_spread(Tensor grad, Tensor student, Tensor teacher, Tensor? labels, Tensor? mask, Tensor means, "
        "Tensor terms, Tensor rows, SymInt vocab, int ignore_index, int side) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("class_correlation", TORCH_BOX(&forward));
  m.impl("class_spread", TORCH_BOX(&spread));
}
