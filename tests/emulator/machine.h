// The twin of csrc/cuda/machine.h: runs the kernels on the CPU and objects to what a GPU would let pass in silence.
// The blocks of a cluster run together, the clusters one after another. It knows nothing of the memory model, of speed
// or of the ends of global memory (-fsanitize=address does, with its library preloaded).
#pragma once
#include <bit>
#include <cfloat>
#include <cmath>
#include <limits>
#include <source_location>
#include <type_traits>

#include "blocks.h"

#define KD_DEVICE inline
#define KD_SLOW __attribute__((noinline)) inline
#define KD_KERNEL(threads, blocks) void
#define KD_PARAMS const
#define KD_CLUSTERS 1

namespace kd::gpu {

// Where a barrier is called: the threads of a warp, and of a block, must meet at the same one.
using Place = std::source_location;

KD_DEVICE int thread() { return emulator::here().index; }
KD_DEVICE int threads() { return emulator::cluster.shape.threads; }
KD_DEVICE int block() { return emulator::here().block->index; }
KD_DEVICE int blocks() { return emulator::cluster.shape.blocks; }
KD_DEVICE char* shared() { return emulator::here().block->memory; }
KD_DEVICE void sync(Place at = Place::current()) { emulator::here().block->barrier.wait(int(at.line())); }
KD_DEVICE void sync_warp(Place at = Place::current()) { emulator::here_warp().barrier.wait(int(at.line())); }
// f(values of all lanes): each leaves its own in a slot of the warp.
template <typename T, typename F> KD_DEVICE auto among_lanes(T x, Place at, F f) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 16);
  emulator::Warp& warp = emulator::here_warp();
  char (*slots)[16] = warp.slots[warp.barrier.phase % 2];
  std::memcpy(slots[thread() % 32], &x, sizeof x);
  warp.barrier.wait(int(at.line()));
  return f([&](int lane) {
    std::memcpy(&x, slots[lane], sizeof x);
    return x;
  });
}
KD_DEVICE bool any(bool x, Place at = Place::current()) {
  return among_lanes(x, at, [](auto of) {
    bool found = false;
    for (int lane = 0; lane < 32; ++lane) found |= of(lane);
    return found;
  });
}
template <typename T> KD_DEVICE T shuffle_xor(T x, int distance, Place at = Place::current()) {
  if (distance < 0 || distance > 31) emulator::fail("shuffle_xor(): no lane at this distance");
  return among_lanes(x, at, [&](auto of) { return of(thread() % 32 ^ distance); });
}

KD_DEVICE float fast_exp2(float x) {
  const float y = std::exp2(x);
  return y < FLT_MIN ? 0 : y;
}

KD_DEVICE uint32_t float_bits(float x) { return std::bit_cast<uint32_t>(x); }
KD_DEVICE float bits_float(uint32_t x) { return std::bit_cast<float>(x); }

struct BF16 { uint16_t bits; };
struct F16 { uint16_t bits; };

KD_DEVICE float widen(float x) { return x; }
KD_DEVICE float widen(BF16 x) { return bits_float(uint32_t(x.bits) << 16); }
KD_DEVICE float widen(F16 x) { return float(std::bit_cast<_Float16>(x.bits)); }
KD_DEVICE void narrow(float x, float* y) { *y = x; }
KD_DEVICE void narrow(float x, BF16* y) {
  const uint32_t bits = float_bits(x);
  y->bits = x != x ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
KD_DEVICE void narrow(float x, F16* y) { y->bits = x != x ? 0x7fff : std::bit_cast<uint16_t>(_Float16(x)); }

template <typename X> KD_DEVICE uint32_t max2(uint32_t x, uint32_t y, X*) {
  uint32_t z = 0;
  for (int half = 0; half < 32; half += 16) {
    const float a = widen(X{uint16_t(x >> half)}), b = widen(X{uint16_t(y >> half)});
    z |= (a >= b || b != b ? x : y) & 0xffffu << half;
  }
  return z;
}
template <typename X> KD_DEVICE uint32_t narrow2(float x, float y, X*) {
  X low, high;
  narrow(x, &low);
  narrow(y, &high);
  return low.bits | uint32_t(high.bits) << 16;
}

struct alignas(16) Bytes16 { uint32_t word[4]; };

KD_DEVICE Bytes16 load16(const void* from) {
  emulator::global16(from, "load16()");
  emulator::scheduler.interrupt();
  Bytes16 x;
  std::memcpy(&x, from, 16);
  return x;
}
KD_DEVICE Bytes16 load16_last(const void* from) { return load16(from); }
KD_DEVICE void store16(void* to, const Bytes16& x) {
  emulator::global16(to, "store16()");
  emulator::scheduler.interrupt();
  std::memcpy(to, &x, 16);
}

KD_DEVICE int arrive(int* counter) {
  emulator::scheduler.interrupt();
  return (*counter)++;
}
KD_DEVICE void add_shared(uint32_t* to, uint32_t x) {
  emulator::own(to, 4, "add_shared()");
  emulator::scheduler.interrupt();
  *to += x;
}
template <typename X> KD_DEVICE void add_global(X* to, X x) {
  if (emulator::cluster.owns(to)) emulator::fail("add_global(): shared memory where global memory is meant");
  emulator::scheduler.interrupt();
  *to += x;
}
KD_DEVICE double load_shared_by_blocks(const double* from) { return *from; }

KD_DEVICE int cluster_rank() { return emulator::here().block->rank; }
KD_DEVICE int cluster_size() { return emulator::cluster.shape.cluster; }
KD_DEVICE void cluster_sync() { emulator::cluster.barrier.wait(0); }  // blocks may meet from different places
// The same place in the shared memory of another block.
template <typename X> KD_DEVICE char* remote(const X* mine, int rank, const std::string& what) {
  emulator::own(mine, sizeof(X), what.c_str());
  emulator::aligned(mine, sizeof(X), what.c_str());
  if (rank < 0 || rank >= cluster_size()) emulator::fail(what + ": no block of this rank");
  emulator::scheduler.interrupt();
  const emulator::Block& target = emulator::cluster.blocks[rank];
  if (!target.started) emulator::fail(what + ": the other block may not have started yet");
  if (target.barrier.left == threads()) emulator::fail(what + ": the other block has ended");
  return target.memory + (reinterpret_cast<const char*>(mine) - shared());
}
KD_DEVICE void store_remote(double* mine, int rank, double x) {
  std::memcpy(remote(mine, rank, "store_remote()"), &x, sizeof x);
}
KD_DEVICE void store_remote(uint32_t* mine, int rank, uint32_t x) {
  std::memcpy(remote(mine, rank, "store_remote()"), &x, sizeof x);
}
KD_DEVICE uint32_t load_remote(const uint32_t* mine, int rank) {
  uint32_t x;
  std::memcpy(&x, remote(mine, rank, "load_remote()"), sizeof x);
  return x;
}

KD_DEVICE void barrier_init(uint64_t* barrier) {
  emulator::own(barrier, 8, "barrier_init()");
  emulator::aligned(barrier, 8, "barrier_init()");
  if (!emulator::here().block->transactions.try_emplace(barrier).second)
    emulator::fail("barrier_init(): initialised already");
  *barrier = emulator::INITIALISED;
}
KD_DEVICE void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  emulator::scheduler.interrupt();
  emulator::Transactions& t = emulator::transactions(barrier, "barrier_expect()");
  if (t.arrived) emulator::fail("barrier_expect(): a second time in one phase");
  if (bytes >= 1 << 20) emulator::fail("barrier_expect(): more bytes than an mbarrier counts");
  t.arrived = true;
  t.update(bytes);
}
// As in PTX, the parity of the phase before the current one does not wait.
KD_DEVICE void barrier_wait(uint64_t* barrier, uint32_t parity, Place at = Place::current()) {
  emulator::scheduler.interrupt();
  const emulator::Transactions& t = emulator::transactions(barrier, "barrier_wait()");
  if (parity > 1) emulator::fail("barrier_wait(): the parity is 0 or 1");
  const emulator::Wait wait{&t.phase, parity, "barrier_wait()", int(at.line())};
  if (!wait.over()) emulator::scheduler.wait(wait);
}
KD_DEVICE void fence_copies() {}
KD_DEVICE void bulk_copy(void* to_shared, const void* from, uint32_t bytes, uint64_t* barrier) {
  emulator::global16(from, "bulk_copy(), from");
  emulator::aligned(to_shared, 16, "bulk_copy(), to");
  emulator::own(to_shared, bytes, "bulk_copy(), to");
  if (!bytes || bytes % 16) emulator::fail("bulk_copy(): the size is not a multiple of 16");
  emulator::transactions(barrier, "bulk_copy()");
  emulator::scheduler.interrupt();
  // From now until it has landed, what is there is neither the old nor the new.
  std::memset(to_shared, emulator::POISON, bytes);
  emulator::cluster.copies.push_back({emulator::here().block, to_shared, from, bytes, barrier});
  if (emulator::scheduler.eager() || emulator::scheduler.one_in(4)) emulator::land(emulator::cluster.copies.size() - 1);
}

// Host side.
template <typename P> int prepare(void (*kernel)(P), int shared, bool wide_clusters) {
  return emulator::prepare(reinterpret_cast<void*>(kernel), shared, wide_clusters);
}
template <typename P> int resident(void (*)(P), int, int) { return 2; }
template <typename P> int resident_clusters(void (*kernel)(P), const Shape& z) {
  if (emulator::refused(reinterpret_cast<void*>(kernel), {z.cluster, z.threads, z.shared, z.cluster})) return 0;
  return std::max(1, device().processors / z.cluster);
}
template <typename P> int launch(void (*kernel)(P), const Shape& z, void* /*stream*/, const P& params) {
  const Shape shape{z.blocks, z.threads, z.shared, std::max(1, z.cluster)};
  return emulator::run(reinterpret_cast<void*>(kernel), shape, [&] { kernel(params); });
}

}  // namespace kd::gpu
