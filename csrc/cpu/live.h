// The live classes of a pair of rows, and the way of a gradient back to all of them.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "order.h"
#include "parallel.h"

namespace kd {

// Numbers as they are kept while a row is ordered: float, double, or the bits of a 16-bit type.
template <typename T> using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline bool is_half(Type type) { return type == Type::f16 || type == Type::bf16; }

template <typename R, typename F, typename D> auto& either(F& narrow, D& wide) {
  if constexpr (sizeof(R) == 4) return narrow;
  else return wide;
}

template <typename R> void widen_all(Type type, const void* x, int64_t n, R* out) {
  const int size = type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2;
  R max;
  for (int64_t i = 0; i < n; i += kTile)
    tiles<R>().widen(type, static_cast<const char*>(x) + i * size, int(std::min<int64_t>(kTile, n - i)), out + i, &max);
}

// Classes [first, first + n) of a row, where they are or in `copy`.
template <typename R> const R* logits_of(const Batch& x, int side, int64_t row, int64_t first, int n, R* copy) {
  const Logits& own = side ? x.t : x.s;
  const char* at = own.row(row) + own.size() * first;
  const bool same = own.type == (sizeof(R) == 4 ? Type::f32 : Type::f64) && uintptr_t(at) % sizeof(R) == 0;
  if (same && !x.mask) return reinterpret_cast<const R*>(at);
  R max;
  tiles<R>().widen(own.type, at, n, copy, &max);
  for (int i = 0; x.mask && i < n; ++i)
    if (!x.mask[first + i]) copy[i] = -std::numeric_limits<R>::infinity();
  return copy;
}

// What is not finite, for numbers and for bits.
struct Special {
  uint16_t infinity;
  explicit Special(Type type) : infinity(type == Type::bf16 ? 0x7f80 : 0x7c00) {}
  bool nan(uint16_t x) const { return (x & 0x7fff) > infinity; }
  bool low(uint16_t x) const { return x == (infinity | 0x8000); }
  bool high(uint16_t x) const { return x == infinity; }
  bool any(uint16_t x) const { return (x & 0x7fff) >= infinity; }
  template <typename R> bool nan(R x) const { return x != x; }
  template <typename R> bool low(R x) const { return x == -std::numeric_limits<R>::infinity(); }
  template <typename R> bool high(R x) const { return x == std::numeric_limits<R>::infinity(); }
  template <typename R> bool any(R x) const { return !(x - x == 0); }
  bool nan_among(const uint16_t* x, int64_t n) const { return largest(x, n) > int16_t(infinity); }
  template <typename R> bool nan_among(const R* x, int64_t n) const {
    int found = 0;
#pragma omp simd reduction(| : found)
    for (int64_t i = 0; i < n; ++i) found |= x[i] != x[i];
    return found;
  }
  bool among(const uint16_t* x, int64_t n) const { return largest(x, n) >= int16_t(infinity); }
  template <typename R> bool among(const R* x, int64_t n) const {
    if (std::isfinite(tiles<R>().columns.sum(x, int(n)))) return false;  // of doubles it can overflow
    return std::any_of(x, x + n, [&](R v) { return any(v); });
  }

 private:
  static int16_t largest(const uint16_t* x, int64_t n) {  // of the bits without their sign
    int16_t most = 0;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < n; ++i) most = std::max(most, int16_t(x[i] & 0x7fff));
    return most;
  }
};

// In the order of the numbers, -0 below 0 or equal to it.
inline int16_t height(uint16_t bits) { return int16_t(bits) ^ int16_t(int16_t(bits) >> 15 & 0x7fff); }
template <typename R> R height(R x) { return x; }

// The live classes of a row: all of them where they are, or copies and the classes they belong to.
template <typename T> struct Pair {
  const T *s, *t;
  int64_t n;
  const uint32_t* at;  // null: entry i is class i
  bool nan;            // the row is spoilt by a NaN or +inf
};

template <typename T> class Live {
 public:
  // Whole rows, whatever they hold.
  Pair<T> everything(const Batch& x, int64_t row) {
    return {whole(x.s, row, x.vocab, s_), whole(x.t, row, x.vocab, t_), x.vocab, nullptr, false};
  }

  // Dead are classes that the mask leaves out and those at -inf in either row (`both`: in both rows).
  // top > 0: of the others only those with the `top` largest teacher logits, the first of equals.
  Pair<T> find(const Batch& x, int64_t row, int64_t top, bool both = false) {
    const T *s = whole(x.s, row, x.vocab, s_), *t = whole(x.t, row, x.vocab, t_);
    const Special of_s(x.s.type), of_t(x.t.type);
    const bool all = !x.mask && !of_s.among(s, x.vocab) && !of_t.among(t, x.vocab);
    if (all && (top <= 0 || top >= x.vocab)) return {s, t, x.vocab, nullptr, false};
    at_.clear();
    at_.reserve(1);  // never null
    for (int64_t i = 0; i < x.vocab && !all; ++i) {
      if (x.mask && !x.mask[i]) continue;
      if (of_s.nan(s[i]) || of_t.nan(t[i]) || of_s.high(s[i]) || of_t.high(t[i])) return {s, t, 0, nullptr, true};
      const bool low_s = of_s.low(s[i]), low_t = of_t.low(t[i]);
      if (!(both ? low_s && low_t : low_s || low_t)) at_.push_back(uint32_t(i));
    }
    if (!all) gather(t, live_t_);
    if (all) keep_largest(t, x.vocab, top);
    else if (top > 0 && top < int64_t(at_.size())) keep_largest(live_t_.data(), int64_t(at_.size()), top);
    gather(s, live_s_);
    gather(t, live_t_);
    const int64_t n = int64_t(at_.size());
    return {live_s_.data(), live_t_.data(), n, at_.data(), false};
  }

 private:
  // The row in place where it is of type T already, else a wider copy.
  static const T* whole(const Logits& x, int64_t row, int64_t n, std::vector<T>& copy) {
    const char* from = x.row(row);
    const bool same = sizeof(T) == 2 || x.type == (sizeof(T) == 4 ? Type::f32 : Type::f64);
    if (same && uintptr_t(from) % sizeof(T) == 0) return reinterpret_cast<const T*>(from);
    copy.resize(n);
    if constexpr (sizeof(T) == 2) std::copy_n(from, n * 2, reinterpret_cast<char*>(copy.data()));
    else widen_all(x.type, from, n, copy.data());
    return copy.data();
  }

  void gather(const T* x, std::vector<T>& to) {
    to.resize(at_.size());
    for (size_t i = 0; i < at_.size(); ++i) to[i] = x[at_[i]];
  }

  // at_ becomes the `top` of its classes (of all, if it has none) whose logits in t (n) are largest.
  void keep_largest(const T* t, int64_t n, int64_t top) {
    const auto least = reached(t, n, top);
    kept_.clear();
    for (int64_t first = 0; first < n; first += kGroup) {
      const int64_t end = std::min(first + kGroup, n);
      int some = 0;
#pragma omp simd reduction(| : some)
      for (int64_t i = first; i < end; ++i) some |= height(t[i]) >= least;
      for (int64_t i = first; some && i < end; ++i)
        if (height(t[i]) >= least) kept_.push_back(uint32_t(i));
    }
    const auto before = [&](uint32_t a, uint32_t b) {
      return key_of(t[a]) != key_of(t[b]) ? key_of(t[a]) > key_of(t[b]) : a < b;
    };
    std::nth_element(kept_.begin(), kept_.begin() + (top - 1), kept_.end(), before);
    kept_.resize(top);
    std::sort(kept_.begin(), kept_.end());
    for (uint32_t& i : kept_) i = at_.empty() ? i : at_[i];
    at_.swap(kept_);
  }

  // A number that at least `top` of the entries reach: of so many groups each has one that does.
  static constexpr int64_t kGroup = 64, kSpare = 8;
  auto reached(const T* t, int64_t n, int64_t top) {
    using H = decltype(height(T()));
    const int64_t groups = std::min(kSpare * top, n / 2);
    if (groups < top) return std::numeric_limits<H>::lowest();
    highest_.resize(groups);
    H* high = highest_.data();
    for (int64_t i = 0; i < groups; ++i) high[i] = height(t[i]);
    for (int64_t first = groups; first < n; first += groups) {
      const int64_t count = std::min(groups, n - first);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) high[i] = std::max(high[i], height(t[first + i]));
    }
    std::nth_element(high, high + (top - 1), high + groups, std::greater<H>());
    const H least = high[top - 1];
    return sizeof(H) == 2 && least == 0 ? H(-1) : least;  // -0 is as large
  }

  std::vector<T> s_, t_, live_s_, live_t_;
  std::vector<uint32_t> at_, kept_;
  std::vector<decltype(height(T()))> highest_;
};

// Where a row's gradient goes: classes [0, vocab) of `width`, the rest is padding.
struct RowOut {
  const Gradient* to;  // null: nobody wants one
  Type type;
  int64_t row, vocab, width;
  const char* base = nullptr;  // a row of the same type that it is added to, which may be where it goes

  RowOut none() const { return {nullptr, type, row, vocab, width}; }

  // slope(i) of entry i, 0 elsewhere.
  template <typename R, typename T, typename F> void write(const Pair<T>& z, std::vector<R>& whole, F slope) const {
    if (!z.at) return put<R>([&](int64_t i) { return R(slope(i)); });
    if ((in_place() || !base) && z.n * kFew < vocab) {
      if (!base) fill(0);
      for (int64_t i = 0; i < z.n; ++i) {
        R d = R(slope(i));
        put_some(&d, z.at[i], 1, 1);
      }
      return;
    }
    whole.assign(vocab, R(0));
    for (int64_t i = 0; i < z.n; ++i) whole[z.at[i]] = R(slope(i));
    put<R>([&](int64_t i) { return whole[i]; });
  }
  // fill(first, count, d) of tiles of a row without dead classes.
  template <typename R, typename F> void put_tiles(F fill) const {
    alignas(64) R d[kTile];
    for (int64_t first = 0; first < width; first += kTile) {
      const int count = int(std::min<int64_t>(kTile, width - first));
      const int live = int(std::clamp<int64_t>(vocab - first, 0, count));
      fill(first, live, d);
      put_some(d, first, live, count);
    }
  }
  void fill(float x) const {
    if (!in_place() || x != 0) put<float>([&](int64_t) { return x; });
  }

  static constexpr int64_t kFew = 32;  // one of so many classes: each is written by itself

 private:
  char* begin() const { return to->data + row * to->row; }
  bool in_place() const { return base && base == begin(); }

  template <typename R, typename F> void put(F entry) const {
    put_tiles<R>([&](int64_t first, int live, R* d) {
      for (int i = 0; i < live; ++i) d[i] = entry(first + i);
    });
  }
  // d (count), the first `live` of them classes.
  template <typename R> void put_some(R* d, int64_t first, int live, int count) const {
    const int size = type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2;
    if (base && live) {
      alignas(64) R there[kTile];
      R max;
      tiles<R>().widen(type, base + first * size, live, there, &max);
      for (int i = 0; i < live; ++i) d[i] += there[i];
    }
    std::fill(d + live, d + count, R(0));
    tiles<R>().store(type, d, count, begin() + first * size, to->stream);
  }
};

// The one scratch of its kind that a thread keeps from row to row and call to call.
template <typename T> T& kept_by_thread() {
  static thread_local T scratch;
  return scratch;
}

}  // namespace kd
