"""Triton backend: any GPU that Triton compiles for, and its interpreter on CPU tensors (TRITON_INTERPRET=1).

    reduce  one program a row: reads s and t once (2 w bytes a class at w bytes a logit), writes 56 (K + 1) bytes a row
    rows    32 rows a program: nothing a class; 56 (K + 1) + 80 (K + 1) sides bytes and the tape's registers a row
    spread  one program a row and tile: reads s and t, writes one gradient (3 w bytes a class)

Elements are float32, relative to their tile's or row's maximum; everything kept for a row is float64. Tile sizes depend
on the width and dtype only, and nothing is summed atomically: a call repeats to the bit. Formats: `kdkernels.ops`.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import register
from . import calls

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DEVICES = ("cuda", "xpu", "cpu") if INTERPRETED else ("cuda", "xpu")
FLOAT64 = False
MAX_BLOCK, ROWS = 4096, 32
STATS, COEFS = tl.constexpr(7), tl.constexpr(10)
INF, NAN = tl.constexpr(float("inf")), tl.constexpr(float("nan"))


def unavailable() -> str | None:
    """Why this backend cannot run here, or None."""
    if INTERPRETED or torch.cuda.is_available() or torch.xpu.is_available():
        return None
    return "no GPU, and TRITON_INTERPRET=1 was not set when kdkernels was imported"


@triton.jit
def _times(c, x):
    """c * x, where c = 0 ignores x, infinite or not."""
    return tl.where(c == 0, 0.0, c * x)


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
def _weights(u, v, use, b, a):
    """Top of x = b u + a v over the classes in use, and exp(x - top); all weights are 0 where the top is -inf."""
    x = tl.where(use, _times(b.to(tl.float32), u) + _times(a.to(tl.float32), v), -INF)
    top = tl.max(x, 0)
    peak = tl.where(top == -INF, 0.0, top)
    return top, tl.where(x == peak, 1.0, tl.exp(x - peak))


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
        keep, known = y != ignore, (y >= 0) & (y < vocab) & (y != ignore)
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
        u, v = tl.where(live, s - s0, 0.0), tl.where(live, t - t0, 0.0)
        m2, z2, S2, T2, ss2, st2, tt2 = zero - INF, zero, zero, zero, zero, zero, zero
        for k in tl.static_range(K):
            flags = tl.load(program_ptr + 4 + k).to(tl.int32)
            b, a = _scaled(args_ptr, flags, k)
            use = live & ((cols != y) | ((flags & 4) == 0))
            top, w = _weights(u, v, use, b, a)
            weight = tl.sum(w, 0)
            scale = tl.where(weight > 0, 1.0 / tl.where(weight > 0, weight, 1.0), 0.0)
            base = _times(b, s0.to(tl.float64)) + _times(a, t0.to(tl.float64))
            m2 = tl.where(lane == k, top.to(tl.float64) + base, m2)
            z2 = tl.where(lane == k, weight.to(tl.float64), z2)
            U, V = weight * 0.0, weight * 0.0
            if (flags & 8) != 0:
                U = _mean(w, u, scale)
                S2 = tl.where(lane == k, s0.to(tl.float64) + U.to(tl.float64), S2)
            if (flags & 16) != 0:
                V = _mean(w, v, scale)
                T2 = tl.where(lane == k, t0.to(tl.float64) + V.to(tl.float64), T2)
            if SECOND:  # noqa: SIM102  (known when compiling; the flags are not)
                if (flags & 32) != 0:
                    d, e = u - U, v - V
                    ss2 = tl.where(lane == k, tl.where(U == -INF, INF, _mean(w, d * d, scale)).to(tl.float64), ss2)
                    st2 = tl.where(lane == k, tl.where(U + V == -INF, 0.0, _mean(w, d * e, scale)).to(tl.float64), st2)
                    tt2 = tl.where(lane == k, tl.where(V == -INF, INF, _mean(w, e * e, scale)).to(tl.float64), tt2)
        m, z, S, T, ss, st, tt = _merge(m, z, S, T, ss, st, tt, m2, z2, S2, T2, ss2, st2, tt2)
    nan = tl.where(strange | (tl.max(damaged, 0) > 0), NAN, 0.0).to(tl.float64)
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
    tl.store(out_ptr + 4, keep.to(tl.float64))


@triton.jit
def _exact(x):
    """log(1 + x) and exp(x) - 1 to full precision near 0 (Kahan), from log and exp alone."""
    u = 1.0 + x
    log1p = tl.where((u == 1) | (u == INF), x, tl.log(u) * (x / tl.where(u == 1, 1.0, u - 1)))
    e = tl.exp(x)
    plain = (e == 1) | (e == INF) | (e - 1 == -1)
    expm1 = tl.where(plain, tl.where(e == 1, x, e - 1), (e - 1) * (x / tl.where(plain, 1.0, tl.log(e))))
    return log1p, expm1


@triton.jit
def _apply(op, a, b, c, const):
    """Value of one instruction of the tape (`kdkernels.tape.Op`), and its derivatives by a and b."""
    zero = tl.zeros_like(a)
    log1p, expm1 = _exact(tl.where(op == 10, tl.exp(-tl.abs(a)), a))
    x, da, db = zero + const, zero, zero
    if op == 1:
        x, da, db = a + b, zero + 1, zero + 1
    elif op == 2:
        x, da, db = a - b, zero + 1, zero - 1
    elif op == 3:
        x, da, db = a * b, b, a
    elif op == 4:
        x, da, db = a / b, 1.0 / b, -a / b / b
    elif op == 5:
        x, da = tl.exp(a), tl.exp(a)
    elif op == 6:
        x, da = expm1, tl.exp(a)
    elif op == 7:
        x, da = tl.log(a), 1.0 / a
    elif op == 8:
        x, da = log1p, 1.0 / (1.0 + a)
    elif op == 9:
        x, da = tl.sqrt(a), 0.5 / tl.sqrt(a)
    elif op == 10:
        x, da = tl.maximum(a, 0.0) + log1p, 1.0 / (1.0 + tl.exp(-a))
    elif op == 11:
        x, da, db = _times(a, b), tl.where(a == 0, 0.0, b), a
    elif op == 12:
        x = zero + tl.where(a > b, 1.0, 0.0)
    elif op == 13:
        x, db = tl.where(a != 0, b, c), zero + tl.where(a != 0, 1.0, 0.0)
    elif op == 14:
        x = a
    return x, da, db


@triton.jit
def _add(ptr, g, slope, use):
    """An adjoint or slope of 0 passes nothing on: 0 * inf would."""
    tl.store(ptr, tl.load(ptr, mask=use, other=0.0) + tl.where(slope == 0, 0.0, _times(g, slope)), mask=use)
    tl.debug_barrier()


@triton.jit
def _operands(code, tape, N, use):
    a, b, c = tl.load(code + 1).to(tl.int64) * N, tl.load(code + 2).to(tl.int64) * N, tl.load(code + 3).to(tl.int64) * N
    x, y = tl.load(tape + a, mask=use, other=1.0), tl.load(tape + b, mask=use, other=1.0)
    z = tl.load(tape + c, mask=use, other=1.0)
    value, dx, dy = _apply(tl.load(code).to(tl.int32), x, y, z, tl.load(code + 4))
    return a, b, c, value, dx, dy


@triton.jit
def _point(stats, args, program, k, use):
    """Statistics m, z, S, T, ss, st, tt of point k; its flags, scales and scaled coefficients."""
    flags = tl.load(program + 4 + k).to(tl.int32)
    row = stats + k * STATS
    m, z = tl.load(row, mask=use, other=0.0), tl.load(row + 1, mask=use, other=1.0)
    S, T = tl.load(row + 2, mask=use, other=0.0), tl.load(row + 3, mask=use, other=0.0)
    ss, st = tl.load(row + 4, mask=use, other=0.0), tl.load(row + 5, mask=use, other=0.0)
    tt = tl.load(row + 6, mask=use, other=0.0)
    r = tl.where((flags & 1) != 0, 1.0, tl.load(args, mask=use, other=1.0))
    rt = tl.where((flags & 1) != 0, 1.0, tl.load(args + 1, mask=use, other=1.0))
    b = r * tl.load(args + 3 + 2 * k, mask=use, other=0.0)
    a = rt * tl.load(args + 4 + 2 * k, mask=use, other=0.0)
    lse = tl.where(z == 0, -INF, m + tl.log(tl.where(z == 0, 1.0, z)))
    return lse, S, T, ss, st, tt, flags, r, rt, b, a


@triton.jit(do_not_specialize=["args_row", "N", "K", "R", "out"])
def rows_kernel(
    stats, args, program, tape, value_ptr, coef, args_row, N, K, R, out, SIDES: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Runs the tape (2, 6 K + 4 + R, N) forwards and backwards; a lane reads only what it wrote itself."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    use = n < N
    stats, args, tape, coef = stats + n * (K + 1) * STATS, args + n * args_row, tape + n, coef + n * (K + 1) * COEFS
    inputs, last, bad = 6 * K + 4, stats + K * STATS, n < 0
    sy, ty = tl.load(last, mask=use, other=0.0), tl.load(last + 1, mask=use, other=0.0)
    smax, tmax = tl.load(last + 2, mask=use, other=0.0), tl.load(last + 3, mask=use, other=0.0)
    keep = tl.load(last + 4, mask=use, other=0.0) != 0
    for k in range(K):
        lse, S, T, ss, st, tt, flags, r, rt, b, a = _point(stats, args, program, k, use)
        x = (lse, r * S, rt * T, r * r * ss, r * rt * st, rt * rt * tt)
        for j in tl.static_range(6):
            tl.store(tape + (6 * k + j) * N, x[j], mask=use)
        alone = ((flags & 4) != 0) & (tl.abs(_times(b, sy) + _times(a, ty)) < INF)
        bad = bad | ((lse == -INF) & (alone == 0))
    at, ss, ts = tape + 6 * K * N, tl.load(args, mask=use, other=1.0), tl.load(args + 1, mask=use, other=1.0)
    x = (sy * ss, ty * ts, sy, tl.load(args + 2, mask=use, other=1.0))
    for j in tl.static_range(4):
        tl.store(at + j * N, x[j], mask=use)
    tl.debug_barrier()
    for i in range(R):
        _a, _b, _c, y, _da, _db = _operands(program + 4 + K + 5 * i, tape, N, use)
        tl.store(tape + (inputs + i) * N, y, mask=use)
        tl.debug_barrier()
    value = tl.load(tape + out * N, mask=use, other=0.0)
    value = tl.where(keep, tl.where(bad, NAN, value), 0.0)
    tl.store(value_ptr + n, value, mask=use)
    slopes = tape + (inputs + R).to(tl.int64) * N
    one = tl.full((ROWS,), 1.0, tl.float64)
    _add(slopes + out * N, one, one, use)
    for back in range(R):
        i = R - 1 - back
        code = program + 4 + K + 5 * i
        a, b, c, y, da, db = _operands(code, tape, N, use)
        g = tl.load(slopes + (inputs + i) * N, mask=use, other=0.0)
        _add(slopes + a, g, da, use)
        _add(slopes + b, g, db, use)
        _add(slopes + c, g, tl.where(tl.load(code) == 13, 1.0 - db, 0.0), use)
    nan = tl.where(value != value, NAN, 0.0).to(tl.float64)
    g = slopes + 6 * K * N
    gs, gt = tl.load(g, mask=use, other=0.0), tl.load(g + N, mask=use, other=0.0)
    gr = tl.load(g + 2 * N, mask=use, other=0.0)
    for side in tl.static_range(SIDES):
        scale = _times(gt, ty * ts) if side else _times(gs, sy * ss)
        for k in range(K):
            lse, S, T, vs, vst, vt, flags, r, rt, b, a = _point(stats, args, program, k, use)
            E, gS, gT, ps, pst, pt = _slopes_of(slopes + 6 * k * N, N, r, rt, use)
            own = a if side else b
            A = tl.where((flags & 2) != 0, 0.0, own)
            own_g, own_mean, own_v, own_p = (gT, T, vt, pt) if side else (gS, S, vs, ps)
            other_g = gS if side else gT
            c0 = _times(A, E - _times(ps, vs) - _times(pst, vst) - _times(pt, vt)) + own_g
            c1 = _times(A, gS) + (pst if side else 2 * ps)
            c2 = _times(A, gT) + (2 * pt if side else pst)
            c3, c4, c5 = _times(A, ps), _times(A, pst), _times(A, pt)
            free = tl.where((flags & 1) != 0, 0.0, 1.0)
            scale += free * (_times(_times(A, E) + own_g, own_mean) + _times(_times(own_g, A) + 2 * own_p, own_v)
                             + _times(_times(other_g, A) + pst, vst))  # fmt: skip
            D, F = smax - S, tmax - T
            c0 += _times(c1, D) + _times(c2, F) + _times(c3, D * D) + _times(c5, F * F)
            c0 += tl.where((c4 == 0) | (D == 0), 0.0, D * _times(c4, F))
            c1 += 2 * _times(c3, D) + _times(c4, F)
            c2 += 2 * _times(c5, F) + _times(c4, D)
            lam = _times(b, smax) + _times(a, tmax) - lse
            out_row = (lam, b, a, c0, c1, c2, c3, c4, c5, ((flags & 4) != 0) * one)
            for j in tl.static_range(10):
                tl.store(coef + k * COEFS + j, tl.where(keep, out_row[j] + (nan if j < 9 else 0.0), 0.0), mask=use)
        label = gt * ts if side else gs * ss + gr
        out_last = (label + nan, smax, tmax, one, scale + nan)
        for j in tl.static_range(5):
            tl.store(coef + K * COEFS + j, tl.where(keep, out_last[j], 0.0), mask=use)
        coef += N * (K + 1) * COEFS


@triton.jit
def _slopes_of(g, N, r, rt, use):
    """Slopes of the value by the six statistics of a point, in raw logit units."""
    E, S = tl.load(g, mask=use, other=0.0), tl.load(g + N, mask=use, other=0.0)
    T = tl.load(g + 2 * N, mask=use, other=0.0)
    ss, st = tl.load(g + 3 * N, mask=use, other=0.0), tl.load(g + 4 * N, mask=use, other=0.0)
    return E, r * S, rt * T, r * r * ss, r * rt * st, rt * rt * tl.load(g + 5 * N, mask=use, other=0.0)


@triton.jit(do_not_specialize=["B", "vocab", "width", "grad_row", "K"])
def spread_kernel(
    grad_ptr, s_ptr, t_ptr, label_ptr, mask_ptr, coef, out_ptr, s_a, s_b, t_a, t_b, B, vocab, width, grad_row, K,
    HAS_TEACHER: tl.constexpr, HAS_LABEL: tl.constexpr, HAS_MASK: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out_i = g sum_k exp(b u + a v + lam) (c0 + c1 u + c2 v + c3 u^2 + c4 u v + c5 v^2), u = s - max s, v alike."""
    n, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    vocab, width = vocab // ALIGN * ALIGN, width // ALIGN * ALIGN
    s_ptr += (n // B) * s_a + (n % B) * s_b
    t_ptr += (n // B) * t_a + (n % B) * t_b
    coef += n * (K + 1) * COEFS
    last = coef + K * COEFS
    slope, y = tl.load(last).to(tl.float32), n * 0 - 1
    if HAS_LABEL:
        y = tl.load(label_ptr + n)
    limit = tl.where(tl.load(last + 3) != 0, vocab, 0)
    s, t, live, _bad = _tile(s_ptr, t_ptr, mask_ptr, cols, limit, HAS_TEACHER, HAS_MASK)
    u = tl.where(live, s - tl.load(last + 1).to(tl.float32), 0.0)
    v = tl.where(live, t - tl.load(last + 2).to(tl.float32), 0.0)
    d = tl.where(cols == y, slope, 0.0)
    for k in range(K):
        c = coef + k * COEFS
        c0, c1, c2 = tl.load(c + 3).to(tl.float32), tl.load(c + 4).to(tl.float32), tl.load(c + 5).to(tl.float32)
        c3, c4, c5 = tl.load(c + 6).to(tl.float32), tl.load(c + 7).to(tl.float32), tl.load(c + 8).to(tl.float32)
        second = (c3 != 0) | (c4 != 0) | (c5 != 0)
        if (c0 != 0) | (c1 != 0) | (c2 != 0) | second:
            use = live & ((cols != y) | (tl.load(c + 9).to(tl.int32) == 0))
            x = _times(tl.load(c + 1).to(tl.float32), u) + _times(tl.load(c + 2).to(tl.float32), v)
            pi = tl.where(use, tl.exp(x + tl.load(c).to(tl.float32)), 0.0)
            h = c0 + _times(c1, u) + _times(c2, v)
            if second:
                h += _times(c3, u * u) + _times(c4, u * v) + _times(c5, v * v)
            d += _times(pi, h)
    d = tl.where(live, d * tl.load(grad_ptr + n * grad_row).to(tl.float32), 0.0)
    d = tl.where(cols < limit, d + tl.where(slope != slope, NAN, 0.0), d)
    tl.store(out_ptr + n * width + cols, d.to(out_ptr.dtype.element_ty), mask=cols < width)


@functools.lru_cache(maxsize=256)
def _on_device(code: bytes, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(code), dtype=torch.float64).to(device)


def _program(program: Tensor, device: torch.device) -> Tensor:
    """The program on the device; it is the same call after call, and copied once."""
    return _on_device(program.numpy().tobytes(), device)


@contextlib.contextmanager
def _launch(name: str, device: torch.device):
    calls["triton", name] += 1
    there = contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
    with there, np.errstate(all="ignore"):  # the interpreter computes with numpy, inf and NaN included
        yield


def _rows(x: Tensor | None, other: Tensor):
    """A tensor and its leading strides, 0 where there is one row only: what a kernel is compiled for varies less."""
    x = other if x is None else x
    return x, x.stride(0) if x.shape[0] > 1 else 0, x.stride(1) if x.shape[1] > 1 else 0


def _config(width: int, *multiples: int) -> dict:
    """Tile and warps from the width alone; ALIGN promises that masks are constant over 16 classes (wide loads)."""
    block = min(MAX_BLOCK, triton.next_power_of_2(width))
    return {"ALIGN": math.gcd(16, width, *multiples), "BLOCK": block, "num_warps": max(1, min(8, block // 512))}


@torch.library.custom_op("kdkernels::triton_reduce", mutates_args=())
def reduce(student: Tensor, teacher: Tensor | None, labels: Tensor | None, mask: Tensor | None, args: Tensor,
           program: Tensor, vocab: int, ignore_index: int) -> Tensor:  # fmt: skip
    """Statistics (N, K + 1, 7) of student (A, B, W) and teacher (A, B, W2); NaN where a row holds NaN or +inf."""
    (s, s_a, s_b), (t, t_a, t_b) = _rows(student, student), _rows(teacher, student)
    B, K, N = s.shape[1], int(program[0]), s.shape[0] * s.shape[1]
    stats = student.new_zeros((N, K + 1, STATS.value), dtype=torch.float64)
    second = any(int(flags) & 32 for flags in program[4 : 4 + K])
    args = args.to(s.device).contiguous()
    if N:
        with _launch("reduce", s.device):
            reduce_kernel[(N,)](
                s, t, s if labels is None else labels.contiguous(), s if mask is None else mask.view(torch.uint8), args,
                _program(program, s.device), stats, s_a, s_b, t_a, t_b, args.shape[1] * (len(args) > 1), B, vocab,
                ignore_index, K, triton.next_power_of_2(max(K, 1)), teacher is not None, labels is not None,
                mask is not None, second, **_config(vocab),
            )  # fmt: skip
    return stats


@torch.library.custom_op("kdkernels::triton_rows", mutates_args=())
def rows(stats: Tensor, args: Tensor, program: Tensor, sides: int) -> tuple[Tensor, Tensor]:
    """value (N,) and coef (sides, N, K + 1, 10) of the rows' statistics."""
    N, (K, R, _, out) = len(stats), map(int, program[:4])
    value, coef = stats.new_zeros(N), stats.new_zeros((sides, N, K + 1, COEFS.value))
    args = args.to(stats.device).contiguous()
    tape = stats.new_zeros((2, 6 * K + 4 + R, N))
    if N:
        with _launch("rows", stats.device):
            rows_kernel[(triton.cdiv(N, ROWS),)](
                stats.contiguous(), args, _program(program, stats.device), tape, value, coef,
                args.shape[1] * (len(args) > 1), N, K, R, out, sides, ROWS, num_warps=1,
            )  # fmt: skip
    return value, coef


@torch.library.custom_op("kdkernels::triton_spread", mutates_args=())
def spread(grad: Tensor, student: Tensor, teacher: Tensor | None, labels: Tensor | None, mask: Tensor | None,
           coef: Tensor, vocab: int, ignore_index: int, side: int) -> Tensor:  # fmt: skip
    """The gradient of the student's (side 0) or the teacher's (side 1) logits, contiguous, in their dtype."""
    (s, s_a, s_b), (t, t_a, t_b) = _rows(student, student), _rows(teacher, student)
    own = t if side else s
    # The interpreter truncates when it stores bfloat16, where hardware rounds.
    out = torch.empty(own.shape, dtype=torch.float32 if INTERPRETED else own.dtype, device=s.device)
    (A, B, W), config, K = out.shape, _config(out.shape[2], vocab), coef.shape[1] - 1
    if out.numel():
        with _launch("spread", s.device):
            spread_kernel[(A * B, triton.cdiv(W, config["BLOCK"]))](
                grad, s, t, s if labels is None else labels.contiguous(), s if mask is None else mask.view(torch.uint8),
                coef.contiguous(), out, s_a, s_b, t_a, t_b, B, vocab, W, grad.stride(0) * (len(grad) > 1), K,
                teacher is not None, labels is not None, mask is not None, **config,
            )  # fmt: skip
    return out.to(own.dtype)


register("triton_")
OPERATORS = (reduce, rows, spread)
