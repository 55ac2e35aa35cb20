// Vector kernels on one tile of a row: the table that each instruction set fills in (tiles.inl).
#pragma once
#include <cstdint>

namespace kd {

constexpr int kTile = 2048;  // u, v and the gradient of a tile stay in L1
enum class Type { f64, f32, f16, bf16 };

// Coefficients of one point, exponents in units of log 2.
template <typename R> struct TilePoint { double b, a, lam; R c[6]; };
template <typename R> struct TileSums { double z, s, t, ss, st, tt; };

template <typename R> struct Tiles {
  // out = x as R
  void (*load)(Type, const void* x, int n, R* out);
  void (*store)(Type, const R* x, int n, void* out);
  // max over the finite entries (0 if there is none); true if an entry is -inf
  bool (*peak)(const R* x, int n, R* max);
  void (*subtract)(R* x, int n, R pivot);
  // max of b u + a v over the live entries
  double (*top)(const R* u, const R* v, int n, double b, double a);
  // sums of w, w u, w v (and second moments) with w = 2^(b u + a v - m); `special`: the tile has -inf entries
  TileSums<R> (*sums)(const R* u, const R* v, int n, double b, double a, double m, int flags, bool special);
  // out += 2^(b u + a v + lam) * polynomial(u, v)
  void (*spread)(const R* u, const R* v, int n, const TilePoint<R>&, bool special, R* out);
};

namespace base { extern const Tiles<float> f32; extern const Tiles<double> f64; }
namespace avx2 { extern const Tiles<float> f32; extern const Tiles<double> f64; }
namespace avx512 { extern const Tiles<float> f32; extern const Tiles<double> f64; }

}  // namespace kd
