// Operators of the rank losses, in the same translation unit as the others (ops.cpp).
#include "ranks.h"

namespace {

Tensor compare_to(const double* grad, int64_t grad_step, const Tensor& s, const Tensor& t, const MaybeTensor& labels,
                  const MaybeTensor& mask, const Tensor& args, int64_t kind, int64_t vocab, int64_t ignore, Tensor* out,
                  int64_t form) {
  const Guard guard(s.get_device_index());
  Problem rows{};
  set_rows(rows, s, t, labels, mask, vocab, ignore);
  STD_TORCH_CHECK(kind == 1 && size_of(rows.s.type) == 2 && size_of(rows.t.type) == 2 && vocab < 1 << 20,
                  "kdkernels: backend 'cuda' compares rows of 16-bit numbers by Spearman's loss only");
  STD_TORCH_CHECK(on_host(args) && args.dim() == 2 && args.size(0) == 1 && args.size(1) >= 5,
                  "kdkernels: args must be (1, 5) float64 on the CPU");
  const int64_t N = rows.rows;
  Tensor value = doubles(s, {N}), left = doubles(s, {N / 2 + 1});
  RankTask task{rows.s, rows.t, rows.labels, rows.mask, N, ignore, int(vocab), int(width_of(s)),
                args.const_data_ptr<double>()[2], grad, grad_step, value.mutable_data_ptr<double>(),
                out ? out->mutable_data_ptr() : nullptr, reinterpret_cast<int*>(left.mutable_data_ptr<double>()), nullptr};
  Tensor scratch = doubles(s, {spearman_blocks(task, int(form)), kRankScratch / 8});
  task.scratch = reinterpret_cast<char*>(scratch.mutable_data_ptr<double>());
  check(spearman(task, int(form), stream_of(s)), "spearman");
  return value;
}

Tensor cuda_compare(const Tensor& s, const Tensor& t, const MaybeTensor& labels, const MaybeTensor& mask,
                    const Tensor& args, int64_t kind, int64_t vocab, int64_t ignore, int64_t form) {
  return compare_to(nullptr, 0, s, t, labels, mask, args, kind, vocab, ignore, nullptr, form);
}

std::tuple<Tensor, Tensor> cuda_compare_step(const Tensor& grad, const Tensor& s, const Tensor& t,
                                             const MaybeTensor& labels, const MaybeTensor& mask, const Tensor& args,
                                             int64_t kind, int64_t vocab, int64_t ignore, int64_t side, int64_t form) {
  STD_TORCH_CHECK(side == 0, "kdkernels: this loss has no gradient for the teacher");
  Tensor out = empty_as(s);
  Tensor value = compare_to(grad.const_data_ptr<double>(), step_of(grad, rows_of(s), "grad"), s, t, labels, mask, args,
                            kind, vocab, ignore, &out, form);
  return {value, out};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def("cuda_compare(Tensor student, Tensor teacher, Tensor? labels, Tensor? mask, Tensor args, int kind, SymInt vocab, "
        "int ignore_index, int form) -> Tensor");
  m.def("cuda_compare_step(Tensor grad, Tensor student, Tensor teacher, Tensor? labels, Tensor? mask, Tensor args, "
        "int kind, SymInt vocab, int ignore_index, int side, int form) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, KD_DISPATCH, m) {
  m.impl("cuda_compare", TORCH_BOX(&cuda_compare));
  m.impl("cuda_compare_step", TORCH_BOX(&cuda_compare_step));
}
