#include "dispatch.h"

namespace kd::gpu {
template struct Dtype<F16>;
}
