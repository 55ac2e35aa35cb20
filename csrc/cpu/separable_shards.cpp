// The sums over the classes of a separable loss of which this rank has some. Stable ABI.
#include "separable.h"

namespace {

using namespace kd;

// stats (N, K, 7): of the whole rows, at the points and behind them -> (N, 5), the fields of ElementSums.
Tensor sums(const Tensor& s, const Tensor& t, const MaybeTensor& labels, const MaybeTensor& mask, const Tensor& args,
            const Tensor& program, const Tensor& stats, int64_t vocab, int64_t ignore) {
  const Call call(s, t, labels, mask, &args, program, vocab, ignore);
  const Shape less = call.points();
  STD_TORCH_CHECK(stats.scalar_type() == ScalarType::Double && stats.is_contiguous() &&
                      stats.numel() == less.rows * less.stats(),
                  "kdkernels: stats must be (N, K, 7) contiguous float64");
  const std::vector<ElementSums> sum = call.all_sums(less, stats.const_data_ptr<double>(), true);
  Tensor out = torch::stable::new_empty(s, {less.rows, 5}, ScalarType::Double);
  double* to = out.mutable_data_ptr<double>();
  for (int64_t n = 0; n < less.rows; ++n) {
    ElementSums all{};
    for (int64_t j = 0; j < less.segments; ++j) all.add(sum[n * less.segments + j]);
    for (const double x : {all.total, all.q, all.p, all.xq, all.xp}) *to++ = x;
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def("separable_sums(Tensor student, Tensor teacher, Tensor? labels, Tensor? mask, Tensor args, Tensor program, "
        "Tensor stats, SymInt vocab, int ignore_index) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) { m.impl("separable_sums", TORCH_BOX(&sums)); }
