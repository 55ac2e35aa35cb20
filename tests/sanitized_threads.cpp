// torch's parallel_for on plain threads that ThreadSanitizer follows; preloaded, it takes the place of torch's.
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

extern "C" AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelFunc f, void* context) {
  const int64_t count = std::min<int64_t>(3, (end - begin + std::max<int64_t>(grain, 1) - 1) / std::max<int64_t>(grain, 1));
  std::vector<std::thread> threads;
  std::atomic<bool> failed{false};
  for (int64_t i = 0; i < count; ++i)
    threads.emplace_back([=, &failed] {
      try {
        f(begin + (end - begin) * i / count, begin + (end - begin) * (i + 1) / count, context);
      } catch (...) {
        failed = true;
      }
    });
  for (auto& thread : threads) thread.join();
  return failed ? 1 : 0;
}
