// The tile kernels for avx512 with bfloat16. Headers go above the pragma: no library function is compiled for it.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 about its own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <utility>

#include "../moments.h"
#include "tiles.h"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")
#define KD_AVX512
#define KD_AVX512_BF16
namespace kd::avx512_bf16 {
#include "tiles.inl"
}
#endif
