"""The Triton kernel that writes a gradient from the statistics of the rows."""

import triton
import triton.language as tl

from .triton_elements import COEFS, living, pair
from .triton_math import expm1
from .triton_tape import INF, _times


@triton.jit
def _slope(c, u, v, use, folded: tl.constexpr):
    """exp(b u + a v + lam) (c0 + c1 u + c2 v + c3 u^2 + c4 u v + c5 v^2), exponent and sum in the dtype of u; c0 is
    left out if it is `folded` into something else."""
    lam, b, a = tl.load(c).to(u.dtype), tl.load(c + 1).to(u.dtype), tl.load(c + 2).to(u.dtype)
    c0, c1, c2 = tl.load(c + 3).to(u.dtype), tl.load(c + 4).to(u.dtype), tl.load(c + 5).to(u.dtype)
    c3, c4, c5 = tl.load(c + 6).to(u.dtype), tl.load(c + 7).to(u.dtype), tl.load(c + 8).to(u.dtype)
    h = _times(c1, u) + _times(c2, v) if folded else c0 + _times(c1, u) + _times(c2, v)
    if (c3 != 0) | (c4 != 0) | (c5 != 0):
        h += _times(c3, u * u) + _times(c4, u * v) + _times(c5, v * v)
    x = (_times(b, u) + _times(a, v) + lam).to(tl.float32)
    pi = tl.where(use, tl.exp(tl.where((x > 0) & (x < INF), 0.0, x)), 0.0)  # at most 1, whatever x was rounded to
    return _times(pi.to(u.dtype), h)


@triton.jit
def _phi_slope(u, v, live, coef, last, constants, PHI: tl.constexpr, SIDE: tl.constexpr):
    """The slope of phi, of which the last point keeps the sum over all classes (see triton_separable.py)."""
    b, a = tl.load(coef + 1).to(tl.float32), tl.load(coef + COEFS + 2).to(tl.float32)
    log_q = tl.where(live, u * b + tl.load(coef).to(tl.float32), 0.0)
    log_p = tl.where(live, v * a + tl.load(coef + COEFS).to(tl.float32), 0.0)
    _phi, slope_q, slope_p = PHI(log_q, log_p, constants)
    scale = tl.load(last - COEFS + 4 + SIDE) * tl.load(coef + SIDE * (COEFS + 1) + 1)
    sum_of = tl.where(scale == 0, 0.0, tl.load(coef + SIDE * COEFS + 3) / tl.where(scale == 0, 1.0, scale))
    high, log_own, own = sum_of.to(tl.float32), log_p if SIDE else log_q, slope_p if SIDE else slope_q
    # Of a class with most of the weight little is left: first what cancels, without a rounding.
    heavy = ((own + high) + (sum_of - high.to(tl.float64)).to(tl.float32)) + high * expm1(log_own)
    return _times(scale.to(tl.float32), tl.where(log_own > -0.7, heavy, own + high * tl.exp(log_own)))


@triton.jit
def slopes(
    cols, s_ptr, t_ptr, mask_ptr, y, coef, constants, grad, vocab, K,
    HAS_TEACHER: tl.constexpr, HAS_MASK: tl.constexpr, PHI: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """`slopes_of` the classes cols of a row."""
    limit = tl.where(tl.load(coef + K * COEFS + 3) != 0, vocab, 0)
    s, t = pair(s_ptr, t_ptr, mask_ptr, cols, limit, HAS_TEACHER, HAS_MASK)
    return slopes_of(cols, s, t, y, coef, constants, grad, limit, K, HAS_TEACHER, PHI, SIDE)


@triton.jit
def slopes_of(cols, s, t, y, coef, constants, grad, limit, K, HAS_TEACHER: tl.constexpr, PHI: tl.constexpr,
              SIDE: tl.constexpr):  # fmt: skip
    """grad sum_k exp(b u + a v + lam) (c0 + c1 u + c2 v + c3 u^2 + c4 u v + c5 v^2), u = s - max s, v alike, of a tile
    (a `pair`). Of a separable loss (PHI is not None) the first two points and the last stand for phi."""
    last = coef + K * COEFS
    slope = tl.load(last).to(tl.float32)
    live, _bad = living(s, t, HAS_TEACHER)
    u = tl.where(live, s - tl.load(last + 1).to(tl.float32), 0.0)
    v = tl.where(live, t - tl.load(last + 2).to(tl.float32), 0.0)
    d = tl.where(cols == y, slope, 0.0)
    start, points = 0, K
    if PHI is not None:
        start, points = 2, K - 1
        for k in tl.static_range(2):  # of a sum with other losses; of the own side's point c0 is in `heavy`
            c, more = coef + k * COEFS, tl.load(last + 3) < 0
            for j in tl.static_range(3 + (k == SIDE), 9):
                more = more | (tl.load(c + j) != 0)
            if more:
                d += _slope(c, u, v, live, k == SIDE)
        d += _phi_slope(u, v, live, coef, last, constants, PHI, SIDE)
    for k in range(start, points):
        c = coef + k * COEFS
        use = live & ((cols != y) | (tl.load(c + 9).to(tl.int32) == 0))
        if (tl.load(c) > 4) | (tl.load(c + 1) < 0) | (tl.load(c + 2) < 0):  # exponents are large: see _weights
            u2, v2 = s.to(tl.float64) - tl.load(last + 1), t.to(tl.float64) - tl.load(last + 2)
            d += _slope(c, tl.where(use, u2, 0.0), tl.where(use, v2, 0.0), use, False).to(tl.float32)
        else:
            d += _slope(c, u, v, use, False)
    d = tl.where(live, d * grad, 0.0)
    d = tl.where(cols < limit, d + tl.where(slope != slope, float("nan"), 0.0), d)
    return tl.where(grad == 0, 0.0, d)  # a row that counts nothing


@triton.jit(do_not_specialize=["B", "vocab", "width", "grad_row", "K"])
def spread_kernel(
    grad_ptr, s_ptr, t_ptr, label_ptr, mask_ptr, coef, constants, out_ptr, s_a, s_b, t_a, t_b, B, vocab, width,
    grad_row, K, HAS_TEACHER: tl.constexpr, HAS_LABEL: tl.constexpr, HAS_MASK: tl.constexpr, PHI: tl.constexpr,
    SIDE: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`slopes` of a tile of row n = (n // B, n % B)."""
    n, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    vocab, width, y = vocab // ALIGN * ALIGN, width // ALIGN * ALIGN, n * 0 - 1
    if HAS_LABEL:
        y = tl.load(label_ptr + n)
    grad = tl.load(grad_ptr + n * grad_row).to(tl.float32)
    d = slopes(cols, s_ptr + (n // B) * s_a + (n % B) * s_b, t_ptr + (n // B) * t_a + (n % B) * t_b, mask_ptr, y,
               coef + n * (K + 1) * COEFS, constants, grad, vocab, K, HAS_TEACHER, HAS_MASK, PHI, SIDE)  # fmt: skip
    tl.store(out_ptr + n * width + cols, d.to(out_ptr.dtype.element_ty), mask=cols < width)
