"""The Triton kernels that read logits: `reduce_kernel` and `spread_kernel`, and what they are made of."""

import triton
import triton.language as tl

from .triton_math import expm1
from .triton_tape import INF, _times

STATS, COEFS, ELSEWHERE = tl.constexpr(7), tl.constexpr(10), tl.constexpr(-(1 << 62))


@triton.jit
def _tile(s_ptr, t_ptr, mask_ptr, cols, vocab, HAS_TEACHER: tl.constexpr, HAS_MASK: tl.constexpr):
    """Logits in float32, which of them live, and which are no logits at all (NaN or +inf)."""
    live = cols < vocab
    s = tl.load(s_ptr + cols, mask=live, other=0.0).to(tl.float32)
    t = tl.zeros_like(s)
    if HAS_TEACHER:
        t = tl.load(t_ptr + cols, mask=live, other=0.0).to(tl.float32)
        live = live & ((s != -INF) | (t != -INF))
    else:
        live = live & (s != -INF)
    if HAS_MASK:
        live = live & (tl.load(mask_ptr + cols, mask=live, other=0) != 0)
    fine = (s < INF) & (t < INF)
    return s, t, live, live & (fine == 0)


@triton.jit
def _scaled(args_ptr, flags, k):
    """The coefficients b', a' of point k, which apply to raw logits."""
    raw = (flags & 1) != 0
    b = tl.load(args_ptr + 3 + 2 * k) * tl.where(raw, 1.0, tl.load(args_ptr))
    a = tl.load(args_ptr + 4 + 2 * k) * tl.where(raw, 1.0, tl.load(args_ptr + 1))
    return b, a


@triton.jit
def _mean(w, x, scale):
    return tl.sum(tl.where(w == 0, 0.0, w * x), 0) * scale


@triton.jit
def _unit(d, use):
    """The largest deviation, which has a square in float32 where those in its units do."""
    top = tl.max(tl.where(use, tl.abs(d), 0.0), 0)
    return tl.where((top > 0) & (top < INF), top, 1.0)


@triton.jit
def _step(f, a, b):
    """b - a where both sides of a merge have weight; two infinite means are no distance apart."""
    d = tl.where((f > 0) & (f < 1), b - a, 0.0)
    return tl.where(d == d, d, 0.0)


@triton.jit
def _blend(f, a, b):
    return _times(1 - f, a) + _times(f, b)


@triton.jit
def _merge(m, z, S, T, ss, st, tt, m2, z2, S2, T2, ss2, st2, tt2):
    """Statistics of the union of two sets of classes (Chan, Golub & LeVeque 1979, with weights exp(x - m)).

    Where a mean is infinite its variance is, and the covariance is left at 0: their sum is infinite, not NaN.
    """
    top = tl.maximum(m, m2)
    z, z2 = z * tl.where(m == top, 1.0, tl.exp(m - top)), z2 * tl.where(m2 == top, 1.0, tl.exp(m2 - top))
    total = z + z2
    f = tl.where(total > 0, z2 / tl.where(total > 0, total, 1.0), 0.0)
    ds, dt, g = _step(f, S, S2), _step(f, T, T2), f * (1 - f)
    ss = _blend(f, ss, ss2) + _times(g, ds * ds)
    st = _blend(f, st, st2) + tl.where(tl.abs(ds * dt) < INF, g * ds * dt, 0.0)
    tt = _blend(f, tt, tt2) + _times(g, dt * dt)
    return top, total, _blend(f, S, S2), _blend(f, T, T2), ss, st, tt


@triton.jit
def _pivot(x, at, otherwise):
    """The element at an index, unless it is infinite."""
    found = tl.max(tl.where(tl.arange(0, x.shape[0]) == at, x, -INF), 0)
    return tl.where(tl.abs(found) < INF, found, otherwise)


@triton.jit
def _weights(s, t, s0, t0, use, b, a):
    """Top of x = b u + a v over the classes in use, exp(x - top), u = s - s0, v = t - t0, and the pivots s0, t0.

    All weights are 0 where the top is -inf. The heaviest classes of a mixture may be light in both rows, x then large
    and rounded: the pivots move to the heaviest class, and x is computed in float64.
    """
    u, v = tl.where(use, s - s0, 0.0), tl.where(use, t - t0, 0.0)
    x = tl.where(use, _times(b.to(tl.float32), u) + _times(a.to(tl.float32), v), -INF)
    top = tl.max(x, 0)
    peak = tl.where(top == -INF, 0.0, top)
    if ((top < -4) | (b < 0) | (a < 0)) & (tl.abs(top) < INF):
        at = tl.argmax(x, 0)
        s0, t0 = _pivot(s, at, s0), _pivot(t, at, t0)
        u, v = tl.where(use, s - s0, 0.0), tl.where(use, t - t0, 0.0)
        exact = _times(b, s.to(tl.float64) - s0.to(tl.float64)) + _times(a, t.to(tl.float64) - t0.to(tl.float64))
        x = tl.where(use, exact.to(tl.float32), -INF)
        top = tl.max(x, 0)
        peak = top
    return top, tl.where(x == peak, 1.0, tl.exp(x - peak)), u, v, s0, t0


@triton.jit(do_not_specialize=["args_row", "B", "vocab", "ignore"])
def reduce_kernel(
    s_ptr, t_ptr, label_ptr, mask_ptr, args_ptr, program_ptr, out_ptr, s_a, s_b, t_a, t_b, args_row, B, vocab, ignore,
    K: tl.constexpr, KP: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_LABEL: tl.constexpr, HAS_MASK: tl.constexpr,
    SECOND: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[n] (K + 1, 7) of row n = (n // B, n % B); a tile holds the logits, and KP lanes the state of the points."""
    n, vocab = tl.program_id(0).to(tl.int64), vocab // ALIGN * ALIGN
    s_ptr += (n // B) * s_a + (n % B) * s_b
    t_ptr += (n // B) * t_a + (n % B) * t_b
    args_ptr += n * args_row
    out_ptr += n * (K + 1) * STATS
    y, keep, known = n * 0 - 1, n >= 0, n >= 0
    if HAS_LABEL:
        y = tl.load(label_ptr + n)
        keep, known = y != ignore, (((y >= 0) & (y < vocab)) | (y == ELSEWHERE)) & (y != ignore)
    strange = keep != known  # a label outside the vocabulary damages its row and reads nothing
    lane, zero = tl.arange(0, KP), tl.zeros((KP,), tl.float64)
    m, z, S, T, ss, st, tt = zero - INF, zero, zero, zero, zero, zero, zero
    smax = tl.full((), -INF, tl.float32)
    tmax = smax
    damaged = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, tl.where(keep & (strange == 0), vocab, 0), BLOCK):
        cols = start + tl.arange(0, BLOCK)
        s, t, live, bad = _tile(s_ptr, t_ptr, mask_ptr, cols, vocab, HAS_TEACHER, HAS_MASK)
        damaged = damaged | bad.to(tl.int32)
        live = live & (bad == 0)
        s0 = tl.max(tl.where(live & (s > -INF), s, -INF), 0)
        t0 = tl.max(tl.where(live & (t > -INF), t, -INF), 0)
        smax, tmax = tl.maximum(smax, s0), tl.maximum(tmax, t0)
        s0, t0 = tl.where(s0 == -INF, 0.0, s0), tl.where(t0 == -INF, 0.0, t0)
        m2, z2, S2, T2, ss2, st2, tt2 = zero - INF, zero, zero, zero, zero, zero, zero
        for k in tl.static_range(K):
            flags = tl.load(program_ptr + 4 + k).to(tl.int32)
            b, a = _scaled(args_ptr, flags, k)
            use = live & ((cols != y) | ((flags & 4) == 0))
            top, w, u, v, s_at, t_at = _weights(s, t, s0, t0, use, b, a)
            weight = tl.sum(w, 0)
            scale = tl.where(weight > 0, 1.0 / tl.where(weight > 0, weight, 1.0), 0.0)
            base = _times(b, s_at.to(tl.float64)) + _times(a, t_at.to(tl.float64))
            m2 = tl.where(lane == k, top.to(tl.float64) + base, m2)
            z2 = tl.where(lane == k, weight.to(tl.float64), z2)
            U, V = weight * 0.0, weight * 0.0
            if (flags & 8) != 0:
                U = _mean(w, u, scale)
                S2 = tl.where(lane == k, s_at.to(tl.float64) + U.to(tl.float64), S2)
            if (flags & 16) != 0:
                V = _mean(w, v, scale)
                T2 = tl.where(lane == k, t_at.to(tl.float64) + V.to(tl.float64), T2)
            if SECOND:  # noqa: SIM102  (known when compiling; the flags are not)
                if (flags & 32) != 0:
                    d, e = u - U, v - V
                    by_d, by_e = _unit(d, use), _unit(e, use)
                    d, e, by_d, by_e = d / by_d, e / by_e, by_d.to(tl.float64), by_e.to(tl.float64)
                    dd, de, ee = _mean(w, d * d, scale), _mean(w, d * e, scale), _mean(w, e * e, scale)
                    ss2 = tl.where(lane == k, tl.where(U == -INF, INF, dd.to(tl.float64) * by_d * by_d), ss2)
                    st2 = tl.where(lane == k, tl.where(U + V == -INF, 0.0, de.to(tl.float64) * by_d * by_e), st2)
                    tt2 = tl.where(lane == k, tl.where(V == -INF, INF, ee.to(tl.float64) * by_e * by_e), tt2)
        m, z, S, T, ss, st, tt = _merge(m, z, S, T, ss, st, tt, m2, z2, S2, T2, ss2, st2, tt2)
    nan = tl.where(strange | (tl.max(damaged, 0) > 0), float("nan"), 0.0).to(tl.float64)
    second = (tl.load(program_ptr + 4 + lane, mask=lane < K, other=0.0).to(tl.int32) & 32) != 0
    ss, st, tt = tl.where(second, ss, 0.0), tl.where(second, st, 0.0), tl.where(second, tt, 0.0)
    moments = (m, z, S, T, ss, st, tt)
    for j in tl.static_range(7):
        tl.store(out_ptr + lane * STATS + j, moments[j] + nan, mask=lane < K)
    out_ptr += K * STATS
    at = keep & known & (y >= 0)
    dead = at & (at == 0)
    if HAS_MASK:
        dead = at & (tl.load(mask_ptr + y, mask=at, other=1) == 0)
    sy, ty = tl.load(s_ptr + y, mask=at, other=0.0).to(tl.float64), (n * 0).to(tl.float64)
    if HAS_TEACHER:
        ty = tl.load(t_ptr + y, mask=at, other=0.0).to(tl.float64)
    tl.store(out_ptr, tl.where(dead, -INF, sy) + nan)
    tl.store(out_ptr + 1, tl.where(dead, -INF, ty) + nan)
    tl.store(out_ptr + 2, tl.where(smax == -INF, 0.0, smax).to(tl.float64))
    tl.store(out_ptr + 3, tl.where(tmax == -INF, 0.0, tmax).to(tl.float64))
    tl.store(out_ptr + 4, tl.where(strange, -1.0, keep.to(tl.float64)))  # -1: NaN, and no gradient


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
    """grad sum_k exp(b u + a v + lam) (c0 + c1 u + c2 v + c3 u^2 + c4 u v + c5 v^2), u = s - max s, v alike, of the
    classes cols of a row. Of a separable loss (PHI is not None) the first two points and the last stand for phi."""
    last = coef + K * COEFS
    slope, limit = tl.load(last).to(tl.float32), tl.where(tl.load(last + 3) != 0, vocab, 0)
    s, t, live, _bad = _tile(s_ptr, t_ptr, mask_ptr, cols, limit, HAS_TEACHER, HAS_MASK)
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
