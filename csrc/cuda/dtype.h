// The kernels of a dtype, compiled in a source file of their own (dispatch.h): whoever sees the definitions compiles them.
#pragma once
#include "launch.h"

namespace kd::gpu {

// Student and teacher of dtype X, or the one named by the operation, and the other of any.
template <typename X> struct Dtype {
  static int reduce(const ReduceTask& task, bool same, void* stream);
  static int step(const StepTask& task, bool same, int form, void* stream);
  static int spread(const SpreadTask& task, bool same, void* stream);
};

}  // namespace kd::gpu
