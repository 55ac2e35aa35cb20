// L1 distances between the rows of two matrices, and their gradient. Stable ABI; described in kdkernels/transport.py.
#include "arguments.h"

namespace {

using namespace kd;

struct Matrices {
  int64_t rows, others, width, tile;
  Matrices(const Tensor& x, const Tensor& y) : rows(x.size(0)), others(y.size(0)), width(x.size(1)) {
    STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && y.size(1) == width && x.is_contiguous() && y.is_contiguous() &&
                        x.scalar_type() == y.scalar_type() &&
                        (x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double),
                    "kdkernels: rows must be (N, V) and (M, V), contiguous, both float32 or both float64");
    tile = std::clamp<int64_t>((1 << 17) / std::max<int64_t>(others, 1) / 64 * 64, 64, kTile);
  }
  // f(row, first, n) over the rows of x, a thread's one stretch of classes after the other: those of y stay in cache.
  template <typename F> void each(F f) const {
    const int64_t threads = torch::stable::get_num_threads();
    torch::stable::parallel_for(0, rows, std::max<int64_t>((rows + threads - 1) / threads, 1), [&](int64_t lo, int64_t hi) {
      for (int64_t first = 0; first < width; first += tile)
        for (int64_t i = lo; i < hi; ++i) f(i, first, int(std::min(tile, width - first)));
    });
  }
};

template <typename R> void distances(const Matrices& m, const R* x, const R* y, double* out) {
  std::fill_n(out, m.rows * m.others, 0.);
  m.each([&](int64_t i, int64_t first, int n) {
    for (int64_t j = 0; j < m.others; ++j)
      out[i * m.others + j] += tiles<R>().columns.apart(x + i * m.width + first, y + j * m.width + first, n);
  });
}
template <typename R> void slopes(const Matrices& m, const double* g, const R* x, const R* y, R* out) {
  m.each([&](int64_t i, int64_t first, int n) {
    R* d = out + i * m.width + first;
    std::fill_n(d, n, R(0));
    for (int64_t j = 0; j < m.others; ++j)
      tiles<R>().columns.signs(x + i * m.width + first, y + j * m.width + first, n, g[i * m.others + j], d);
  });
}

Tensor row_distances(const Tensor& x, const Tensor& y) {
  const Matrices m(x, y);
  Tensor out = doubles(x, {m.rows, m.others});
  double* to = out.mutable_data_ptr<double>();
  if (x.scalar_type() == ScalarType::Float) distances(m, x.const_data_ptr<float>(), y.const_data_ptr<float>(), to);
  else distances(m, x.const_data_ptr<double>(), y.const_data_ptr<double>(), to);
  return out;
}

Tensor row_distances_slopes(const Tensor& grad, const Tensor& x, const Tensor& y) {
  const Matrices m(x, y);
  STD_TORCH_CHECK(grad.is_contiguous() && grad.scalar_type() == ScalarType::Double && grad.numel() == m.rows * m.others,
                  "kdkernels: grad must be (N, M) contiguous float64");
  Tensor out = empty_as(x);
  const double* g = grad.const_data_ptr<double>();
  if (x.scalar_type() == ScalarType::Float)
    slopes(m, g, x.const_data_ptr<float>(), y.const_data_ptr<float>(), out.mutable_data_ptr<float>());
  else slopes(m, g, x.const_data_ptr<double>(), y.const_data_ptr<double>(), out.mutable_data_ptr<double>());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def("row_distances(Tensor x, Tensor y) -> Tensor");
  m.def("row_distances_slopes(Tensor grad, Tensor x, Tensor y) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("row_distances", TORCH_BOX(&row_distances));
  m.impl("row_distances_slopes", TORCH_BOX(&row_distances_slopes));
}
