"""Triton kernel of the distance of two sorted rows of probabilities. Formats: `kdkernels.rankops`.

A row is read once from memory, sorted twice in L2 (`triton_sorted.sort`: 8 n bytes move twice for each 4 bits of the
keys that differ), and passed over four times there; of n live classes w n bytes of gradient are written. Programs stay
for several rows.
"""

import triton
import triton.language as tl

from .triton_lapsum import order_key
from .triton_orders import _score
from .triton_sorted import end_of_run, fill, live_row, place_of, runs, sort
from .triton_tape import INF


@triton.jit
def _number(row, classes, m, n):
    """The logits of the live classes m of n."""
    return tl.load(row + tl.load(classes + m, mask=m < n, other=0), mask=m < n, other=-INF).to(tl.float32)


@triton.jit
def _partition(row, classes, n, scale, BLOCK: tl.constexpr):
    """The largest logit, and the sum of e^(scale (x - it))."""
    top, total = tl.full((), -INF, tl.float32), scale * 0
    for first in range(0, n, BLOCK):
        m = first + tl.arange(0, BLOCK)
        top = tl.maximum(top, tl.max(_number(row, classes, m, n), 0))
    for first in range(0, n, BLOCK):
        m = first + tl.arange(0, BLOCK)
        x = _number(row, classes, m, n)
        total += tl.sum(tl.where(m < n, _share(x, top, scale, 1.0), 0.0), 0).to(tl.float64)
    return top, total


@triton.jit
def _share(x, top, scale, total):
    return tl.where(x > -INF, tl.exp(scale.to(tl.float32) * (x - top)), 0.0) / total


@triton.jit
def _gaps(s_row, classes, keys, P, Q, signs, n, S, r, Z, BLOCK: tl.constexpr):
    """sum_i |q_(i) - p_(i)| of the sorted rows; q goes to Q and sums of the signs, up to each rank, to signs."""
    value, carry = r * 0, n * 0
    for first in range(0, n, BLOCK):
        m = first + tl.arange(0, BLOCK)
        s, _at = _score(s_row, classes, keys, m, n)
        q = _share(s, S, r, Z)
        gap = tl.where(m < n, q.to(tl.float64) - tl.load(P + m, mask=m < n, other=0.0).to(tl.float64), 0.0)
        value += tl.sum(tl.abs(gap), 0)
        sign = (gap > 0).to(tl.int64) - (gap < 0).to(tl.int64)
        tl.store(Q + m, q.to(tl.float32), mask=m < n)
        tl.store(signs + m, (carry + tl.cumsum(sign, 0)).to(tl.int32), mask=m < n)
        carry += tl.sum(sign, 0)
    tl.debug_barrier()
    return value


@triton.jit
def _slopes(keys, starts, Q, signs, slopes, n, zero, BLOCK: tl.constexpr):
    """The mean sign of each run of equal logits, and the mean of that under q."""
    mean, carry = zero, -n
    for first in range(0, n, BLOCK):
        m = n - 1 - first - tl.arange(0, BLOCK)
        end, carry = end_of_run(keys, m, n, carry)
        start = tl.load(starts + m, mask=m >= 0, other=0)
        above = tl.load(signs + start - 1, mask=(m >= 0) & (start > 0), other=0)
        total = tl.load(signs + end - 1, mask=m >= 0, other=0) - above
        slope = total.to(tl.float32) / tl.maximum(end - start, 1).to(tl.float32)
        tl.store(slopes + m, slope, mask=m >= 0)
        mean += tl.sum(tl.where(m >= 0, slope * tl.load(Q + m, mask=m >= 0, other=0.0), 0.0), 0).to(tl.float64)
    tl.debug_barrier()
    return mean


@triton.jit(do_not_specialize=["grad_row", "B", "N", "vocab", "width", "ignore", "room", "args_row"])
def uld_kernel(
    s_ptr, t_ptr, label_ptr, mask_ptr, top_ptr, grad_ptr, longs, floats, ints, value_ptr, out_ptr, s_a, s_b, t_a, t_b,
    grad_row, B, N, vocab, width, ignore, room, args_ptr, args_row, SIDE: tl.constexpr, HAS_LABEL: tl.constexpr,
    HAS_TOP: tl.constexpr, HAS_MASK: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """value[n] and g times the gradient of s. A program has room for so many classes: 2 longs, 2 floats, 3 ints."""
    me, all = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    longs, P, classes = longs + me * 2 * room, floats + me * 2 * room, ints + me * 3 * room
    Q, starts, signs = P + room, classes + room, classes + 2 * room
    for round in range(tl.cdiv(N - me, all)):
        n = me + round * all
        s_row, t_row, limit, nan, keep, g, count = live_row(
            s_ptr, t_ptr, label_ptr, mask_ptr, top_ptr, grad_ptr, classes, longs, n, s_a, s_b, t_a, t_b, grad_row, B,
            vocab, ignore, HAS_LABEL, HAS_TOP, HAS_MASK, BLOCK, True,
        )  # fmt: skip
        r, rt = tl.load(args_ptr + n * args_row + SIDE), tl.load(args_ptr + n * args_row + 1 - SIDE)
        S, Z = _partition(s_row, classes, count, r, BLOCK)
        T, Zt = _partition(t_row, classes, count, rt, BLOCK)
        fine = (S > -INF) & (T > -INF)  # else there is no distribution
        nan += tl.where(fine | (limit == 0), 0.0, float("nan"))
        count = tl.where(fine, count, 0)
        keys, spare = sort(longs, longs + room, count, BLOCK)
        for first in range(0, count, BLOCK):
            m = first + tl.arange(0, BLOCK)
            t, _at = _score(t_row, classes, keys, m, count)
            tl.store(P + m, _share(t, T, rt, Zt).to(tl.float32), mask=m < count)
            s = _number(s_row, classes, m, count)
            tl.store(spare + m, (order_key(s) << 32) | m, mask=m < count)
        tl.debug_barrier()
        keys, spare = sort(spare, keys, count, BLOCK)
        value = _gaps(s_row, classes, keys, P, Q, signs, count, S, r, Z, BLOCK)
        tl.store(value_ptr + n, tl.where(keep, value + nan, 0.0))
        if GRADIENT:
            runs(keys, starts, count, BLOCK)
            mean = _slopes(keys, starts, Q, signs, P, count, value * 0, BLOCK)
            fill(out_ptr + n * width, width, limit, tl.where(g != 0, nan, 0.0).to(tl.float32), BLOCK)
            for first in range(0, tl.where(g != 0, count, 0), BLOCK):
                m = first + tl.arange(0, BLOCK)
                at = tl.load(classes + place_of(tl.load(keys + m, mask=m < count, other=0)), mask=m < count, other=0)
                slope = tl.load(P + m, mask=m < count, other=0.0).to(tl.float64) - mean
                d = g * r * tl.load(Q + m, mask=m < count, other=0.0).to(tl.float64) * slope
                tl.store(out_ptr + n * width + at, d.to(out_ptr.dtype.element_ty), mask=m < count)
        tl.debug_barrier()
