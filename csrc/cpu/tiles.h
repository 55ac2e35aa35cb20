// Vector kernels on one tile of a row: the table that each instruction set fills in (tiles.inl).
#pragma once
#include <cstdint>

#include "../softrank.h"

namespace kd {

constexpr double kLog2e = 1.4426950408889634;
constexpr int kTile = 2048;  // both logits and the gradient of a tile stay in L1
enum class Type { f64, f32, f16, bf16 };

// In units of log 2, what an exponent may be a difference of: in float, and of a mixture, whose terms are added in double.
constexpr double kFar = 50, kFarMixed = 1000;
constexpr float kHuge = 1e6f;  // beyond it, -inf included, an entry is special: what is a mask cancels with nothing

// A tile of logits; u = s - s_pivot and v = t - t_pivot are what the kernels work on. Src: what is in memory.
template <typename R, typename Src = R> struct View {
  const Src *s, *t;
  int n;
  R s_pivot, t_pivot;
  // The tile after this one, in memory, to be fetched meanwhile; bytes an entry.
  const char *s_next, *t_next;
  int s_bytes, t_bytes;
};
// The exponent b u + a v + c in units of log 2. Dead where both logits are -inf; a zero coefficient ignores its logit.
struct Exponent { double b, a, c; };
template <typename R> struct TileSums { double z, s, t, ss, st, tt; };

// What a separable loss does at every class: see kdkernels/elements.py.
struct Elements {
  const double* data;
  int length() const { return int(data[0]); }
  int early() const { return int(data[1]); }
  int scratch() const { return int(data[2]); }
  int constants() const { return int(data[3]); }
  int output(int k) const { return int(data[4 + k]); }
  double constant(int i) const { return data[7 + i]; }
  const double* line(int i) const { return data + 7 + constants() + 5 * i; }
  bool valid(int numbers) const { return numbers >= 7 && numbers == 7 + constants() + 5 * length(); }
};
constexpr int kStretch = 512;  // classes an instruction runs over
struct LogWeights { double b, log_q, a, log_p; };  // log q_i = b u + log_q, log p_i = a v + log_p
// Of phi, of its slopes in log q and log p, and of those times log q and log p.
struct ElementSums {
  double total, q, p, xq, xp;
  void add(const ElementSums& o) { total += o.total; q += o.q; p += o.p; xq += o.xq; xp += o.xp; }
};

// A row's log q_i = (x_i - top) scale + lam.
struct Share {
  double scale, top, lam;
  double operator()(double x) const { return (x - top) * scale + lam; }
};
// What the slope of a loss over the rows is at each class, as a function of deviations (see columns.cpp).
template <typename R> struct ClassTerms { const R *u, *v, *constant, *mean; };
struct Products { double uu, uv, vv; };
// Loops over the classes of one row, or of a tile of it.
template <typename R> struct Columns {
  // top_i = the largest log q_i so far
  void (*highest)(const R* x, int n, const Share&, double* top);
  // e = exp(log q - pivot), of classes with a pivot each or (null) without
  void (*shares)(const R* x, int n, const Share&, const double* pivot, R* e);
  // u = factor e - 1 = exp(log q - mean) - 1, which may be e; one factor for all where there are no means
  void (*deviations)(const R* x, int n, const Share&, const double* mean, const R* factor, const R* e, R* u);
  void (*add_up)(const R* e, int n, double* sums);
  void (*products)(const R* u, const R* v, int n, int step, double* sums);
  double (*slope_sum)(const R* u, const R* v, int n, const ClassTerms<R>&);
  void (*slopes)(const R* e, const R* v, int n, const ClassTerms<R>&, double all, double g, R* u);
  // e = the lesser of exp(log q) of x and exp(log p) of y
  void (*lesser)(const R* x, const Share& q, const R* y, const Share& p, int n, R* e);
  double (*sum)(const R* x, int n);
  Products (*centred)(const R* u, const R* v, int n, double u_mean, double v_mean);
  // d = by_u (u - u_mean) + by_v (v - v_mean), times 1 + u if it is of probabilities
  void (*row_slopes)(const R* u, const R* v, int n, double by_u, double u_mean, double by_v, double v_mean,
                     bool probabilities, R* d);
  double (*apart)(const R* x, const R* y, int n);  // the sum of |x - y|
  void (*signs)(const R* x, const R* y, int n, double g, R* d);  // d += g sign(x - y)
};
struct ShortLine { float slope, offset; };  // of rank losses: rank -> gradient
// M = count bins of LapSum (lapsum.h), and what its loops make of them: R, the soft ranks, and K, the sums of the kernel
// e^(-|x_i - x_j| / a), centred and over n, then lines. Scratch is M + 1 long.
struct Bins {
  int64_t count;
  const double *x, *mass, *ranks;
  double *decay, *R, *K, *below, *above, *slope;
  Line* line;
};
struct MeanVariance { double mean, variance; };
struct BinSums { double own, joint, share; };  // of mass R^2, of R ranks, of mass^2 / K

template <typename R> struct Tiles {
  // A copy of x and, as `peak` does, a look at it.
  bool (*widen)(Type, const void* x, int n, R* out, R* max);
  // `stream`: past the caches, for an output that is larger than they are.
  void (*store)(Type, const R* x, int n, void* out, bool stream);
  // max over the finite entries (-inf if there is none); true if an entry is special
  bool (*peak)(const R* x, int n, R* max);
  // max of the exponent over the live entries
  double (*top)(const View<R>&, const Exponent&);
  // sums of w, w u, w v (and second moments), w = 2^exponent; x: scratch, 2 kTile
  TileSums<R> (*sums)(const View<R>&, const Exponent&, int flags, bool special, R* x);
  // `peak`, and the sums of K single terms, of what is in memory, nothing special and no label left out
  bool (*look)(Type, const void* x, int n, R* max);
  void (*sums_through)(Type, const View<R>&, const Exponent*, const int* flags, int K, TileSums<R>*);
  // out (+)= the gradient's terms at K points (coef: K x kCoefs) times g, labels left aside; `first` overwrites
  void (*spread)(const View<R>&, const double* coef, int K, double g, bool special, bool first, R* x, R* out);
  // the same from memory to memory, nothing special and no label, if types and points allow; else false
  bool (*through)(Type, const View<R>&, const double* coef, int K, double g, bool stream, void* out);
  void (*exp2)(const R* x, int n, R* out);
  // slope * rank + offset, of the line that a's bits and the rank that b's stand for; the places of those that double
  // precision might round to another bfloat16, and how many they are.
  int (*lines)(const uint16_t* a, const uint16_t* b, int n, const ShortLine* line, const int32_t* rank, float* out,
               int32_t* doubtful);
  MeanVariance (*bin_moments)(const Bins&);
  BinSums (*soft_ranks)(const Bins&, double a);
  void (*rank_lines)(const Bins&, const Correlation&, double n, const MeanVariance&, double g);
  // Sums of a tile; what has to do with the slope in log p only if `both`. slope: where that of one side goes, or null.
  ElementSums (*elements)(const View<R>&, const Elements&, const LogWeights&, bool both, int side, R* work, R* slope);
  Columns<R> columns;
};

namespace base { extern const Tiles<float> f32; extern const Tiles<double> f64; }
namespace avx2 { extern const Tiles<float> f32; extern const Tiles<double> f64; }
namespace avx512 { extern const Tiles<float> f32; extern const Tiles<double> f64; }
namespace avx512_bf16 { extern const Tiles<float> f32; extern const Tiles<double> f64; }

}  // namespace kd
