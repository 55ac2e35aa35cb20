// Small kernels for the emulator's own test: right ones, and the same with a bug planted in them.
#include "machine.h"

namespace kd::gpu {

struct Task {
  const float* in;
  double* out;
  int tiles;
  const char* bug;
  KD_DEVICE bool has(const char* name) const { return !std::strcmp(bug, name); }
};

// out[row] is the sum of the row's 4 * threads() numbers; block b does rows b, b + blocks(), ...
KD_KERNEL(256, 1) block_sum(KD_PARAMS Task task) {
  double* part = reinterpret_cast<double*>(shared());
  for (int row = block(); row < task.tiles; row += blocks()) {
    const float* from = task.in + (row * threads() + thread()) * 4 + task.has("unaligned load");
    const Bytes16 x = task.has("load of shared memory") ? load16(shared()) : load16(from);
    double sum = 0;
    for (uint32_t word : x.word) sum += bits_float(word);
    const bool last = any(thread() == threads() - 1);
    for (int d = 16; d; d /= 2)
      if (!task.has("lane without shuffle") || thread() != 5) sum += shuffle_xor(sum, d);
    if (thread() % 32 == 0) part[thread() / 32 + task.has("write beyond the end")] = sum;
    if (task.has("thread left early") && thread() == 40) return;
    if (task.has("two places")) {
      if (thread() < 32) sync();
      else sync();
    } else if (!task.has("missing barrier") && (!task.has("divergent barrier") || thread() < 48)) {
      sync();
    }
    sum = 0;
    for (int w = 0; w < threads() / 32; ++w) sum += part[w];
    if (last && thread() % 32 == 31) task.out[row] = sum;
    if (!task.has("missing second barrier")) sync();
  }
}

// Every block of the cluster gets the sum of the first numbers of all of them.
KD_KERNEL(64, 1) all_reduce(KD_PARAMS Task task) {
  double* inbox = reinterpret_cast<double*>(shared());
  const int rank = cluster_rank(), size = cluster_size();
  if (!task.has("not started")) cluster_sync();
  if (task.has("already ended") && rank == 1) return;
  const bool outside = task.has("remote out of bounds");
  if (thread() < size) store_remote(inbox + (outside ? size : rank), thread() + task.has("no such rank"),
                                    task.in[block()]);
  if (task.has("missing cluster barrier") || task.has("already ended")) sync();
  else cluster_sync();
  double sum = 0;
  for (int r = 0; r < size; ++r) sum += inbox[r];
  if (thread() == 0) task.out[block()] = sum;
}

// The cluster's blocks count numbers in four bins each, and add up the counts of all; the last bin goes out.
KD_KERNEL(64, 1) histogram(KD_PARAMS Task task) {
  uint32_t* bins = reinterpret_cast<uint32_t*>(shared());
  if (thread() < 4 && !task.has("not cleared")) bins[thread()] = 0;
  sync();
  const int bin = int(task.in[block() * threads() + thread()] + 1000) % 4;
  if (task.has("global add")) add_global(bins + bin, 1u);
  else add_shared(bins + (task.has("add out of bounds") ? 8 : 0) + bin, 1);
  if (!task.has("counts not awaited")) cluster_sync();
  uint32_t sum = 0;
  for (int r = 0; r < cluster_size() + task.has("load of no rank"); ++r) sum += load_remote(bins + 3, r);
  if (!task.has("leaves early")) cluster_sync();
  if (thread() == 0) task.out[block()] = sum;
}

// The block's threads add up tiles of 4 * threads() numbers, which arrive in two stages by turns.
KD_KERNEL(64, 1) pipeline(KD_PARAMS Task task) {
  uint64_t* full = reinterpret_cast<uint64_t*>(shared());
  float* stage = reinterpret_cast<float*>(shared() + 128);
  const int n = 4 * threads(), bytes = 4 * n;
  const float* from = task.in + block() * task.tiles * n;
  const auto fetch = [&](int tile) {
    float* to = stage + tile % 2 * n + task.has("unaligned copy");
    if (task.has("copy out of bounds")) to += n;
    barrier_expect(&full[tile % 2], bytes + 16 * (task.has("expects too much") - task.has("expects too little")));
    bulk_copy(to, from + tile * n, bytes - 4 * task.has("odd size"), &full[tile % 2]);
  };
  if (thread() == 0)
    for (int i = 0; i < 2 - task.has("uninitialised mbarrier"); ++i) barrier_init(&full[i]);
  if (!task.has("init without barrier")) sync();
  if (thread() == 0)
    for (int i = 0; i < 2; ++i) fetch(i);
  double sum = 0;
  for (int tile = 0; tile < task.tiles; ++tile) {
    if (!task.has("missing wait")) barrier_wait(&full[tile % 2], (tile / 2 % 2) ^ task.has("wrong parity"));
    for (int i = 0; i < 4; ++i) sum += stage[tile % 2 * n + thread() * 4 + i];
    if (!task.has("stage still read")) sync();
    fence_copies();
    if (thread() == 0 && tile + 2 < task.tiles + task.has("copies in flight")) fetch(tile + 2);
  }
  for (int d = 16; d; d /= 2) sum += shuffle_xor(sum, d);
  double* part = reinterpret_cast<double*>(stage);
  sync();
  if (thread() % 32 == 0) part[thread() / 32] = sum;
  sync();
  if (thread() == 0) task.out[block()] = part[0] + part[1];
}

template <int> KD_KERNEL(1024, 1) nothing(KD_PARAMS Task) { cluster_sync(); }

int check(const char* kernel, const char* bug) {
  std::vector<Bytes16> memory(1 << 12);
  float* in = reinterpret_cast<float*>(memory.data());
  for (int i = 0; i < 4 << 12; ++i) in[i] = float(i * 7919 % 4096 - 1000);
  std::vector<double> out(8, 0), want(8, 0);
  const auto sums = [&](int rows, int n) {
    for (int i = 0; i < rows * n; ++i) want[i / n] += in[i];
  };
  int error = 0;
  if (!std::strcmp(kernel, "block sum")) {
    error = launch(block_sum, {3, 256, 64, 1}, nullptr, Task{in, out.data(), 8, bug});
    sums(8, 1024);
  } else if (!std::strcmp(kernel, "all-reduce")) {
    error = launch(all_reduce, {8, 64, 32, 4}, nullptr, Task{in, out.data(), 0, bug});
    for (int i = 0; i < 8; ++i) want[i] = in[i / 4 * 4] + in[i / 4 * 4 + 1] + in[i / 4 * 4 + 2] + in[i / 4 * 4 + 3];
  } else if (!std::strcmp(kernel, "histogram")) {
    error = launch(histogram, {8, 64, 32, 4}, nullptr, Task{in, out.data(), 0, bug});
    for (int i = 0; i < 8 * 64; ++i)
      for (int k = 0; int(in[i] + 1000) % 4 == 3 && k < 4; ++k) want[i / 256 * 4 + k] += 1;
  } else {
    error = launch(pipeline, {2, 64, 128 + 2 * 1024, 1}, nullptr, Task{in, out.data(), 7, bug});
    sums(2, 7 * 256);
  }
  return error ? error : out != want;
}

}  // namespace kd::gpu

// 0: the right result, 1: a wrong one, 2: an exception, whose message is in kd_emulator_error; else what launch() says.
extern "C" int selftest(const char* kernel, const char* bug) {
  try {
    return kd::gpu::check(kernel, bug);
  } catch (const std::exception&) {
    return 2;
  }
}

// What prepare(), if it is called, or else launch() says to a shape.
extern "C" int shape(int prepares, int wide, int blocks, int threads, int shared, int cluster) {
  using namespace kd::gpu;
  void (*const kernel)(Task) = prepares ? nothing<1> : nothing<0>;
  if (const int error = prepares ? prepare(kernel, shared, wide) : 0) return error;
  return launch(kernel, {blocks, threads, shared, cluster}, nullptr, Task{});
}

// The bits of x in float16 (16) or bfloat16, and back.
extern "C" int narrowed(float x, int format) {
  kd::gpu::F16 half;
  kd::gpu::BF16 brain;
  kd::gpu::narrow(x, &half);
  kd::gpu::narrow(x, &brain);
  return format == 16 ? half.bits : brain.bits;
}
extern "C" float widened(int bits, int format) {
  return format == 16 ? widen(kd::gpu::F16{uint16_t(bits)}) : widen(kd::gpu::BF16{uint16_t(bits)});
}
