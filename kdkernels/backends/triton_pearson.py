"""Triton kernel of Pearson's loss: one program a row, no scratch, float64 for what is kept of a row.

Bytes a class, at w bytes a logit: 2 w read for the range of the logits (of probabilities: the log-partitions), 2 w for
the value (five moments, merged tile by tile), 2 w and a write of w for the gradient: 7 w. 3 w is the least.
"""

import triton
import triton.language as tl

from .triton_lapsum import live_pair, row_at
from .triton_math import expm1
from .triton_tape import INF


@triton.jit
def _partition(x, live, m, z, scale):
    """The maximum and the sum of exp((x - maximum) scale), over one more tile."""
    top = tl.maximum(m, tl.max(tl.where(live, x, -INF), 0).to(tl.float64))
    safe = tl.where(top == -INF, 0.0, top)
    e = tl.exp(((x.to(tl.float64) - safe) * scale).to(tl.float32))
    old = tl.where(m == -INF, 0.0, tl.exp((m - safe) * scale))
    return top, z * old + tl.sum(tl.where(live, e, 0.0), 0).to(tl.float64)


@triton.jit
def _deviation(x, live, m, shift, scale, PROBS: tl.constexpr):
    """V q - 1 of probabilities, from the logarithm shift of V e^(m scale) / z; logits less m, times shift."""
    x = x.to(tl.float64) - m
    x = expm1((x * scale + shift).to(tl.float32)) if PROBS else (x * shift).to(tl.float32)
    return tl.where(live, x, 0.0)


@triton.jit
def _mean(x, live, c, PROBS: tl.constexpr):
    """Mean of a tile's live entries, and what they are off it."""
    pivot = tl.sum(x, 0) * 0 if PROBS else tl.max(tl.where(live, x, -INF), 0)
    u = tl.where(live, x - pivot, 0.0)
    off = tl.sum(u, 0) / c
    return pivot.to(tl.float64) + off.to(tl.float64), tl.where(live, u - off, 0.0)


@triton.jit
def _partitions(s_ptr, t_ptr, mask_ptr, vocab, r, rt, HAS_MASK: tl.constexpr, PROBS: tl.constexpr, BLOCK: tl.constexpr):
    """Both maxima, log(V e^max / partition) of both (of logits one over their range: squares would leave float32),
    whether both rows vary, whether one is spoilt."""
    n, low = r * 0, r * 0 + INF
    m, z, mt, zt, low_t = n - INF, n, n - INF, n, low
    spoilt = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, vocab, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        s, t, live, bad = live_pair(s_ptr, t_ptr, mask_ptr, cols, vocab, -1, 0, HAS_MASK, PROBS)
        spoilt = spoilt | bad.to(tl.int32)
        n += tl.sum(live.to(tl.float64), 0)
        low = tl.minimum(low, tl.min(tl.where(live, s, INF), 0).to(tl.float64))
        low_t = tl.minimum(low_t, tl.min(tl.where(live, t, INF), 0).to(tl.float64))
        if PROBS:
            m, z = _partition(s, live, m, z, r)
            mt, zt = _partition(t, live, mt, zt, rt)
        else:
            m = tl.maximum(m, tl.max(tl.where(live, s, -INF), 0).to(tl.float64))
            mt = tl.maximum(mt, tl.max(tl.where(live, t, -INF), 0).to(tl.float64))
    log_n = tl.log(tl.maximum(n, 1.0))
    shift, shift_t = log_n - tl.log(tl.where(z > 0, z, 1.0)), log_n - tl.log(tl.where(zt > 0, zt, 1.0))
    varied = (m > low) & (mt > low_t)
    if not PROBS:
        shift, shift_t = 1 / tl.where(varied, m - low, 1.0), 1 / tl.where(varied, mt - low_t, 1.0)
    return m, mt, shift, shift_t, varied, tl.max(spoilt, 0) > 0


@triton.jit
def _products(
    s_ptr, t_ptr, mask_ptr, vocab, m, mt, shift, shift_t, r, rt, HAS_MASK: tl.constexpr, PROBS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Means and sums of products of both rows' deviations (Chan, Golub & LeVeque 1979)."""
    n, a, b, aa, ab, bb = r * 0, r * 0, r * 0, r * 0, r * 0, r * 0
    for first in range(0, vocab, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        s, t, live, _bad = live_pair(s_ptr, t_ptr, mask_ptr, cols, vocab, -1, 0, HAS_MASK, PROBS)
        c = tl.sum(live.to(tl.float32), 0)
        some = tl.maximum(c, 1.0)
        u, du = _mean(_deviation(s, live, m, shift, r, PROBS), live, some, PROBS)
        v, dv = _mean(_deviation(t, live, mt, shift_t, rt, PROBS), live, some, PROBS)
        c = c.to(tl.float64)
        f = c / tl.maximum(n + c, 1.0)
        u, v = tl.where(c > 0, u - a, 0.0), tl.where(c > 0, v - b, 0.0)
        aa += tl.sum(du * du, 0).to(tl.float64) + n * f * u * u
        ab += tl.sum(du * dv, 0).to(tl.float64) + n * f * u * v
        bb += tl.sum(dv * dv, 0).to(tl.float64) + n * f * v * v
        a, b, n = a + f * u, b + f * v, n + c
    return a, b, aa, ab, bb


@triton.jit
def _less(x, mean):
    """x - mean of float32 entries, mean in float64."""
    high = mean.to(tl.float32)
    return (x - high) + (high.to(tl.float64) - mean).to(tl.float32)


@triton.jit(do_not_specialize=["grad_row", "args_row", "B", "vocab", "width", "ignore"])
def pearson_kernel(
    s_ptr, t_ptr, label_ptr, mask_ptr, grad_ptr, args_ptr, value_ptr, out_ptr, s_a, s_b, t_a, t_b, grad_row, args_row,
    B, vocab, width, ignore, PROBS: tl.constexpr, SIDE: tl.constexpr, HAS_LABEL: tl.constexpr, HAS_MASK: tl.constexpr,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """value[n] and g times the gradient of the student (SIDE 0) or the teacher."""
    n = tl.program_id(0).to(tl.int64)
    s_ptr, t_ptr, limit, nan, keep, g, _edge, _last = row_at(
        s_ptr, t_ptr, label_ptr, label_ptr, grad_ptr, n, s_a, s_b, t_a, t_b, grad_row, B, vocab, ignore, HAS_LABEL,
        False,
    )  # fmt: skip
    r, rt = tl.load(args_ptr + n * args_row), tl.load(args_ptr + n * args_row + 1)
    m, mt, shift, shift_t, varied, spoilt = _partitions(
        s_ptr, t_ptr, mask_ptr, limit, r, rt, HAS_MASK, PROBS, BLOCK
    )  # fmt: skip
    sums = tl.where(spoilt, 0, limit)
    a, b, aa, ab, bb = _products(
        s_ptr, t_ptr, mask_ptr, sums, m, mt, shift, shift_t, r, rt, HAS_MASK, PROBS, BLOCK
    )  # fmt: skip
    noise = 1e-26 * vocab if PROBS else 0.0  # what probabilities that are equal differ by
    varied = varied & (aa > noise) & (bb > noise)
    aa, bb = tl.where(varied, aa, 1.0), tl.where(varied, bb, 1.0)
    rho = tl.where(varied, ab / tl.sqrt(aa) / tl.sqrt(bb), 0.0)
    nan += tl.where(spoilt, float("nan"), 0.0)
    tl.store(value_ptr + n, tl.where(keep, 1 - rho + nan, 0.0))
    if GRADIENT:
        unit = (rt if SIDE else r) if PROBS else (shift_t if SIDE else shift)
        scale = tl.where(varied, 1.0, 0.0).to(tl.float64)
        own, other = (scale * rho / (bb if SIDE else aa)).to(tl.float32), -scale / tl.sqrt(aa) / tl.sqrt(bb)
        other, nan = other.to(tl.float32), tl.where(g != 0, nan, 0.0).to(tl.float32)
        some = tl.where(varied & (g != 0), limit, 0)
        for first in range(0, width, BLOCK):
            cols = first + tl.arange(0, BLOCK)
            s, t, live, _bad = live_pair(s_ptr, t_ptr, mask_ptr, cols, limit, -1, 0, HAS_MASK, PROBS)
            u, v = _deviation(s, live, m, shift, r, PROBS), _deviation(t, live, mt, shift_t, rt, PROBS)
            du, dv = _less(u, a), _less(v, b)
            d = own * (dv if SIDE else du) + other * (du if SIDE else dv)
            if PROBS:
                d *= 1 + (v if SIDE else u)  # the softmax's own term is 0: rho knows no scale
            d = tl.where(live & (cols < some), (d.to(tl.float64) * (g * unit)).to(tl.float32), 0.0)
            d = tl.where(cols < limit, d + nan, 0.0)
            tl.store(out_ptr + n * width + cols, d.to(out_ptr.dtype.element_ty), mask=cols < width)
