"""exp, expm1, log and log1p in float32, from multiplications alone: the hardware's are good to some bits of the largest
term only, these to 2 ulp."""

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))
LOG2E, LN2_HI, LN2_LO = tl.constexpr(1.4426950408889634), tl.constexpr(0.693359375), tl.constexpr(-2.12194440e-4)


@triton.jit
def _power(x):
    """(2^f - 1, 2^(n - u), 1 + u) with e^x = 2^(n + f), u = 1 where n > 0: 2^n may overflow where e^x does not."""
    x = tl.where(x < -88.0, -88.0, tl.where(x > 89.0, 89.0, x))
    n = tl.floor(x * LOG2E + 0.5)
    f = ((x - n * LN2_HI) - n * LN2_LO) * LOG2E
    p = 1.5594678e-4 * f + 1.3406644e-3
    p = ((p * f + 9.6176930e-3) * f + 5.5503106e-2) * f + 2.4022653e-1
    up = tl.where(n > 0, 1.0, 0.0)
    n = tl.where(n == n, tl.maximum(n, -126.0), 0.0)
    scale = ((n - up).to(tl.int32) + 127) << 23
    return (p * f + 6.9314721e-1) * f, scale.to(tl.float32, bitcast=True), 1.0 + up


@triton.jit
def exp(x):
    p, scale, twice = _power(x)
    return tl.where(x < -87.3, 0.0, (p + 1.0) * scale * twice)


@triton.jit
def expm1(x):
    p, scale, twice = _power(x)
    scale *= tl.where(x > 30.0, 1.0, twice)
    e = tl.where(x > 30.0, (p + 1.0) * scale * twice, p * scale + (scale - 1.0))
    return tl.where(x < -87.3, -1.0, e)


@triton.jit
def _log_of(u, x, ONE_PLUS: tl.constexpr):
    """log u, or log(1 + x) with u = 1 + x rounded. [fdlibm, logf and log1pf]"""
    small = u < 1.17549435e-38
    raw = tl.where(small, u * 33554432.0, u).to(tl.int32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    k = ((raw >> 23) - 127).to(tl.float32) - tl.where(small, 25.0, 0.0)
    f = ((raw & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    rest = f * 0.0
    if ONE_PLUS:
        rest = tl.where(k == 0, 0.0, tl.where(k > 0, 1.0 - (u - x), x - (u - 1.0)) / u)
        f = tl.where(k == 0, x, f)
    s = f / (2.0 + f)
    z, half = s * s, 0.5 * f * f
    r = z * (0.66666662693 + z * (0.40000972152 + z * (0.28498786688 + z * 0.24279078841)))
    y = k * LN2_HI - ((half - (s * (half + r) + (k * LN2_LO + rest))) - f)
    y = tl.where(u == INF, u, tl.where(u == 0, -INF, y))
    return tl.where(u >= 0, y, float("nan"))


@triton.jit
def log(x):
    return _log_of(x, x, False)


@triton.jit
def log1p(x):
    return _log_of(1.0 + x, x, True)


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + log1p(exp(-tl.abs(x)))
