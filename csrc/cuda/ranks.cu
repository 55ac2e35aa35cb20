// Spearman's loss of 16-bit rows: tables in the shared memory of a cluster's blocks, or of all bit patterns in L2.
#include "rankbins.h"

#include <algorithm>

namespace kd::gpu {
namespace {

template <typename Z>
KD_DEVICE void write_lines(const Z& z, const RankTask& p, const HalfRows& x, int64_t n, int begin, int end) {
  const HalfOut out(p, n);
  const int limit = end < p.vocab ? end : p.vocab;
  const float *const K = z.K(), *const G = z.G();
  x.packs(begin, limit, [&](int first, int count, int use, const uint16_t* s, const uint16_t* t) {
    float d[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      int i, j;
      const bool live = (use >> e & 1) & z.find(s[e], x.s_infinity, &i) & z.find(t[e], x.t_infinity, &j);
      d[e] = live ? K[i] * float(int32_t(z.table[j])) + G[i] : 0;
    }
    out.put(first, count, d);
  });
  for (int i = (limit > begin ? limit : begin) + thread(); i < end; i += threads()) out.to[i] = 0;
}

// What a row is without classes, or with a NaN among them.
KD_DEVICE void no_row(const RankTask& p, int64_t n, const Asked& row, double value, int begin, int end) {
  if (begin == 0 && thread() == 0) p.value[n] = row.kept ? value : 0;
  if (p.grad) HalfOut(p, n).fill(begin, end, p.vocab, row.g != 0 && value != value ? float(value) : 0);
}

constexpr int kWindowBytes = 6 * kWindow * 4 + 16 + kRankParts;  // six tables, flags, parts
#ifdef KD_CLUSTERS
// Bins of bfloat16 numbers in a block's shared memory; neighbours' chunks start in different banks.
struct Window {
  static constexpr int kBins = kWindow;
  uint32_t* table;  // ranks, counts, sums of ranks and their high limbs, later floats; then two more tables of floats
  uint32_t* flags;
  void* parts;

  KD_DEVICE explicit Window(char* memory)
      : table(reinterpret_cast<uint32_t*>(memory)), flags(table + 6 * kWindow), parts(flags + 4) {}
  static KD_DEVICE int slot(int bin) { return bin ^ (bin >> 5 & 15); }
  // -0 is 0. False for what has no bin, infinities among them.
  static KD_DEVICE bool find(int bits, int /*infinity*/, int* at) {
    const int size = bits & 0x7fff, place = size - kSmallest;
    const bool fits = uint32_t(place - 1) < kWindow / 2 - 1;
    const int bin = kWindow / 2 + (fits ? place ^ -(bits >> 15) : 0);
    *at = slot(bin);
    return fits | (size == 0);
  }
  static KD_DEVICE float number(int bin) {
    const int place = bin >= kWindow / 2 ? bin - kWindow / 2 : kWindow / 2 - 1 - bin;
    const float size = place ? widen(BF16{uint16_t(place + kSmallest)}) : 0;
    return bin >= kWindow / 2 ? size : -size;
  }
  KD_DEVICE uint32_t* counts() const { return table + kWindow; }
  KD_DEVICE uint32_t* low() const { return table + 2 * kWindow; }
  KD_DEVICE uint32_t* high() const { return table + 3 * kWindow; }
  KD_DEVICE double count(int i) const { return counts()[i]; }
  KD_DEVICE double ranks(int i) const { return bits_float(low()[i]); }
  KD_DEVICE float* R() const { return reinterpret_cast<float*>(high()); }
  KD_DEVICE float* K() const { return R() + kWindow; }
  KD_DEVICE float* G() const { return R() + 2 * kWindow; }
};

// Tables [from, from + count) of all blocks become their sum, and flags are set that are set in any. Each block adds up
// a share of the slots, there where K and G will be, and tells the others.
KD_DEVICE void add_up(const Window& z, int from, int count) {
  const int ranks = cluster_size(), share = count * kWindow / ranks;
  uint32_t *const mine = z.table + from * kWindow + share * cluster_rank(), *const sums = z.table + 4 * kWindow;
  uint32_t flag = 0;
  cluster_sync();
  if (ranks == 1) return;
  for (int i = thread(); i < share; i += threads()) {
    uint32_t sum = 0;
    for (int r = 0; r < ranks; ++r) sum += load_remote(mine + i, r);
    sums[i] = sum;
  }
  for (int r = 0; thread() < 2 && r < ranks; ++r) flag |= load_remote(z.flags + thread(), r);
  cluster_sync();  // everybody has read what others overwrite now
  if (thread() < 2) z.flags[thread()] = flag;
  for (int r = 0; r < ranks; ++r)
    for (int i = thread(); i < share; i += threads()) store_remote(mine + i, r, sums[i]);
  cluster_sync();
}

// Sums of ranks by the student's bins, in two limbs of 32 bits where one could overflow; floats in the end.
KD_DEVICE void sum_ranks(const Window& z, const HalfRows& x, int begin, int end, int64_t n) {
  int64_t most = 0;
  for (int i = thread(); i < kWindow; i += threads()) most = most > z.counts()[i] ? most : z.counts()[i];
  const bool wide = block_sum(int64_t(most * n >= int64_t(1) << 31), static_cast<int64_t*>(z.parts)) > 0;
  x.each_live(z, begin, end, [&](int i, int j) {
    const int32_t r = int32_t(z.table[j]);
    add_shared(z.low() + i, wide ? uint32_t(r) & 4095 : uint32_t(r));
    if (wide) add_shared(z.high() + i, uint32_t(r >> 12));
  });
  add_up(z, 2, wide ? 2 : 1);
  for (int i = thread(); i < kWindow; i += threads()) {
    const uint32_t low = z.low()[i];
    z.low()[i] = float_bits(float(wide ? double(int32_t(z.high()[i])) * 4096 + low : double(int32_t(low))));
  }
  sync();
}

// Classes [begin, end) are this block's.
KD_DEVICE void window_row(const Window& z, const RankTask& p, int64_t n, int begin, int end) {
  const Asked row(p, n);
  if (p.left && begin == 0 && thread() == 0) p.left[n] = 0;
  if (!row.kept || row.strange) return no_row(p, n, row, row.strange ? NAN : 0, begin, end);
  for (int i = thread(); i < 4 * kWindow + 4; i += threads()) z.table[i < 4 * kWindow ? i : i + 2 * kWindow] = 0;
  sync();
  const HalfRows x(p, n);
  const int limit = end < p.vocab ? end : p.vocab;
  const int odd = x.each_live(z, begin, limit, [&](int i, int j) {
    add_shared(z.table + j, 1);
    add_shared(z.counts() + i, 1);
  });
  if (odd & SPOILT) z.flags[0] = 1;
  if (odd & OUTSIDE) z.flags[1] = 1;
  add_up(z, 0, 2);
  const bool bad = z.flags[0], left = z.flags[1];
  if (bad || left) {
    if (bad) no_row(p, n, row, NAN, begin, end);
    else if (begin == 0 && thread() == 0) p.left[n] = 1;
    return sync();  // others may still read the flags
  }
  int64_t squares;
  const int64_t live = rank_table(z, z.parts, &squares);
  sum_ranks(z, x, begin, limit, live);
  double value;
  const bool slopes = correlate(z, double(live), p.tau, double(squares), row.g, z.parts, &value);
  if (begin == 0 && thread() == 0) p.value[n] = value;
  if (p.grad && slopes) write_lines(z, p, x, n, begin, end);
  else if (p.grad) HalfOut(p, n).fill(begin, end, p.vocab, 0);
  sync();
}
#endif

// Reads a pair of rows three times (once from memory, then from L2), 6 w bytes a class, and writes w.
KD_KERNEL(kRankThreads, 1) window_kernel(KD_PARAMS RankTask p) {
#ifdef KD_CLUSTERS
  const Window z(shared());
  const int ranks = cluster_size(), slice = (p.width + 8 * ranks - 1) / (8 * ranks) * 8;
  const int begin = slice * cluster_rank(), end = begin + slice < p.width ? begin + slice : p.width;
  for (int64_t n = block() / ranks; n < p.rows; n += blocks() / ranks) window_row(z, p, n, begin, end > begin ? end : begin);
  cluster_sync();  // nobody leaves while others may still read here
#endif
}

// Bins of all bit patterns in global memory, laid out for threads that walk through chunks of them.
struct Whole {
  static constexpr int kBins = kBitPatterns;
  unsigned long long* packed;  // the sum of the ranks, and the count below
  uint32_t* table;
  float* floats;
  bool half;
  KD_DEVICE Whole(char* memory, bool half)
      : packed(reinterpret_cast<unsigned long long*>(memory)), table(reinterpret_cast<uint32_t*>(packed + kBins)),
        floats(reinterpret_cast<float*>(table + kBins)), half(half) {}
  static KD_DEVICE int slot(int bin) {
    constexpr int chunk = kBins / kRankThreads;
    return bin % chunk * kRankThreads + bin / chunk;
  }
  static KD_DEVICE bool find(int bits, int infinity, int* at) {
    *at = slot(key_of(uint16_t(bits)));
    return (bits & 0x7fff) < infinity;
  }
  KD_DEVICE float number(int bin) const {
    const uint16_t bits = bits_of_key(uint16_t(bin));
    return half ? widen(F16{bits}) : widen(BF16{bits});
  }
  KD_DEVICE double count(int i) const { return double(packed[i] & ((1 << kRankBits) - 1)); }
  KD_DEVICE double ranks(int i) const { return double(int64_t(packed[i]) >> kRankBits); }
  KD_DEVICE float* R() const { return floats; }
  KD_DEVICE float* K() const { return floats + kBins; }
  KD_DEVICE float* G() const { return floats + 2 * kBins; }
};

// The same bytes a class, and one more atomic operation of 64 bits in L2; and 1 MB of tables a row.
KD_KERNEL(kRankThreads, 1) whole_kernel(KD_PARAMS RankTask p) {
  const Whole z(p.scratch + block() * kRankScratch, p.s.type == Type::f16);
  void* const parts = shared();
  for (int64_t n = block(); n < p.rows; n += blocks()) {
    if (p.left && !p.left[n]) continue;
    const Asked row(p, n);
    if (!row.kept || row.strange) { no_row(p, n, row, row.strange ? NAN : 0, 0, p.width); continue; }
    for (int i = thread(); i < kBitPatterns; i += threads()) { z.packed[i] = 0; z.table[i] = 0; }
    sync();
    const HalfRows x(p, n);
    const int odd = x.each_live(z, 0, p.vocab, [&](int, int j) { add_global(z.table + j, 1u); });
    if (block_sum(int64_t(odd), static_cast<int64_t*>(parts))) { no_row(p, n, row, NAN, 0, p.width); continue; }
    int64_t squares;
    const int64_t live = rank_table(z, parts, &squares);
    x.each_live(z, 0, p.vocab, [&](int i, int j) {
      const int64_t r = int32_t(z.table[j]);
      add_global(z.packed + i, (static_cast<unsigned long long>(r) << kRankBits) + 1);
    });
    sync();
    double value;
    const bool slopes = correlate(z, double(live), p.tau, double(squares), row.g, parts, &value);
    if (thread() == 0) p.value[n] = value;
    if (p.grad && slopes) write_lines(z, p, x, n, 0, p.width);
    else if (p.grad) HalfOut(p, n).fill(0, p.width, p.vocab, 0);
    sync();
  }
}

// Clusters of 4 blocks, or 8 for few and for long rows. False where the window does not fit.
bool window_shape(const RankTask& p, Shape* z) {
  const int processors = device().processors;
  for (int ranks = p.vocab > 200000 || p.rows * 4 < processors ? 8 : 4; ranks > 1; ranks /= 2) {
    *z = {ranks, kRankThreads, kWindowBytes, ranks};
    if (prepare(window_kernel, z->shared, false)) return false;
    const int64_t clusters = resident_clusters(window_kernel, *z);
    if (!clusters) continue;
    z->blocks = int(std::min(p.rows, clusters)) * ranks;
    return true;
  }
  return false;
}

bool windows(const RankTask& p, int form) {
  return p.s.type == Type::bf16 && p.t.type == Type::bf16 && form != 1 && device().major >= 9;
}

}  // namespace

int spearman_blocks(const RankTask& p, int form) {
  const int64_t most = windows(p, form) ? 8 : std::min(device().processors, 128);  // rarely a row is left over
  return int(std::max<int64_t>(1, std::min(p.rows, most)));
}
int spearman(const RankTask& task, int form, void* stream) {
  RankTask p = task;
  Shape z;
  if (!p.rows) return 0;
  if (windows(p, form) && window_shape(p, &z)) {
    if (int error = launch(window_kernel, z, stream, p)) return error;
  } else {
    p.left = nullptr;
  }
  return launch(whole_kernel, Shape{spearman_blocks(task, form), kRankThreads, kRankParts, 1}, stream, p);
}

}  // namespace kd::gpu
