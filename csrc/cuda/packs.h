// A pair of logit rows in packs of eight classes: 16-byte loads wherever the row's address allows them.
#pragma once
#include "launch.h"
#ifdef KD_EMULATED
#include <emulator/machine.h>
#else
#include "machine.h"
#endif

namespace kd::gpu {

constexpr int kPack = 8;
KD_DEVICE float minus_infinity(float*) { return -INFINITY; }
KD_DEVICE BF16 minus_infinity(BF16*) { return {0xff80}; }
KD_DEVICE F16 minus_infinity(F16*) { return {0xfc00}; }
KD_DEVICE bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// One row from the element that stands at position 0 of pack 0; `wide` where packs are aligned to 16 bytes. The row is in
// global memory or, if kOnChip, in the block's own.
template <typename T, bool kOnChip = false> struct Reader {
  using Element = T;
  static constexpr bool kInShared = kOnChip;
  static constexpr bool kTwoPacks = sizeof(T) == 2;  // at a time: registers hold so much
  struct Raw { Bytes16 part[kPack * sizeof(T) / 16]; };
  const T* base;
  bool wide;

  KD_DEVICE explicit Reader(const T* base) : base(base), wide(aligned(base)) {}
  KD_DEVICE Reader(const Matrix& x, int64_t n, int head) : Reader(row(x, n) - head) {}
  KD_DEVICE static const T* row(const Matrix& x, int64_t n) { return static_cast<const T*>(x.data) + x.offset(n); }
  // Positions before the first class of a row that are needed for aligned packs.
  KD_DEVICE static int head(const Matrix& x, int64_t n) {
    return int(reinterpret_cast<uintptr_t>(row(x, n)) % 16 / sizeof(T));
  }
  KD_DEVICE float at(int64_t position) const { return widen(base[position]); }

  // What is not live is -inf and not read.
  KD_DEVICE Raw fetch(int pack, int live, bool last = false) const {
    Raw raw;
    const T* from = base + int64_t(pack) * kPack;
    if (live == 255 && wide) {
#pragma unroll
      for (int i = 0; i < int(sizeof raw / 16); ++i) {
        const Bytes16* part = reinterpret_cast<const Bytes16*>(from) + i;
        raw.part[i] = kOnChip ? *part : last ? load16_last(part) : load16(part);
      }
    } else {
#pragma unroll
      for (int i = 0; i < int(sizeof raw / 4); ++i) {
        constexpr int n = 4 / sizeof(T);
        uint32_t word = 0;
#pragma unroll
        for (int e = 0; e < n; ++e) {
          const T x = live >> (i * n + e) & 1 ? from[i * n + e] : minus_infinity(static_cast<T*>(nullptr));
          word |= bits(x) << (e * 16);
        }
        raw.part[i / 4].word[i % 4] = word;
      }
    }
    return raw;
  }
  KD_DEVICE static float element(const Raw& raw, int e) {
    constexpr int n = 4 / sizeof(T);
    return from_bits(raw.part[e / n / 4].word[e / n % 4] >> (e % n * 16), static_cast<T*>(nullptr));
  }
  // The largest of packs and a value of the type, in a form that compares for equality: two classes at a time.
  KD_DEVICE static uint32_t top(float x) {
    if constexpr (sizeof(T) == 4) return float_bits(x);
    else return narrow2(x, x, static_cast<T*>(nullptr));
  }
  KD_DEVICE static uint32_t top(const Raw& raw, uint32_t top) {
#pragma unroll
    for (int i = 0; i < int(sizeof raw / 4); ++i) {
      const uint32_t word = raw.part[i / 4].word[i % 4];
      if constexpr (sizeof(T) == 4) top = float_bits(fmaxf(bits_float(top), bits_float(word)));
      else top = max2(top, word, static_cast<T*>(nullptr));
    }
    return top;
  }

 private:
  KD_DEVICE static uint32_t bits(float x) { return float_bits(x); }
  KD_DEVICE static uint32_t bits(BF16 x) { return x.bits; }
  KD_DEVICE static uint32_t bits(F16 x) { return x.bits; }
  KD_DEVICE static float from_bits(uint32_t x, float*) { return bits_float(x); }
  KD_DEVICE static float from_bits(uint32_t x, BF16*) { return widen(BF16{uint16_t(x)}); }
  KD_DEVICE static float from_bits(uint32_t x, F16*) { return widen(F16{uint16_t(x)}); }
};

// Of another dtype than the row beside it: which one is known when it runs.
struct Any {};
template <bool kOnChip> struct Reader<Any, kOnChip> {
  static constexpr bool kInShared = kOnChip, kTwoPacks = false;
  struct Raw { float x[kPack]; };
  const char* base;
  Type type;

  KD_DEVICE Reader(const Matrix& x, int64_t n, int head)
      : base(static_cast<const char*>(x.data) + (x.offset(n) - head) * (x.type == Type::f32 ? 4 : 2)), type(x.type) {}
  KD_DEVICE static int head(const Matrix&, int64_t) { return 0; }
  KD_DEVICE float at(int64_t position) const {
    if (type == Type::f32) return reinterpret_cast<const float*>(base)[position];
    if (type == Type::f16) return widen(reinterpret_cast<const F16*>(base)[position]);
    return widen(reinterpret_cast<const BF16*>(base)[position]);
  }
  KD_DEVICE Raw fetch(int pack, int live, bool = false) const {
    Raw raw;
#pragma unroll
    for (int e = 0; e < kPack; ++e) raw.x[e] = live >> e & 1 ? at(int64_t(pack) * kPack + e) : -INFINITY;
    return raw;
  }
  KD_DEVICE static float element(const Raw& raw, int e) { return raw.x[e]; }
  KD_DEVICE static uint32_t top(float x) { return float_bits(x); }
  KD_DEVICE static uint32_t top(const Raw& raw, uint32_t top) {
#pragma unroll
    for (int e = 0; e < kPack; ++e) top = float_bits(fmaxf(bits_float(top), raw.x[e]));
    return top;
  }
};

// M packs of a row, in registers.
template <typename R, int M> struct Packs {
  static constexpr int kCount = M * kPack;
  typename R::Raw raw[M];
  KD_DEVICE float operator[](int e) const { return R::element(raw[e / kPack], e % kPack); }
  KD_DEVICE float at(int e) const {  // where e is not known when compiling
    float y = (*this)[0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) y = e == i ? (*this)[i] : y;
    return y;
  }
  KD_DEVICE bool above(uint32_t than) const {
    uint32_t top = than;
#pragma unroll
    for (int i = 0; i < M; ++i) top = R::top(raw[i], top);
    return top != than;
  }
};

// Both rows; class i is element (i + head) of the packs. A class that is not live is one of the padding's.
template <typename S, typename T> struct Pair {  // of readers
  S s;
  T t;
  int head, vocab;
  const uint8_t* mask;
  using SReader = S;
  using TReader = T;
  static constexpr bool kOnChip = S::kInShared;
  static constexpr int kAtOnce = S::kTwoPacks && T::kTwoPacks ? 2 : 1;

  KD_DEVICE int packs() const { return int((vocab + head + kPack - 1) / kPack); }
  KD_DEVICE int first_class(int pack) const { return pack * kPack - head; }
  KD_DEVICE int live(int pack) const {
    const int first = first_class(pack);
    if (first >= 0 && first + kPack <= vocab && !mask) return 255;
    int bits = 0;
    for (int e = 0; e < kPack; ++e)
      if (first + e >= 0 && first + e < vocab && (!mask || mask[first + e])) bits |= 1 << e;
    return bits;
  }
  // Of packs [first, end) the part [from, to) that is live throughout.
  KD_DEVICE void whole(int first, int end, int* from, int* to) const {
    const int begin = head ? 1 : 0, last = (vocab + head) / kPack;
    *from = first > begin ? first : begin;
    *to = end < last ? end : last;
    if (mask || *to < *from) *to = *from = mask ? first : *from < end ? *from : end;
  }
  // f(pack, x, y) of M packs at a time, the first at `pack` and others `step` apart, while all(pack) says that all of
  // them are live throughout; the first that is left. Memory is asked M packs ahead, shared memory answers at once.
  template <int M, typename A, typename F> KD_DEVICE int stream(int pack, int step, bool last, A all, F f) const {
    const auto fetch = [&](int at, Packs<S, M>& x, Packs<T, M>& y) {
#pragma unroll
      for (int i = 0; i < M; ++i) {
        x.raw[i] = s.fetch(at + i * step, 255, last);
        y.raw[i] = t.fetch(at + i * step, 255, last);
      }
    };
    Packs<S, M> x, x_next;
    Packs<T, M> y, y_next;
    if (all(pack)) fetch(pack, x, y);
    while (all(pack)) {
      const int next = pack + M * step;
      if (!kOnChip && all(next)) fetch(next, x_next, y_next);
      f(pack, x, y);
      if (kOnChip) {
        if (all(next)) fetch(next, x, y);
      } else {
        x = x_next;
        y = y_next;
      }
      pack = next;
    }
    return pack;
  }
};

template <int N> KD_DEVICE void put(float (&x)[N], int e, float y) {  // where e is not known when compiling
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = e == i ? y : x[i];
}

}  // namespace kd::gpu
