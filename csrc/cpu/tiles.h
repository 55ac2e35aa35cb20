// Vector kernels on one tile of a row: the table that each instruction set fills in (tiles.inl).
#pragma once
#include <cstdint>

namespace kd {

constexpr int kTile = 2048;  // both logits and the gradient of a tile stay in L1
enum class Type { f64, f32, f16, bf16 };

// A tile of logits; u = s - s_pivot and v = t - t_pivot are what the kernels work on.
template <typename R> struct View {
  const R *s, *t;
  int n;
  R s_pivot, t_pivot;
  // The tile after this one, in memory, to be fetched meanwhile; bytes an entry.
  const char *s_next, *t_next;
  int s_bytes, t_bytes;
};
// The exponent b u + a v + c in units of log 2. Dead where both logits are -inf; a zero coefficient ignores its logit.
struct Exponent { double b, a, c; };
template <typename R> struct TileSums { double z, s, t, ss, st, tt; };

template <typename R> struct Tiles {
  void (*widen)(Type, const void* x, int n, R* out);
  // `stream`: past the caches, for an output that is larger than they are.
  void (*store)(Type, const R* x, int n, void* out, bool stream);
  // max over the finite entries (-inf if there is none); true if an entry is -inf
  bool (*peak)(const R* x, int n, R* max);
  // max of the exponent over the live entries
  double (*top)(const View<R>&, const Exponent&);
  // sums of w, w u, w v (and second moments), w = 2^exponent; `special`: the tile has -inf entries; x: scratch, 2 kTile
  TileSums<R> (*sums)(const View<R>&, const Exponent&, int flags, bool special, R* x);
  // out (+)= w (c0 + c1 u + c2 v + c3 u^2 + c4 u v + c5 v^2); `first` overwrites
  void (*spread)(const View<R>&, const Exponent&, const R* c, bool special, bool first, R* x, R* out);
  void (*exp2)(const R* x, int n, R* out);
};

namespace base { extern const Tiles<float> f32; extern const Tiles<double> f64; }
namespace avx2 { extern const Tiles<float> f32; extern const Tiles<double> f64; }
namespace avx512 { extern const Tiles<float> f32; extern const Tiles<double> f64; }

}  // namespace kd
