#include "dispatch.h"

namespace kd::gpu {
template struct Dtype<float>;
}
