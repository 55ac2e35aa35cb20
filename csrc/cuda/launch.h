// What the operators (ops.cpp, which sees torch) ask of the kernels (which do not). Functions return a CUDA error.
#pragma once
#include "../tape.h"

namespace kd::gpu {

// A program and its arguments travel with the launch. (Parameters may take 32 KB from CUDA 12.1 on.)
constexpr int kNumbers = 2048;
constexpr int64_t kNarrow = 32;  // rows computed in double: with few classes single roundings do not average out
constexpr int kMaxPoints = 6;    // of one sweep
constexpr int kMaxBlocks = 4096;  // of a step
enum class Type { f32, f16, bf16 };
inline int size_of(Type t) { return t == Type::f32 ? 4 : 2; }

// Rows of logits (A, B, W), W dense: row n is (n / inner, n % inner). Strides in elements.
struct Matrix {
  const void* data;
  Type type;
  int64_t inner, outer_stride, inner_stride;
  KD_HD int64_t offset(int64_t n) const {
    if (n < inner) return n * inner_stride;  // a division of 64 bits takes long
    return n / inner * outer_stride + n % inner * inner_stride;
  }
};

struct Problem {
  Matrix s, t;  // a loss without a teacher has the student twice
  const int64_t* labels;
  const uint8_t* mask;
  int64_t rows, vocab, ignore;
  const double* row_args;  // (N, args_stride), or null: the arguments follow the program in `numbers`
  int64_t args_stride;
  int count;  // of the program's numbers
  double numbers[kNumbers];

  KD_HD int points() const { return int(numbers[0]); }
  KD_HD int length() const { return int(numbers[1]); }
  KD_HD bool narrow() const { return vocab <= kNarrow; }
};

// A gradient of `width` classes a row, contiguous: written, or added to what is there.
struct Output {
  void* data;
  int64_t width;
  bool accumulate;
};

// sums and slopes of rows times weight[n * weight_step] / divisor; divisor 0 stands for *kept, the number of kept rows.
struct Factor {
  const double* weight;
  int64_t weight_step;
  double divisor;
  const double* kept;
};

struct ReduceTask { Problem problem; double* stats; };
struct RowsTask { Problem problem; const double* stats; double *registers, *value, *coef; int sides; };
struct SpreadTask { Problem problem; const double *coef, *grad; int64_t grad_step; int side; Output out; };
// What a step adds up to: `parts`, one double of each block, become *sum by the block that is the last to be done.
// begin() clears `done` and *sum, and counts the labels that are not to be ignored.
struct Total { double *parts, *kept; int* done; float* sum; };
struct StepTask { Problem problem; Factor factor; Output out; Total total; };

int reduce(const ReduceTask& task, void* stream);
int rows(const RowsTask& task, void* stream);
int spread(const SpreadTask& task, void* stream);
// form: 0 picks, 1 two sweeps over memory, 2 a cluster of blocks that holds the row.
int step(const StepTask& task, int form, void* stream);
int begin(const int64_t* labels, int64_t rows, int64_t ignore, const Total& total, void* stream);
// x *= *factor, unless it is 1; zeros stay.
int rescale(void* x, Type type, int64_t count, const void* factor, bool wide_factor, void* stream);

}  // namespace kd::gpu
