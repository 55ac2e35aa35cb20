// Fibers, one for each CUDA thread, that one operating system thread resumes in rounds.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

// swapcontext() makes a system call at every switch, and a test makes millions; it is for the other processors.
#if !(defined(__x86_64__) && defined(__linux__)) || defined(KD_EMULATOR_UCONTEXT)
#include <ucontext.h>
#else
#define KD_EMULATOR_ASSEMBLY 1
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

extern "C" {
// 0: in order, copies land as late as they may. 1: in reverse, copies land at once. From 2: all of it at random.
[[gnu::weak]] int kd_emulator_seed = 0;
}

namespace kd::gpu {
// Hidden: two libraries in one process, perhaps compiled differently, must not share a scheduler.
namespace emulator __attribute__((visibility("hidden"))) {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t STACK = 256 << 10;
#else
constexpr size_t STACK = 64 << 10;
#endif

struct Context {
#ifdef KD_EMULATOR_ASSEMBLY
  void* top = nullptr;
#else
  ucontext_t saved;
#endif
  const void* bottom = nullptr;  // of the stack, with its size; these three are for the address sanitizer
  size_t size = 0;
  void* frames = nullptr;
};

#ifdef KD_EMULATOR_ASSEMBLY
// noipa: the compiler must not conclude from the empty body which registers survive.
[[gnu::naked, gnu::noinline, gnu::noipa]] inline void change_stack(void** /*save*/, void* /*load*/) {
  asm("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
      "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret");
}
#endif

inline void change([[maybe_unused]] Context& from, Context& to, [[maybe_unused]] bool for_good = false) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.frames, to.bottom, to.size);
#endif
#ifdef KD_EMULATOR_ASSEMBLY
  change_stack(&from.top, to.top);
#else
  swapcontext(&from.saved, &to.saved);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.frames, nullptr, nullptr);
#endif
}

// Address space for as many stacks as were ever needed at once; only the pages that are touched take memory.
class Stacks {
  char* base = nullptr;
  size_t count = 0;

 public:
  char* operator[](size_t i) const { return base + i * STACK; }
  void reserve(size_t n) {
    if (n <= count) return;
    if (base) munmap(base, count * STACK);
    count = 0;
    void* p = mmap(nullptr, n * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    base = p == MAP_FAILED ? nullptr : static_cast<char*>(p);
    if (!base) throw std::runtime_error("no address space for the fibers' stacks");
#ifdef MADV_NOHUGEPAGE
    madvise(p, n * STACK, MADV_NOHUGEPAGE);
#endif
    count = n;
  }
};

// A fiber waits while the phase that it points to has this parity.
struct Wait {
  const uint32_t* phase = nullptr;
  uint32_t parity = 0;
  const char* what = "";
  int line = 0;
  bool over() const { return !phase || (*phase & 1) != parity; }
};

class Scheduler {
  struct Fiber {
    Context context;
    Wait wait;
    bool ended = false;
  };
  Stacks stacks;
  std::vector<Fiber> fibers;
  Context outside;
  std::function<void(int)> body;
  std::exception_ptr error;
  std::mt19937 random;
  int mode = 0;

  static void enter();
  // Stacks come zeroed, and a fiber that gets this far has most likely gone further.
  uint64_t& last_word(int i) const { return *reinterpret_cast<uint64_t*>(stacks[i]); }
  void start(int i) {
    Fiber& f = fibers[i];
    f = Fiber{};
    f.context.bottom = stacks[i];
    f.context.size = STACK;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stacks[i], STACK);  // frames of a fiber that was abandoned after an error
#endif
    if (last_word(i)) last_word(i) = 0;  // writing to it would make its page take memory
#ifdef KD_EMULATOR_ASSEMBLY
    // Six registers, where `ret` goes, and a return address that ends the chain of frames.
    void** top = reinterpret_cast<void**>(stacks[i] + STACK) - 8;
    std::fill_n(top, 8, nullptr);
    top[6] = reinterpret_cast<void*>(&enter);
    f.context.top = top;
#else
    getcontext(&f.context.saved);
    f.context.saved.uc_stack.ss_sp = stacks[i];
    f.context.saved.uc_stack.ss_size = STACK;
    f.context.saved.uc_link = nullptr;
    makecontext(&f.context.saved, &enter, 0);
#endif
  }
  void resume(int i) {
    current = i;
    change(outside, fibers[i].context);
    current = -1;
    if (error) std::rethrow_exception(std::exchange(error, nullptr));
    if (fibers[i].ended && last_word(i)) throw std::runtime_error("a fiber has overflowed its stack");
  }
  [[noreturn]] void deadlock(const std::vector<int>& order) const {
    std::map<std::string, int> waiting;
    for (int i : order) {
      const Wait& w = fibers[i].wait;
      ++waiting[w.what + (w.line ? " at line " + std::to_string(w.line) : "")];
    }
    std::string text = "deadlock:";
    for (const auto& [where, n] : waiting) text += " " + std::to_string(n) + " threads wait in " + where + ";";
    text.pop_back();
    throw std::runtime_error(text);
  }

 public:
  int current = -1;  // the fiber that runs

  void seed(int x) {
    mode = std::clamp(x, 0, 2);
    random.seed(x);
    error = nullptr;
  }
  bool eager() const { return mode == 1; }
  unsigned pick(unsigned n) { return mode == 2 ? random() % n : 0; }
  bool one_in(unsigned n) { return mode == 2 && random() % n == 0; }
  std::vector<int> ordered(int n) {
    std::vector<int> order(n);
    std::iota(order.begin(), order.end(), 0);
    if (mode == 1) std::reverse(order.begin(), order.end());
    if (mode == 2) std::shuffle(order.begin(), order.end(), random);
    return order;
  }

  void wait(const Wait& w) {
    Fiber& f = fibers[current];
    f.wait = w;
    change(f.context, outside);
    f.wait = {};
  }
  // Where other threads may come in between on a GPU, at times they do.
  void interrupt() {
    if (one_in(16)) wait({});
  }

  // Runs body(0) ... body(n - 1) to their ends. meanwhile(stuck) is called between the rounds and says whether it
  // did something; with `stuck` all fibers wait, and if nothing can be done either, that is a deadlock.
  void run(int n, std::function<void(int)> what, const std::function<bool(bool)>& meanwhile) {
    body = std::move(what);
    stacks.reserve(n);
    fibers.resize(std::max<size_t>(n, fibers.size()));
    for (int i = 0; i < n; ++i) start(i);
    // At random, a fiber may miss a round, and a warp many: some races show only if one is several steps behind.
    std::vector<char> asleep((n + 31) / 32);
    for (std::vector<int> order = ordered(n); !order.empty();) {
      for (size_t g = 0; g < asleep.size(); ++g) asleep[g] = asleep[g] != one_in(32);
      bool progress = meanwhile(false), ran = false;
      for (int i : order) {
        if (!fibers[i].wait.over()) continue;
        progress = true;
        if (asleep[i / 32] || one_in(8)) continue;
        ran = true;
        resume(i);
      }
      if (!ran) asleep.assign(asleep.size(), false);
      if (!progress && !meanwhile(true)) deadlock(order);
      std::erase_if(order, [&](int i) { return fibers[i].ended; });
      if (mode == 2) std::shuffle(order.begin(), order.end(), random);
    }
  }
};
inline Scheduler scheduler;

inline void Scheduler::enter() {
  Scheduler& s = scheduler;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &s.outside.bottom, &s.outside.size);
#endif
  const int i = s.current;
  try {
    s.body(i);
  } catch (...) {
    s.error = std::current_exception();
  }
  s.fibers[i].ended = true;
  change(s.fibers[i].context, s.outside, true);
}

}  // namespace emulator
}  // namespace kd::gpu
