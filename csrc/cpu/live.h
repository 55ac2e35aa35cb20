// The live classes of a pair of rows, and the way of a gradient back to all of them.
#pragma once
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
  template <typename T> bool nan_among(const T* x, int64_t n) const {
    bool found = false;
    for (int64_t i = 0; i < n; ++i) found |= nan(x[i]);
    return found;
  }
  template <typename T> bool among(const T* x, int64_t n) const {
    bool found = false;
    for (int64_t i = 0; i < n; ++i) found |= any(x[i]);
    return found;
  }
};

// The live classes of a row: all of them where they are, or copies and the classes they belong to.
template <typename T> struct Pair {
  const T *s, *t;
  int64_t n;
  const uint32_t* at;  // null: entry i is class i
  bool nan;            // the row is spoilt by a NaN or +inf
};

template <typename T> class Live {
 public:
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
    if (all) keep_largest(t, top, x.vocab, [](int64_t i) { return uint32_t(i); });
    else if (const int64_t n = at_.size(); top > 0 && top < n) keep_largest(t, top, n, [&](int64_t i) { return at_[i]; });
    const int64_t n = int64_t(at_.size());
    live_s_.resize(n);
    live_t_.resize(n);
    for (int64_t i = 0; i < n; ++i) { live_s_[i] = s[at_[i]]; live_t_[i] = t[at_[i]]; }
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

  // at_ becomes the `top` of the n classes of(0), of(1), ... (ascending) with the largest logits.
  template <typename F> void keep_largest(const T* t, int64_t top, int64_t n, F of) {
    constexpr int shift = 8 * (sizeof(Key<T>) - 2);
    counts_.assign(1 << 16, 0);
    for (int64_t i = 0; i < n; ++i) ++counts_[key_of(t[of(i)]) >> shift];
    int64_t above = 0, bin = 0xffff;
    while (above + counts_[bin] < top) above += counts_[bin--];
    kept_.clear();
    for (int64_t i = 0; i < n; ++i)
      if (int64_t(key_of(t[of(i)]) >> shift) >= bin) kept_.push_back(of(i));
    const auto before = [&](uint32_t a, uint32_t b) {
      return key_of(t[a]) != key_of(t[b]) ? key_of(t[a]) > key_of(t[b]) : a < b;
    };
    std::nth_element(kept_.begin(), kept_.begin() + (top - 1), kept_.end(), before);
    kept_.resize(top);
    std::sort(kept_.begin(), kept_.end());
    at_.swap(kept_);
  }

  std::vector<T> s_, t_, live_s_, live_t_;
  std::vector<uint32_t> at_, kept_, counts_;
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
    if (in_place() && z.n * kFew < vocab) {
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
  void fill(float x) const {
    if (!in_place() || x != 0) put<float>([&](int64_t) { return x; });
  }

  static constexpr int64_t kFew = 32;  // one of so many classes: each is written by itself

 private:
  char* begin() const { return to->data + row * to->row; }
  bool in_place() const { return base && base == begin(); }

  template <typename R, typename F> void put(F entry) const {
    alignas(64) R d[kTile];
    for (int64_t first = 0; first < width; first += kTile) {
      const int count = int(std::min<int64_t>(kTile, width - first));
      const int live = int(std::clamp<int64_t>(vocab - first, 0, count));
      for (int i = 0; i < live; ++i) d[i] = entry(first + i);
      put_some(d, first, live, count);
    }
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
