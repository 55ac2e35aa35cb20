// The tile kernels for avx2. Every header goes above the pragma, so that no library function is compiled for it.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <utility>

#include "../moments.h"
#include "tiles.h"
#pragma GCC target("avx2,fma,f16c")
#define KD_AVX2
namespace kd::avx2 {
#include "tiles.inl"
}
#endif
