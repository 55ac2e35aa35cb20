"""The Triton kernel that reads logits for the statistics of a row, and what it is made of."""

import triton
import triton.language as tl

from .triton_tape import INF, _times

STATS, COEFS, ELSEWHERE = tl.constexpr(7), tl.constexpr(10), tl.constexpr(-(1 << 62))


@triton.jit
def pair(s_ptr, t_ptr, mask_ptr, cols, vocab, HAS_TEACHER: tl.constexpr, HAS_MASK: tl.constexpr):
    """Logits in float32, -inf where there is no class; 0 of a teacher that there is not."""
    use = cols < vocab
    s = tl.load(s_ptr + cols, mask=use, other=-INF).to(tl.float32)
    t = tl.zeros_like(s)
    if HAS_TEACHER:
        t = tl.load(t_ptr + cols, mask=use, other=-INF).to(tl.float32)
    if HAS_MASK:
        use = tl.load(mask_ptr + cols, mask=use, other=0) != 0
        s, t = tl.where(use, s, -INF), tl.where(use, t, -INF)
    return s, t


@triton.jit
def living(s, t, HAS_TEACHER: tl.constexpr):
    """Which classes of a `pair` live, and which are no logits at all (NaN or +inf)."""
    live = (s != -INF) | (t != -INF) if HAS_TEACHER else s != -INF
    return live, live & (((s < INF) & (t < INF)) == 0)


@triton.jit
def _tile(s_ptr, t_ptr, mask_ptr, cols, vocab, HAS_TEACHER: tl.constexpr, HAS_MASK: tl.constexpr):
    s, t = pair(s_ptr, t_ptr, mask_ptr, cols, vocab, HAS_TEACHER, HAS_MASK)
    live, bad = living(s, t, HAS_TEACHER)
    return s, t, live, bad


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


@triton.jit
def label_of(label_ptr, n, vocab, ignore, HAS_LABEL: tl.constexpr):
    """The label of row n (-1 without one), whether the row is kept, and whether it is damaged by one that is none."""
    y, keep, strange = n * 0 - 1, n >= 0, n < 0
    if HAS_LABEL:
        y = tl.load(label_ptr + n)
        keep = y != ignore
        strange = keep & ((y < 0) | (y >= vocab)) & (y != ELSEWHERE)
    return y, keep, strange


@triton.jit
def no_classes(KP: tl.constexpr, BLOCK: tl.constexpr):
    """Statistics of nothing: those of a point in each of KP lanes, the largest logits, which of a tile are damaged."""
    zero, least = tl.zeros((KP,), tl.float64), tl.full((), -INF, tl.float32)
    return zero - INF, zero, zero, zero, zero, zero, zero, least, least, tl.zeros((BLOCK,), tl.int32)


@triton.jit
def add_tile(so_far, s, t, cols, y, args_ptr, program_ptr, K: tl.constexpr, KP: tl.constexpr,
             HAS_TEACHER: tl.constexpr, SECOND: tl.constexpr):  # fmt: skip
    """Statistics of the classes so far and of a tile (a `pair`) of a row with label y."""
    m, z, S, T, ss, st, tt, smax, tmax, damaged = so_far
    live, bad = living(s, t, HAS_TEACHER)
    damaged = damaged | bad.to(tl.int32)
    live = live & (bad == 0)
    s0 = tl.max(tl.where(live & (s > -INF), s, -INF), 0)
    t0 = tl.max(tl.where(live & (t > -INF), t, -INF), 0)
    smax, tmax = tl.maximum(smax, s0), tl.maximum(tmax, t0)
    s0, t0 = tl.where(s0 == -INF, 0.0, s0), tl.where(t0 == -INF, 0.0, t0)
    lane, zero = tl.arange(0, KP), tl.zeros((KP,), tl.float64)
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
    return m, z, S, T, ss, st, tt, smax, tmax, damaged


@triton.jit
def store_statistics(
    of_row, s_ptr, t_ptr, mask_ptr, y, keep, strange, program_ptr, out_ptr, K: tl.constexpr, KP: tl.constexpr,
    HAS_TEACHER: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """out (K + 1, 7) of a whole row, NaN where it is damaged."""
    m, z, S, T, ss, st, tt, smax, tmax, damaged = of_row
    nan = tl.where(strange | (tl.max(damaged, 0) > 0), float("nan"), 0.0).to(tl.float64)
    lane = tl.arange(0, KP)
    second = (tl.load(program_ptr + 4 + lane, mask=lane < K, other=0.0).to(tl.int32) & 32) != 0
    ss, st, tt = tl.where(second, ss, 0.0), tl.where(second, st, 0.0), tl.where(second, tt, 0.0)
    moments = (m, z, S, T, ss, st, tt)
    for j in tl.static_range(7):
        tl.store(out_ptr + lane * STATS + j, moments[j] + nan, mask=lane < K)
    out_ptr += K * STATS
    at = keep & (strange == 0) & (y >= 0)
    dead = at & (at == 0)
    if HAS_MASK:
        dead = at & (tl.load(mask_ptr + y, mask=at, other=1) == 0)
    sy, ty = tl.load(s_ptr + y, mask=at, other=0.0).to(tl.float64), (y * 0).to(tl.float64)
    if HAS_TEACHER:
        ty = tl.load(t_ptr + y, mask=at, other=0.0).to(tl.float64)
    tl.store(out_ptr, tl.where(dead, -INF, sy) + nan)
    tl.store(out_ptr + 1, tl.where(dead, -INF, ty) + nan)
    tl.store(out_ptr + 2, tl.where(smax == -INF, 0.0, smax).to(tl.float64))
    tl.store(out_ptr + 3, tl.where(tmax == -INF, 0.0, tmax).to(tl.float64))
    tl.store(out_ptr + 4, tl.where(strange, -1.0, keep.to(tl.float64)))  # -1: NaN, and no gradient


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
    y, keep, strange = label_of(label_ptr, n, vocab, ignore, HAS_LABEL)
    so_far = no_classes(KP, BLOCK)
    for start in range(0, tl.where(keep & (strange == 0), vocab, 0), BLOCK):
        cols = start + tl.arange(0, BLOCK)
        s, t = pair(s_ptr, t_ptr, mask_ptr, cols, vocab, HAS_TEACHER, HAS_MASK)
        so_far = add_tile(so_far, s, t, cols, y, args_ptr + n * args_row, program_ptr, K, KP, HAS_TEACHER, SECOND)
    store_statistics(so_far, s_ptr, t_ptr, mask_ptr, y, keep, strange, program_ptr, out_ptr + n * (K + 1) * STATS, K,
                     KP, HAS_TEACHER, HAS_MASK)  # fmt: skip
