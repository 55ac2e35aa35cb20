// Order: keys that compare like numbers, a stable sort, mid-ranks and Kendall's tau.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "../softrank.h"

namespace kd {

// Unsigned integers in the order of the numbers, -0 and +0 the same; of 16-bit types in ../softrank.h.
inline uint32_t key_of(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x + 0.f);
  return bits ^ (uint32_t(int32_t(bits) >> 31) | 0x80000000u);
}
inline uint64_t key_of(double x) {
  const uint64_t bits = std::bit_cast<uint64_t>(x + 0.);
  return bits ^ (uint64_t(int64_t(bits) >> 63) | 0x8000000000000000u);
}
template <typename T> using Key = decltype(key_of(T()));

// A row in ascending order, equal numbers in the order they came in.
template <typename R> class Order {
 public:
  // `from`: another order to start from, so that it decides among equals.
  void sort(const R* x, int64_t n, const Order* from = nullptr) {
    entries_.resize(n);
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t at = from ? from->at(i) : uint32_t(i);
      entries_[i] = {key_of(x[at]), at};
    }
    if (n < kFew) {
      std::stable_sort(entries_.begin(), entries_.end(), [](const Entry& a, const Entry& b) { return a.key < b.key; });
    } else {
      radix();
    }
  }
  int64_t size() const { return int64_t(entries_.size()); }
  uint32_t at(int64_t i) const { return entries_[i].at; }
  // f(first, end) of every run of equal numbers, in ascending order.
  template <typename F> void runs(F f) const {
    for (int64_t first = 0, end; first < size(); first = end) {
      for (end = first + 1; end < size() && entries_[end].key == entries_[first].key; ++end) {}
      f(first, end);
    }
  }
  bool same(int64_t i, int64_t j) const { return entries_[i].key == entries_[j].key; }

 private:
  struct Entry { Key<R> key; uint32_t at; };
  static constexpr int kBits = 11, kDigits = (8 * sizeof(Key<R>) + kBits - 1) / kBits;
  static constexpr int64_t kFew = 128;

  void radix() {
    const int64_t n = size();
    other_.resize(n);
    counts_.assign(kDigits << kBits, 0);
    constexpr Key<R> low = (1 << kBits) - 1;
    for (const Entry& e : entries_)
      for (int d = 0; d < kDigits; ++d) ++counts_[(d << kBits) + ((e.key >> (d * kBits)) & low)];
    for (int d = 0; d < kDigits; ++d) {
      uint32_t* count = counts_.data() + (d << kBits);
      const int shift = d * kBits;
      if (count[(entries_[0].key >> shift) & low] == n) continue;  // all alike in this digit
      uint32_t sum = 0;
      for (int k = 0; k < 1 << kBits; ++k) { const uint32_t c = count[k]; count[k] = sum; sum += c; }
      for (const Entry& e : entries_) other_[count[(e.key >> shift) & low]++] = e;
      entries_.swap(other_);
    }
  }
  std::vector<Entry> entries_, other_;
  std::vector<uint32_t> counts_;
};

// Mid-ranks, doubled and centred: twice the rank (ties averaged) of each entry minus n + 1, an integer. Their sum is 0.
// Returns the sum of their squares: an integer, exact in int64 for n <= 2^20.
template <typename R, typename T> int64_t centred_ranks(const Order<R>& order, T* rank) {
  int64_t squares = 0;
  order.runs([&](int64_t first, int64_t end) {
    const int64_t r = first + end - order.size();
    squares += (end - first) * r * r;
    for (int64_t i = first; i < end; ++i) rank[order.at(i)] = T(r);
  });
  return squares;
}

// Pairs in which an earlier number is larger, of a sequence of numbers below `values`. Counts in a Fenwick tree.
inline int64_t inversions(const uint32_t* x, int64_t n, int64_t values, std::vector<uint32_t>& tree) {
  tree.assign(values + 1, 0);
  int64_t found = 0;
  for (int64_t i = 0; i < n; ++i) {
    int64_t no_larger = 0;
    for (uint32_t k = x[i] + 1; k; k &= k - 1) no_larger += tree[k];
    found += i - no_larger;
    for (uint32_t k = x[i] + 1; k <= values; k += k & -k) ++tree[k];
  }
  return found;
}

template <typename R> struct KendallScratch {
  Order<R> s, t;
  std::vector<uint32_t> dense, sequence, tree;
};

// Kendall's tau-b of two rows by Knight's method: sort by t, equal ones by s, and count the inversions of s.
template <typename R> double kendall_tau_b(const R* s, const R* t, int64_t n, KendallScratch<R>& w) {
  w.dense.resize(n);
  w.sequence.resize(n);
  w.s.sort(s, n);
  int64_t distinct = 0, ties_s = 0, ties_t = 0, ties_both = 0;
  const auto pairs = [](int64_t c) { return c * (c - 1) / 2; };
  w.s.runs([&](int64_t first, int64_t end) {
    ties_s += pairs(end - first);
    for (int64_t i = first; i < end; ++i) w.dense[w.s.at(i)] = uint32_t(distinct);
    ++distinct;
  });
  w.t.sort(t, n, &w.s);
  for (int64_t i = 0; i < n; ++i) w.sequence[i] = w.dense[w.t.at(i)];
  w.t.runs([&](int64_t first, int64_t end) {
    ties_t += pairs(end - first);
    for (int64_t i = first, j; i < end; i = j) {
      for (j = i + 1; j < end && w.sequence[j] == w.sequence[i]; ++j) {}
      ties_both += pairs(j - i);
    }
  });
  const int64_t all = pairs(n);
  if (ties_s == all || ties_t == all) return std::numeric_limits<double>::quiet_NaN();
  const int64_t discordant = inversions(w.sequence.data(), n, distinct, w.tree);
  const int64_t balance = all - ties_s - ties_t + ties_both - 2 * discordant;
  return std::clamp(double(balance) / std::sqrt(double(all - ties_s)) / std::sqrt(double(all - ties_t)), -1., 1.);
}

}  // namespace kd
