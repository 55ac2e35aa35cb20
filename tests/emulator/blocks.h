// Blocks and clusters of the emulator: their barriers, shared memory and bulk copies, and what is forbidden.
#pragma once
#include <mutex>

#include "fibers.h"

extern "C" {
[[gnu::weak]] int kd_emulator_processors = 2, kd_emulator_shared = 232448, kd_emulator_major = 9;
[[gnu::weak]] int kd_emulator_widest = 0;  // the largest cluster so far
// What is wrong with a kernel: launch() throws it or, with 0 here, returns 719 and leaves the message below.
[[gnu::weak]] int kd_emulator_throws = 1;
[[gnu::weak]] char kd_emulator_error[512] = "";
}

namespace kd::gpu {

struct Device { int index, processors, shared, major; };
inline Device device() { return {0, kd_emulator_processors, kd_emulator_shared, kd_emulator_major}; }
struct Shape { int blocks, threads, shared, cluster; };

namespace emulator __attribute__((visibility("hidden"))) {

[[noreturn]] void fail(const std::string& what);

// Of a warp, a block or a cluster. Nobody may leave before the last barrier, so all pass the same number of them.
struct Barrier {
  const char* what;
  int members;
  uint32_t phase = 0;
  int arrived = 0, left = 0, line = 0;

  void wait(int at) {
    if (left) fail(std::string("waits in ") + what + ", but a thread that belongs to it has ended");
    if (arrived && line != at)
      fail(std::string("waits in ") + what + " at line " + std::to_string(at) + ", others at " + std::to_string(line));
    line = at;
    const uint32_t before = phase & 1;
    if (++arrived < members) return scheduler.wait({&phase, before, what, at});
    arrived = 0;
    ++phase;
  }
  void leave() {
    if (arrived) fail(std::string("ends while others wait in ") + what + " at line " + std::to_string(line));
    ++left;
  }
};

struct Warp {
  Barrier barrier{"a warp's shuffle or barrier", 32};
  alignas(16) char slots[2][32][16];  // by turns, so that one barrier is enough
};

struct Transactions {  // an mbarrier of one arrival
  uint32_t phase = 0;
  bool arrived = false;
  int64_t bytes = 0;
  void update(int64_t more) {
    bytes += more;
    if (!arrived || bytes) return;
    arrived = false;
    ++phase;
  }
};

constexpr int GUARD = 1024;  // bytes before and after the shared memory of a block
constexpr uint64_t INITIALISED = 0x6d62617272696572;

struct Block {
  int index, rank;
  char* memory;
  Barrier barrier;
  std::vector<Warp> warps;
  std::map<const uint64_t*, Transactions> transactions;
  bool started = false;
};
struct Thread { int index; Block* block; };
struct Copy { Block* block; void* to; const void* from; uint32_t bytes; uint64_t* barrier; };
struct alignas(128) Line { char bytes[128]; };

struct Cluster {
  Shape shape;
  std::vector<Line> arena;
  std::vector<Block> blocks;
  std::vector<Thread> threads;
  std::vector<Copy> copies;  // in flight
  Barrier barrier;

  bool owns(const void* p) const {
    return p >= arena.data() && p < arena.data() + arena.size();
  }
};
inline Cluster cluster;
inline std::mutex one_at_a_time;
struct Prepared { int shared = 48 << 10; bool wide = false; };
inline std::map<void*, Prepared> prepared;

inline Thread& here() { return cluster.threads[scheduler.current]; }
inline Warp& here_warp() { return here().block->warps[here().index / 32]; }

inline void fail(const std::string& what) {
  if (scheduler.current < 0) throw std::runtime_error(what);
  throw std::runtime_error("block " + std::to_string(here().block->index) + " thread " + std::to_string(here().index) +
                           ": " + what);
}
inline void aligned(const void* p, size_t to, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % to) fail(std::string(what) + ": the address is not aligned");
}
inline void global16(const void* p, const char* what) {
  aligned(p, 16, what);
  if (cluster.owns(p)) fail(std::string(what) + ": shared memory where global memory is meant");
}
inline void own(const void* p, size_t bytes, const char* what) {
  const std::ptrdiff_t at = static_cast<const char*>(p) - here().block->memory;
  if (at < 0 || at + std::ptrdiff_t(bytes) > cluster.shape.shared)
    fail(std::string(what) + ": not within the shared memory of this block");
}

// What no kernel has written is NaN in every format: poison within the shared memory, guards around it.
constexpr char POISON = char(0xff);
inline char guard(const char* at) { return reinterpret_cast<uintptr_t>(at) % 2 ? 0x7f : char(0xfd); }
inline void paint(char* from) { std::for_each(from, from + GUARD, [](char& x) { x = guard(&x); }); }
inline bool intact(const char* from) {
  return std::all_of(from, from + GUARD, [](const char& x) { return x == guard(&x); });
}

inline Transactions& transactions(uint64_t* barrier, const char* what) {
  own(barrier, 8, what);
  const auto found = here().block->transactions.find(barrier);
  if (found == here().block->transactions.end()) fail(std::string(what) + ": the mbarrier is not initialised");
  if (*barrier != INITIALISED) fail(std::string(what) + ": the mbarrier has been overwritten");
  return found->second;
}

inline void land(size_t i) {
  const Copy c = cluster.copies[i];
  cluster.copies.erase(cluster.copies.begin() + std::ptrdiff_t(i));
  std::memcpy(c.to, c.from, c.bytes);
  Transactions& t = c.block->transactions.at(c.barrier);
  if (t.bytes < c.bytes) fail("bulk_copy(): more bytes arrive than its mbarrier expects");
  t.update(-int64_t(c.bytes));
}
inline bool land_some(bool stuck) {
  if (cluster.copies.empty() || !(stuck || scheduler.one_in(4))) return false;
  land(scheduler.pick(unsigned(cluster.copies.size())));
  return true;
}

inline void leave() {
  Block& b = *here().block;
  b.warps[here().index / 32].barrier.leave();
  b.barrier.leave();
  cluster.barrier.leave();
  if (b.barrier.left < b.barrier.members) return;
  if (!intact(b.memory - GUARD)) fail("this block or a neighbour has written before the start of its shared memory");
  if (!intact(b.memory + cluster.shape.shared)) fail("this block has written beyond the end of its shared memory");
  for (const Copy& c : cluster.copies)
    if (c.block == &b) fail("the block ends before its bulk copies have landed");
}

inline void run_cluster(int index, const std::function<void()>& kernel) {
  const Shape& z = cluster.shape;
  const size_t stride = (z.shared + GUARD + 127) / 128 + GUARD / 128;
  cluster.arena.resize(stride * z.cluster + GUARD / 128);
  cluster.blocks.clear();
  cluster.copies.clear();
  cluster.threads.clear();
  cluster.barrier = {"cluster_sync()", z.cluster * z.threads};
  for (int rank = 0; rank < z.cluster; ++rank) {
    char* memory = cluster.arena[stride * rank].bytes + GUARD;
    paint(memory - GUARD);
    paint(memory + z.shared);
    std::memset(memory, POISON, z.shared);
    cluster.blocks.push_back({index * z.cluster + rank, rank, memory, {"sync()", z.threads}, {}, {}});
    cluster.blocks.back().warps.resize(z.threads / 32);
  }
  for (Block& b : cluster.blocks)
    for (int i = 0; i < z.threads; ++i) cluster.threads.push_back({i, &b});
  const auto body = [&](int i) {
    cluster.threads[i].block->started = true;
    kernel();
    leave();
  };
  scheduler.run(z.cluster * z.threads, body, land_some);
}

constexpr int INVALID_VALUE = 1, INVALID_SHAPE = 9, LAUNCH_FAILED = 719;  // as CUDA numbers them

inline int refused(void* kernel, const Shape& z) {
  const std::lock_guard lock(one_at_a_time);
  const Prepared p = prepared[kernel];
  if (z.cluster < 1 || z.cluster > (p.wide ? 16 : 8) || (z.cluster > 1 && device().major < 9)) return INVALID_SHAPE;
  if (z.blocks < 1 || z.blocks % z.cluster) return INVALID_SHAPE;
  if (z.threads < 32 || z.threads > 1024 || z.threads % 32) return INVALID_SHAPE;
  return z.shared < 0 || z.shared > std::min(p.shared, device().shared) ? INVALID_VALUE : 0;
}
inline int prepare(void* kernel, int shared, bool wide) {
  const std::lock_guard lock(one_at_a_time);
  if (shared < 0 || shared > device().shared) return INVALID_VALUE;
  Prepared& p = prepared[kernel];
  p.shared = std::max(shared, Prepared{}.shared);
  p.wide |= wide;
  return 0;
}
inline int run(void* kernel, const Shape& z, const std::function<void()>& thread) {
  if (const int code = refused(kernel, z)) return code;
  const std::lock_guard lock(one_at_a_time);
  try {
    cluster.shape = z;
    kd_emulator_widest = std::max(kd_emulator_widest, z.cluster);
    scheduler.seed(kd_emulator_seed);
    for (int i : scheduler.ordered(z.blocks / z.cluster)) run_cluster(i, thread);
    return 0;
  } catch (const std::exception& e) {
    std::strncpy(kd_emulator_error, e.what(), sizeof kd_emulator_error - 1);
    if (kd_emulator_throws) throw;
    return LAUNCH_FAILED;
  }
}

}  // namespace emulator
}  // namespace kd::gpu
