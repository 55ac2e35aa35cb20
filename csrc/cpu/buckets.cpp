// Rows of which some classes stay apart and the others are one outcome. Stable ABI; described in kdkernels/buckets.py.
#include <tuple>

#include "arguments.h"

namespace {

using namespace kd;

// Columns of stats: log-sum-exp of the classes in the bucket (of s / T), of those that are not the label, special.
enum Stat { TAIL, REST, IS_SPECIAL, kColumns };

struct Call {
  Batch x;
  const int64_t *classes, *labels;
  const double* inverse;
  int64_t k, stride;
  bool wide;

  Call(const Tensor& s, const MaybeTensor& mask, const Tensor& classes, const MaybeTensor& inverse,
       const MaybeTensor& labels, int64_t vocab)
      : x(batch(s, {}, {}, mask, vocab, 0)), classes(classes.const_data_ptr<int64_t>()),
        labels(labels ? labels->const_data_ptr<int64_t>() : nullptr),
        inverse(inverse ? inverse->const_data_ptr<double>() : nullptr), k(classes.size(1)),
        stride(inverse ? step_of(*inverse, x.rows, "inverse") : 0), wide(x.s.type == Type::f64 || vocab <= kNarrow) {
    STD_TORCH_CHECK(classes.dim() == 2 && classes.size(0) == x.rows && classes.is_contiguous() &&
                        (!labels || (labels->numel() == x.rows && labels->is_contiguous())),
                    "kdkernels: classes must be (N, k), labels (N,), contiguous int64");
    for (int64_t i = 0; i < x.rows * k; ++i)
      STD_TORCH_CHECK(this->classes[i] >= -1 && this->classes[i] < vocab, "kdkernels: classes must be in [0, ", vocab,
                      ") or -1, got ", this->classes[i]);
    for (int64_t n = 0; this->labels && n < x.rows; ++n)
      STD_TORCH_CHECK(this->labels[n] >= -1 && this->labels[n] < vocab, "kdkernels: labels must be classes or -1");
  }
  double scale(int64_t n) const { return inverse ? inverse[n * stride] : 1; }
  int64_t label(int64_t n) const { return labels ? labels[n] : -1; }
};

// A row's classes that stay apart, ascending; `at` is the place among the k, or k for a label that is none of them.
struct Apart {
  struct One { int64_t i, at; };
  std::vector<One> all;

  void set(const Call& c, int64_t n) {
    const int64_t label = c.label(n), *classes = c.classes + n * c.k;
    all.clear();
    bool label_known = label < 0;
    for (int64_t j = 0; j < c.k; ++j) {
      if (classes[j] >= 0) all.push_back({classes[j], j});
      label_known |= classes[j] == label;
    }
    if (!label_known) all.push_back({label, c.k});
    std::sort(all.begin(), all.end(), [](const One& a, const One& b) { return a.i < b.i; });
  }
};

// The engine's program of the two sums, of which a row needs the first, the second or both.
struct TwoSums {
  int K;
  double code[6], args[7];
  TwoSums(const Call& c, int64_t n)
      : K((c.inverse != nullptr) + (c.labels != nullptr)),
        code{double(K), 0, 0, 0, c.inverse ? 0. : double(RAW), double(RAW)}, args{c.scale(n), 0, 1, 1, 0, 1, 0} {}
  bool entropy(int k) const { return code[4 + k] == double(RAW); }
  double factor(int k) const { return entropy(k) ? 1 : args[0]; }
};

// f(from, count) over the classes of tile [first, first + count) that do not stay apart, then one(which) over the rest.
template <typename F, typename G>
void around(const Apart& apart, size_t* next, int64_t first, int count, F f, G one) {
  int from = 0;
  for (; *next < apart.all.size() && apart.all[*next].i < first + count; ++*next) {
    const int here = int(apart.all[*next].i - first);
    if (here > from) f(from, here - from);
    one(apart.all[*next]);
    from = here + 1;
  }
  if (count > from) f(from, count - from);
}
template <typename R> View<R> part_of(const View<R>& whole, int from, int n) {
  View<R> part = whole;
  part.s += from; part.t += from; part.n = n;
  part.s_next += from * whole.s_bytes; part.t_next = part.s_next;
  return part;
}

// stats: the two sums of row n, the classes apart put back where they belong.
template <typename R>
void reduce_one(const Tiles<R>& isa, const Call& c, int64_t n, const Apart& apart, Points<R>& w, double* stats) {
  const TwoSums two(c, n);
  const Batch& x = c.x;
  w.set(Program{two.code}, two.args, false);
  const bool in_memory = Tile<R>::can_stay(x);
  Tile<R> tile;
  R top = -INFINITY;
  bool special = false;
  const auto raise = [&](R max) {
    top = std::max(top, max);
    tile.view.s_pivot = top == -INFINITY ? 0 : top;
    tile.view.t_pivot = 0;
  };
  const auto take = [&](int64_t first, int count) {
    R max = 0, none = 0;
    bool ready = false, loaded = false;
    if (in_memory && tile.look(isa, x, n, first, count, &max, &none)) {
      raise(max);
      isa.sums_through(x.s.type, tile.view, w.e.data(), w.flags.data(), two.K, w.sums.data());
      ready = true;
    }
    for (int k = 0; k < two.K; ++k) {
      if (ready && w.points[k].take(tile.view, w.sums[k])) continue;
      if (!loaded) {
        tile.load(isa, x, n, first, count);
        raise(tile.s_max);
        special |= tile.special;
        loaded = true;
      }
      w.points[k].add(isa, tile, -1);
    }
  };
  size_t next = 0;
  for (int64_t first = 0; two.K && first < x.vocab; first += kTile)
    around(apart, &next, first, int(std::min<int64_t>(x.vocab - first, kTile)),
           [&](int from, int many) { take(first + from, many); }, [](const Apart::One&) {});
  Moments sums[2];
  for (int k = 0; k < two.K; ++k) sums[k] = w.points[k].close();
  for (const Apart::One& one : apart.all) {
    const double s = entry(isa, x, x.s, n, one.i);
    special |= !(std::fabs(s) <= kHuge);
    for (int k = 0; k < two.K; ++k)
      if (s != -INFINITY && (two.entropy(k) ? one.i != c.label(n) : one.at == c.k))
        sums[k].merge({two.factor(k) * s, 1, 0, 0, 0, 0, 0});
  }
  for (int k = 0; k < two.K; ++k) stats[two.entropy(k) ? REST : TAIL] = lse(sums[k]);
  stats[IS_SPECIAL] = special;
}

// The terms of row n's gradient: pi = exp(b s - lse) of the bucket and of the rest, times what comes in for them.
struct Slopes {
  double coef[2 * kCoefs] = {}, lse[2], g[2];
  int K = 0;
  double pivot = 0;
  bool any = false;

  template <typename R> void set(const TwoSums& two, const double* stats, double by_bucket, double by_rest, R) {
    K = two.K;
    for (int k = 0; k < K; ++k) {
      lse[k] = stats[two.entropy(k) ? REST : TAIL];
      g[k] = lse[k] == -INFINITY ? 0 : two.entropy(k) ? by_rest : by_bucket;
    }
    pivot = R(K && std::isfinite(lse[0]) ? lse[0] / two.factor(0) : 0);
    for (int k = 0; k < K; ++k) {
      double* to = coef + k * kCoefs;
      to[0] = two.factor(k) * pivot - lse[k];
      to[1] = two.factor(k);
      to[3] = g[k];
      any |= g[k] != 0;
    }
  }
  double at(int k, double factor, double s) const {
    return g[k] == 0 || s == -INFINITY ? 0 : g[k] * std::exp(factor * s - lse[k]);
  }
};

// out: row n of the gradient. by: what comes in for the row's outcomes, entropy: for its label and the rest.
template <typename R>
void spread_one(const Tiles<R>& isa, const Call& c, int64_t n, const Apart& apart, const double* stats,
                const double* by, const double* entropy, int64_t width, bool stream, char* out) {
  const TwoSums two(c, n);
  const Batch& x = c.x;
  Slopes slope;
  slope.set(two, stats, c.inverse ? by[c.k] : 0, entropy ? entropy[1] : 0, R());
  const bool fast = slope.any && stats[IS_SPECIAL] == 0 && Tile<R>::can_stay(x);
  alignas(64) R d[kTile];
  Tile<R> tile;
  size_t next = 0;
  for (int64_t first = 0; first < width; first += kTile) {
    const int count = int(std::min<int64_t>(width - first, kTile));
    const int live = int(std::clamp<int64_t>(x.vocab - first, 0, count));
    const bool plain = next == apart.all.size() || apart.all[next].i >= first + count;
    char* to = out + x.s.size() * first;
    if (plain && fast && live == count) {
      tile.find(x, n, first, count);
      tile.view.s_pivot = R(slope.pivot);
      tile.view.t_pivot = 0;
      if (isa.through(x.s.type, tile.view, slope.coef, slope.K, 1, stream, to)) continue;
    }
    if (slope.any && live) {
      tile.load(isa, x, n, first, live, stats[IS_SPECIAL] != 0);
      tile.view.s_pivot = R(slope.pivot);
      tile.view.t_pivot = 0;
    } else {
      std::fill(d, d + count, R(0));
    }
    around(apart, &next, first, live, [&](int from, int many) {
      if (slope.any)
        isa.spread(part_of(tile.view, from, many), slope.coef, slope.K, 1, tile.special, true, tile.scratch, d + from);
    }, [&](const Apart::One& one) {
      const double s = entry(isa, x, x.s, n, one.i);
      const bool label = one.i == c.label(n);
      double sum = (one.at < c.k ? by[one.at] : 0) + (label && entropy ? entropy[0] : 0);
      for (int k = 0; k < slope.K; ++k)
        if (two.entropy(k) ? !label : one.at == c.k) sum += slope.at(k, two.factor(k), s);
      d[one.i - first] = R(sum);
    });
    std::fill(d + live, d + count, R(0));
    isa.store(x.s.type, d, count, to, stream);
  }
}

template <typename F> void over_rows(const Call& c, F f) {
  torch::stable::parallel_for(0, c.x.rows, grain(c.x.vocab), [&](int64_t lo, int64_t hi) {
    Apart apart;
    Scratch scratch;
    for (int64_t n = lo; n < hi; ++n) {
      apart.set(c, n);
      c.wide ? f(tiles<double>(), n, apart, scratch) : f(tiles<float>(), n, apart, scratch);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> bucket(const Tensor& s, const MaybeTensor& mask, const Tensor& classes,
                                          const MaybeTensor& inverse, const MaybeTensor& labels, int64_t vocab) {
  const Call c(s, mask, classes, inverse, labels, vocab);
  const int64_t columns = c.k + (c.inverse != nullptr);
  Tensor out = torch::stable::new_empty(s, {c.x.rows, columns}, ScalarType::Double);
  Tensor entropy = torch::stable::new_empty(s, {c.labels ? c.x.rows : 0, 2}, ScalarType::Double);
  Tensor stats = torch::stable::new_empty(s, {c.x.rows, kColumns}, ScalarType::Double);
  double *to = out.mutable_data_ptr<double>(), *own = entropy.mutable_data_ptr<double>();
  double* all = stats.mutable_data_ptr<double>();
  over_rows(c, [&]<typename R>(const Tiles<R>& isa, int64_t n, const Apart& apart, Scratch& w) {
    double *row = to + n * columns, *stat = all + n * kColumns;
    stat[TAIL] = stat[REST] = 0;
    reduce_one(isa, c, n, apart, w.points<R>(), stat);
    std::fill(row, row + columns, -INFINITY);
    for (const Apart::One& one : apart.all) {
      const double x = entry(isa, c.x, c.x.s, n, one.i);
      if (one.at < c.k) row[one.at] = x;
      if (c.labels && one.i == c.label(n)) own[2 * n] = x;
    }
    if (c.inverse) row[c.k] = stat[TAIL] / c.scale(n);
    if (c.labels) own[2 * n + 1] = stat[REST];
    if (c.labels && c.label(n) < 0) own[2 * n] = -INFINITY;
  });
  return {out, entropy, stats};
}

Tensor bucket_spread(const Tensor& grad, const MaybeTensor& by_entropy, const Tensor& s, const MaybeTensor& mask,
                     const Tensor& classes, const MaybeTensor& inverse, const MaybeTensor& labels, const Tensor& stats,
                     int64_t vocab) {
  const Call c(s, mask, classes, inverse, labels, vocab);
  const int64_t columns = c.k + (c.inverse != nullptr), width = width_of(s);
  STD_TORCH_CHECK(grad.is_contiguous() && grad.numel() == c.x.rows * columns && stats.is_contiguous() &&
                      stats.numel() == c.x.rows * kColumns && (!by_entropy || by_entropy->is_contiguous()),
                  "kdkernels: grad must be (N, k + 1), stats (N, 3), contiguous");
  Tensor out = empty_as(s);
  const Gradient to(out.mutable_data_ptr(), c.x.rows, width * c.x.s.size(), true);
  const double *g = grad.const_data_ptr<double>(), *all = stats.const_data_ptr<double>();
  const double* e = by_entropy ? by_entropy->const_data_ptr<double>() : nullptr;
  over_rows(c, [&]<typename R>(const Tiles<R>& isa, int64_t n, const Apart& apart, Scratch&) {
    spread_one(isa, c, n, apart, all + n * kColumns, g + n * columns, e ? e + 2 * n : nullptr, width, to.stream,
               to.data + n * to.row);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def("bucket(Tensor student, Tensor? mask, Tensor classes, Tensor? inverse, Tensor? labels, SymInt vocab) -> "
        "(Tensor, Tensor, Tensor)");
  m.def("bucket_spread(Tensor grad, Tensor? by_entropy, Tensor student, Tensor? mask, Tensor classes, "
        "Tensor? inverse, Tensor? labels, Tensor stats, SymInt vocab) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("bucket", TORCH_BOX(&bucket));
  m.impl("bucket_spread", TORCH_BOX(&bucket_spread));
}
