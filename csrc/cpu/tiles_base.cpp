// The tile kernels for any processor.
#ifdef __SSE2__
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <utility>

#include "../moments.h"
#include "tiles.h"
namespace kd::base {
#include "tiles.inl"
}
