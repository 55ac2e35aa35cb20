// The kernels that read no rows of logits, and which of the others a task goes to.
#include "launch.h"

#include "dtype.h"
#include "row.h"

namespace kd::gpu {
namespace {

KD_KERNEL(128, 1) rows_kernel(KD_PARAMS RowsTask task) {
  const Problem& p = task.problem;
  double* numbers = reinterpret_cast<double*>(shared());
  const int count = p.count + (p.row_args ? 0 : 3 + 2 * p.points());
  for (int i = thread(); i < count; i += threads()) numbers[i] = p.numbers[i];
  sync();
  const Program program{numbers};
  const int K = program.points();
  const int64_t n = int64_t(block()) * threads() + thread();
  if (n >= p.rows) return;
  const double* args = p.row_args ? p.row_args + n * p.args_stride : numbers + p.count;
  task.value[n] = value_and_coefs(program, args, task.stats + n * (K + 1) * kStats, task.sides,
                                  p.rows * (K + 1) * kCoefs, task.registers + n * 2 * program.registers(),
                                  task.coef + n * (K + 1) * kCoefs);
}

struct BeginTask { const int64_t* labels; int64_t rows, ignore; Total total; };

KD_KERNEL(1024, 1) begin_kernel(KD_PARAMS BeginTask p) {
  double kept = 0;
  for (int64_t n = thread(); p.labels && n < p.rows; n += threads()) kept += p.labels[n] != p.ignore;
  kept = sum_of_threads(kept, reinterpret_cast<double*>(shared()));
  if (thread()) return;
  *p.total.kept = kept;
  *p.total.done = 0;
  *p.total.sum = 0;
}

struct RescaleTask { void* x; int64_t count; const void* factor; bool wide; };

template <typename X> KD_KERNEL(256, 1) rescale_kernel(KD_PARAMS RescaleTask p) {
  const double wide = p.wide ? *static_cast<const double*>(p.factor) : *static_cast<const float*>(p.factor);
  const float factor = float(wide);
  if (factor == 1) return;
  X* x = static_cast<X*>(p.x);
  const auto scaled_up = [&](X& y) { narrow(times(widen(y), factor), &y); };  // 0 stays, whatever the factor
  constexpr int n = 16 / sizeof(X);
  const int64_t packs = aligned(x) ? p.count / n : 0, all = int64_t(blocks()) * threads();
  const int64_t me = int64_t(block()) * threads() + thread();
  for (int64_t i = me; i < packs; i += all) {
    union { Bytes16 bytes; X part[n]; } pack{load16_last(x + i * n)};
#pragma unroll
    for (int e = 0; e < n; ++e) scaled_up(pack.part[e]);
    store16(x + i * n, pack.bytes);
  }
  for (int64_t i = packs * n + me; i < p.count; i += all) scaled_up(x[i]);
}
template <typename X> int rescale_as(const RescaleTask& task, void* stream) {
  const int64_t packs = task.count / (16 / int64_t(sizeof(X))) / 256 + 1, most = device().processors * 8;
  return launch(rescale_kernel<X>, Shape{int(packs < most ? packs : most), 256, 0, 1}, stream, task);
}

template <typename F> int with_type(Type type, F f) {
  switch (type) {
    case Type::f32: return f(Dtype<float>());
    case Type::f16: return f(Dtype<F16>());
    default: return f(Dtype<BF16>());
  }
}

}  // namespace

int reduce(const ReduceTask& task, void* stream) {
  const Problem& p = task.problem;
  return with_type(p.s.type, [&](auto x) { return x.reduce(task, p.s.type == p.t.type, stream); });
}
int spread(const SpreadTask& task, void* stream) {
  const Problem& p = task.problem;
  return with_type((task.side ? p.t : p.s).type, [&](auto x) { return x.spread(task, p.s.type == p.t.type, stream); });
}
int step(const StepTask& task, int form, void* stream) {
  const Problem& p = task.problem;
  return with_type(p.s.type, [&](auto x) { return x.step(task, p.s.type == p.t.type, form, stream); });
}
int rows(const RowsTask& task, void* stream) {
  const Problem& p = task.problem;
  const int bytes = 8 * (p.count + 3 + 2 * p.points());
  if (!p.rows) return 0;
  return launch(rows_kernel, Shape{int((p.rows + 127) / 128), 128, bytes, 1}, stream, task);
}
int begin(const int64_t* labels, int64_t rows, int64_t ignore, const Total& total, void* stream) {
  const int threads = labels ? 1024 : 32;
  return launch(begin_kernel, Shape{1, threads, 256, 1}, stream, BeginTask{labels, rows, ignore, total});
}
int rescale(void* x, Type type, int64_t count, const void* factor, bool wide, void* stream) {
  const RescaleTask task{x, count, factor, wide};
  if (!count) return 0;
  switch (type) {
    case Type::f32: return rescale_as<float>(task, stream);
    case Type::f16: return rescale_as<F16>(task, stream);
    default: return rescale_as<BF16>(task, stream);
  }
}

}  // namespace kd::gpu
