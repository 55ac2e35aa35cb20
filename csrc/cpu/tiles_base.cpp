// The tile kernels for any processor.
#include <cmath>
#include <cstdint>

#include "../moments.h"
#include "tiles.h"
namespace kd::base {
#include "tiles.inl"
}
