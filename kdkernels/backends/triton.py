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
import os
from typing import Optional

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

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
def _finite_max(x, live):
    return tl.max(tl.where(live & (x > -INF), x, -INF), 0)


@triton.jit
def _scaled(args_ptr, flags, k):
    """The coefficients b', a' of point k, which apply to raw logits."""
    raw = (flags & 1) != 0
    b = tl.load(args_ptr + 3 + 2 * k) * tl.where(raw, 1.0, tl.load(args_ptr))
    a = tl.load(args_ptr + 4 + 2 * k) * tl.where(raw, 1.0, tl.load(args_ptr + 1))
    return b, a


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
    """Statistics of the union of two sets of classes (Chan, Golub & LeVeque 1979, with weights exp(x - m))."""
    top = tl.maximum(m, m2)
    z, z2 = z * tl.where(m == top, 1.0, tl.exp(m - top)), z2 * tl.where(m2 == top, 1.0, tl.exp(m2 - top))
    total = z + z2
    f = tl.where(total > 0, z2 / tl.where(total > 0, total, 1.0), 0.0)
    ds, dt, g = _step(f, S, S2), _step(f, T, T2), f * (1 - f)
    ss = _blend(f, ss, ss2) + _times(g, ds * ds)
    st = _blend(f, st, st2) + tl.where((g == 0) | (ds == 0) | (dt == 0), 0.0, g * ds * dt)
    tt = _blend(f, tt, tt2) + _times(g, dt * dt)
    return top, total, _blend(f, S, S2), _blend(f, T, T2), ss, st, tt


@triton.jit
def _weights(u, v, use, b, a):
    """Top of x = b u + a v over the classes in use, and exp(x - top); all weights are 0 where the top is -inf."""
    x = tl.where(use, _times(b.to(tl.float32), u) + _times(a.to(tl.float32), v), -INF)
    top = tl.max(x, 0)
    peak = tl.where(top == -INF, 0.0, top)
    return top, tl.where(x == peak, 1.0, tl.exp(x - peak))


@triton.jit
def _put(vector, k, x):
    return tl.where(tl.arange(0, vector.shape[0]) == k, x, vector)


@triton.jit(do_not_specialize=["args_row", "B", "vocab", "ignore"])
def reduce_kernel(
    s_ptr, t_ptr, label_ptr, mask_ptr, args_ptr, program_ptr, out_ptr, s_a, s_b, t_a, t_b, args_row, B, vocab, ignore,
    K: tl.constexpr, KP: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_LABEL: tl.constexpr, HAS_MASK: tl.constexpr,
    SECOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[n] (K + 1, 7) of row n = (n // B, n % B); a tile holds the logits, and KP lanes the state of the points."""
    n = tl.program_id(0).to(tl.int64)
    s_ptr += (n // B) * s_a + (n % B) * s_b
    t_ptr += (n // B) * t_a + (n % B) * t_b
    args_ptr += n * args_row
    out_ptr += n * (K + 1) * STATS
    y, keep, known = n * 0 - 1, n >= 0, n >= 0
    if HAS_LABEL:
        y = tl.load(label_ptr + n)
        keep, known = y != ignore, (y >= 0) & (y < vocab) & (y != ignore)
    strange = keep != known  # a label outside the vocabulary damages its row and reads nothing
    zero = tl.zeros((KP,), tl.float64)
    m, z, S, T, ss, st, tt = zero - INF, zero, zero, zero, zero, zero, zero
    smax = tl.full((), -INF, tl.float32)
    tmax = smax
    damaged = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, tl.where(keep & (strange == 0), vocab, 0), BLOCK):
        cols = start + tl.arange(0, BLOCK)
        s, t, live, bad = _tile(s_ptr, t_ptr, mask_ptr, cols, vocab, HAS_TEACHER, HAS_MASK)
        damaged = damaged | bad.to(tl.int32)
        live = live & (bad == 0)
        s0, t0 = _finite_max(s, live), _finite_max(t, live)
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
            m2 = _put(m2, k, top.to(tl.float64) + _times(b, s0.to(tl.float64)) + _times(a, t0.to(tl.float64)))
            z2 = _put(z2, k, weight.to(tl.float64))
            U, V = weight * 0.0, weight * 0.0
            if (flags & 8) != 0:
                U = _mean(w, u, scale)
                S2 = _put(S2, k, s0.to(tl.float64) + U.to(tl.float64))
            if (flags & 16) != 0:
                V = _mean(w, v, scale)
                T2 = _put(T2, k, t0.to(tl.float64) + V.to(tl.float64))
            if SECOND:
                if (flags & 32) != 0:
                    d, e = u - U, v - V
                    ss2 = _put(ss2, k, tl.where(U == -INF, INF, _mean(w, d * d, scale)).to(tl.float64))
                    st2 = _put(st2, k, _mean(w, d * e, scale).to(tl.float64))
                    tt2 = _put(tt2, k, tl.where(V == -INF, INF, _mean(w, e * e, scale)).to(tl.float64))
        m, z, S, T, ss, st, tt = _merge(m, z, S, T, ss, st, tt, m2, z2, S2, T2, ss2, st2, tt2)
    nan = tl.where(strange | (tl.max(damaged, 0) > 0), NAN, 0.0).to(tl.float64)
    lane = tl.arange(0, KP)
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
def _register(op, a, b, c, const):
    """Value of one instruction of the tape (`kdkernels.tape.Op`)."""
    x = tl.zeros_like(a) + const
    log1p, expm1 = _exact(tl.where(op == 10, tl.exp(-tl.abs(a)), a))
    if op == 1:
        x = a + b
    elif op == 2:
        x = a - b
    elif op == 3:
        x = a * b
    elif op == 4:
        x = a / b
    elif op == 5:
        x = tl.exp(a)
    elif op == 6:
        x = expm1
    elif op == 7:
        x = tl.log(a)
    elif op == 8:
        x = log1p
    elif op == 9:
        x = tl.sqrt(a)
    elif op == 10:
        x = tl.maximum(a, 0.0) + log1p
    elif op == 11:
        x = _times(a, b)
    elif op == 12:
        x = tl.where(a > b, 1.0, 0.0).to(tl.float64)
    elif op == 13:
        x = tl.where(a != 0, b, c)
    elif op == 14:
        x = a
    return x


@triton.jit
def _slopes(op, a, b, x):
    """Derivatives of an instruction's value x by its operands."""
    zero = tl.zeros_like(a)
    da, db, dc = zero, zero, zero
    if (op == 1) | (op == 2):
        da, db = zero + 1, zero + tl.where(op == 1, 1.0, -1.0)
    elif op == 3:
        da, db = b, a
    elif op == 4:
        da, db = 1.0 / b, -x / b
    elif op == 5:
        da = x
    elif op == 6:
        da = x + 1
    elif (op == 7) | (op == 8):
        da = 1.0 / (a + tl.where(op == 8, 1.0, 0.0))
    elif op == 9:
        da = 0.5 / x
    elif op == 10:
        da = 1.0 / (1.0 + tl.exp(-a))
    elif op == 11:
        da, db = tl.where(a == 0, 0.0, b), a
    elif op == 13:
        db, dc = tl.where(a != 0, 1.0, zero), tl.where(a != 0, 0.0, zero + 1)
    return da, db, dc


@triton.jit
def _add(ptr, g, slope, use):
    """An adjoint or slope of 0 passes nothing on: 0 * inf would."""
    tl.store(ptr, tl.load(ptr, mask=use, other=0.0) + tl.where((g == 0) | (slope == 0), 0.0, g * slope), mask=use)
    tl.debug_barrier()


@triton.jit
def _inputs(stats, args, program, tape, K, P, N, use):
    """Registers 0 .. 6 K + 4 + P of the tape."""
    ss, ts = tl.load(args, mask=use, other=1.0), tl.load(args + 1, mask=use, other=1.0)
    for k in range(0, K):
        raw = (tl.load(program + 4 + k).to(tl.int32) & 1) != 0
        r, rt = tl.where(raw, 1.0, ss), tl.where(raw, 1.0, ts)
        row, at = stats + k * STATS, tape + 6 * k * N
        z = tl.load(row + 1, mask=use, other=1.0)
        lse = tl.load(row, mask=use, other=0.0) + tl.log(tl.where(z == 0, 1.0, z))
        tl.store(at, tl.where(z == 0, -INF, lse), mask=use)
        scales = (r, rt, r * r, r * rt, rt * rt)
        for j in tl.static_range(5):
            tl.store(at + (j + 1) * N, scales[j] * tl.load(row + 2 + j, mask=use, other=0.0), mask=use)
    row, at = stats + K * STATS, tape + 6 * K * N
    sy, ty = tl.load(row, mask=use, other=0.0), tl.load(row + 1, mask=use, other=0.0)
    tl.store(at, sy * ss, mask=use)
    tl.store(at + N, ty * ts, mask=use)
    tl.store(at + 2 * N, sy, mask=use)
    for j in range(0, P + 1):
        source = tl.where(j == 0, 2, 2 + 2 * K + j)
        tl.store(at + (3 + j) * N, tl.load(args + source, mask=use, other=0.0), mask=use)
    tl.debug_barrier()
