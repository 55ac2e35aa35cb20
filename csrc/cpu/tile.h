// A batch of logits in memory, and one tile of a row of it.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "tiles.h"

namespace kd {

// Logits (A, B, W) with unit stride along W; row n is (n / B, n % B).
struct Logits {
  const char* data = nullptr;
  Type type = Type::f32;
  int64_t inner = 1, stride0 = 0, stride1 = 0;
  int size() const { return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2; }
  const char* row(int64_t n) const { return data + size() * ((n / inner) * stride0 + (n % inner) * stride1); }
};

struct Batch {
  Logits s, t;
  const int64_t* labels = nullptr;
  const bool* mask = nullptr;
  int64_t rows = 0, vocab = 0, ignore = -100;
  bool kept(int64_t n) const { return !labels || labels[n] != ignore; }
};

template <typename R> class Tile {
 public:
  View<R> view{};
  R s_max = 0, t_max = 0;  // over the finite entries; -inf if there is none
  bool special = false;    // there are special entries
  alignas(64) R scratch[2 * kTile];

  // Classes [first, first + count) of row n, where they are in memory.
  void find(const Batch& x, int64_t row, int64_t first, int count) {
    view.n = count;
    view.s_next = x.s.row(row) + (first + count) * (view.s_bytes = x.s.size());
    view.t_next = x.t.data ? x.t.row(row) + (first + count) * (view.t_bytes = x.t.size()) : view.s_next;
  }

  // Whether kernels can read the logits where they are; and then the maxima there, or false if there is anything special.
  static bool can_stay(const Batch& x) {
    const bool type = x.s.type == own_type() || (sizeof(R) == 4 && x.s.type == Type::bf16);
    return type && !x.mask && (!x.t.data || x.t.type == x.s.type);
  }
  bool look(const Tiles<R>& isa, const Batch& x, int64_t row, int64_t first, int count, R* s, R* t) {
    find(x, row, first, count);
    if (isa.look(x.s.type, view.s_next - count * view.s_bytes, count, s)) return false;
    return !x.t.data || !isa.look(x.t.type, view.t_next - count * view.t_bytes, count, t);
  }

  // The same, loaded. What needs no conversion is read where it is.
  // `look` for special entries and the maxima, or take it that there are none and nobody wants them.
  void load(const Tiles<R>& isa, const Batch& x, int64_t row, int64_t first, int count, bool look = true) {
    const bool teacher = x.t.data;
    find(x, row, first, count);
    special = false;
    t_max = 0;
    view.s = fetch(isa, x.s, row, first, x.mask, look, u_, &s_max);
    view.t = teacher ? fetch(isa, x.t, row, first, x.mask, look, v_, &t_max) : v_;
    if (!teacher && zeros_ < count) { std::fill(v_, v_ + kTile, R(0)); zeros_ = kTile; }
    if (teacher) zeros_ = 0;
    const R dead = -std::numeric_limits<R>::infinity();
    if (x.mask) {
      for (int i = 0; i < count; ++i)
        if (!x.mask[first + i]) { u_[i] = dead; if (teacher) v_[i] = dead; }
      special = isa.peak(u_, count, &s_max);
      if (teacher) special |= isa.peak(v_, count, &t_max);
    }
    if (special && !teacher) {
      for (int i = 0; i < count; ++i) v_[i] = view.s[i] == dead ? dead : R(0);
      zeros_ = 0;
    }
  }

  // f(view, its first class) of the tile, or of the two parts around class i if it is to be left out and there.
  template <typename F> void parts(int64_t i, F f) const {
    if (i < 0 || i >= view.n) return f(view, 0);
    for (const auto& [from, n] : {std::pair{0, int(i)}, std::pair{int(i) + 1, view.n - int(i) - 1}}) {
      if (n == 0) continue;
      View<R> part = view;
      part.s += from; part.t += from; part.n = n;
      part.s_next += from * view.s_bytes; part.t_next += from * view.t_bytes;
      f(part, from);
    }
  }

 private:
  static constexpr Type own_type() { return sizeof(R) == 4 ? Type::f32 : Type::f64; }
  const R* fetch(const Tiles<R>& isa, const Logits& x, int64_t row, int64_t first, bool to_change, bool look, R* copy,
                 R* max) {
    const char* at = x.row(row) + x.size() * first;
    if (x.type == own_type() && !to_change && uintptr_t(at) % sizeof(R) == 0) {
      const R* here = reinterpret_cast<const R*>(at);
      special |= look && isa.peak(here, view.n, max);
      return here;
    }
    special |= isa.widen(x.type, at, view.n, copy, max);
    return copy;
  }
  alignas(64) R u_[kTile], v_[kTile];
  int zeros_ = 0;
};

}  // namespace kd
