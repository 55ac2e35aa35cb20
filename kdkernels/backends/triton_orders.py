"""Triton kernels of the Plackett-Luce and Kendall losses: live classes gathered, then sorted or paired in L2.

    plackett  reads a row once from memory (2 w bytes a class at w bytes a logit), sorts the teacher's n live classes
              (`triton_sorted.sort`) and passes over them four times; writes w
    kendall   reads a row once, then for each live class 16 bytes from L2 for each of K shifts, or 8 for each of the
              n - 1 others of the top classes; writes w

Programs stay for several rows. Denominators are kept relative to the largest score so far.
"""

import triton
import triton.language as tl

from .triton_lapsum import _chain
from .triton_sorted import _later, end_of_run, fill, live_row, place_of, runs, sort
from .triton_tape import INF


@triton.jit
def _score(row, classes, keys, m, n):
    """The logits at positions m of the order, and where they are in the row."""
    use = (m >= 0) & (m < n)
    place = place_of(tl.load(keys + m, mask=use, other=0))
    at = tl.load(classes + place, mask=use, other=0)
    return tl.load(row + at, mask=use, other=-INF).to(tl.float32), at


@triton.jit
def _weight(t_row, classes, keys, m, n, top, rt, total, TEACHER: tl.constexpr):
    t, _at = _score(t_row, classes, keys, m, n)
    w = tl.exp((t.to(tl.float64) - top) * rt) if TEACHER else tl.where(t > -INF, 1.0, 0.0).to(tl.float64)
    return w / total


@triton.jit
def _denominators(s_row, t_row, classes, keys, pivots, D, n, r, rt, top, TEACHER: tl.constexpr, BLOCK: tl.constexpr):
    """Of every prefix of the order the largest score and the sum of exponentials relative to it; sum of the weights."""
    total, carry, best = r * 0, r * 0, (r * 0).to(tl.float32) - INF
    for first in range(0, n, BLOCK):
        m = first + tl.arange(0, BLOCK)
        s, _at = _score(s_row, classes, keys, m, n)
        before, _at = _score(s_row, classes, keys, m - 1, n)
        before = tl.maximum(tl.associative_scan(before, 0, _later), best)
        pivot = tl.maximum(before, s)
        safe = tl.where(pivot == -INF, 0.0, pivot).to(tl.float64)
        decay = tl.where(m < n, tl.exp((before.to(tl.float64) - safe) * r), 1.0)
        power = tl.where(m < n, tl.exp((s.to(tl.float64) - safe) * r), 0.0)
        d, sums = tl.associative_scan((decay, power), 0, _chain)
        sums += d * carry
        tl.store(pivots + m, pivot, mask=m < n)
        tl.store(D + m, sums.to(tl.float32), mask=m < n)
        carry = tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, sums, 0.0), 0)
        best = tl.max(pivot, 0)
        total += tl.sum(_weight(t_row, classes, keys, m, n, top, rt, 1.0, TEACHER), 0)
    tl.debug_barrier()
    return total


@triton.jit
def _value(
    s_row, t_row, classes, keys, pivots, D, at_end, D_end, n, r, rt, top, total, TEACHER: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """sum_i w_i (log D_i - s_i); pivot and denominator of each run's end go to all of the run (Breslow's ties)."""
    value, carry = r * 0, -n
    for first in range(0, n, BLOCK):
        m = n - 1 - first - tl.arange(0, BLOCK)
        end, carry = end_of_run(keys, m, n, carry)
        pivot = tl.load(pivots + end - 1, mask=m >= 0, other=0.0)
        d = tl.load(D + end - 1, mask=m >= 0, other=1.0)
        tl.store(at_end + m, pivot, mask=m >= 0)
        tl.store(D_end + m, d, mask=m >= 0)
        s, _at = _score(s_row, classes, keys, m, n)
        w = _weight(t_row, classes, keys, m, n, top, rt, total, TEACHER)
        term = w * (tl.log(d.to(tl.float64)) + (pivot.to(tl.float64) - s.to(tl.float64)) * r)
        value += tl.sum(tl.where(m >= 0, term, 0.0), 0)
    tl.debug_barrier()
    return value


@triton.jit
def _write_plackett(
    s_row, t_row, out_ptr, classes, keys, starts, C, pivots, D, n, r, rt, top, total, g, TEACHER: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dL / ds_i = e^(s_i) sum of w / D over the runs from i's on, less w_i."""
    carry = r * 0
    for first in range(0, n, BLOCK):
        m = n - 1 - first - tl.arange(0, BLOCK)
        here = tl.load(pivots + m, mask=m >= 0, other=0.0)
        above = tl.load(pivots + m + 1, mask=(m >= 0) & (m + 1 < n), other=INF)
        share = _weight(t_row, classes, keys, m, n, top, rt, total, TEACHER)
        share = tl.where(m >= 0, share / tl.load(D + m, mask=m >= 0, other=1.0).to(tl.float64), 0.0)
        decay = tl.where(m >= 0, tl.exp((here.to(tl.float64) - above.to(tl.float64)) * r), 1.0)
        d, sums = tl.associative_scan((decay, share), 0, _chain)
        sums += d * carry
        tl.store(C + m, sums.to(tl.float32), mask=m >= 0)
        carry = tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, sums, 0.0), 0)
    tl.debug_barrier()
    for first in range(0, n, BLOCK):
        m = first + tl.arange(0, BLOCK)
        s, at = _score(s_row, classes, keys, m, n)
        pivot = tl.load(pivots + m, mask=m < n, other=0.0)
        c = tl.load(C + tl.load(starts + m, mask=m < n, other=0), mask=m < n, other=0.0).to(tl.float64)
        power = tl.exp((s.to(tl.float64) - pivot.to(tl.float64)) * r)
        w = _weight(t_row, classes, keys, m, n, top, rt, total, TEACHER)
        tl.store(out_ptr + at, (g * r * (power * c - w)).to(out_ptr.dtype.element_ty), mask=m < n)


@triton.jit(do_not_specialize=["grad_row", "B", "N", "vocab", "width", "ignore", "room", "args_row"])
def plackett_kernel(
    s_ptr, t_ptr, label_ptr, mask_ptr, top_ptr, grad_ptr, longs, floats, ints, value_ptr, out_ptr, s_a, s_b, t_a, t_b,
    grad_row, B, N, vocab, width, ignore, room, args_ptr, args_row, TEACHER: tl.constexpr, HAS_LABEL: tl.constexpr,
    HAS_TOP: tl.constexpr, HAS_MASK: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """value[n] and g times the gradient. A program has room for so many live classes: 2 longs, 4 floats and 2 ints."""
    me, all = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    longs, pivots, classes = longs + me * 2 * room, floats + me * 4 * room, ints + me * 2 * room
    starts, D, at_end, D_end = classes + room, pivots + room, pivots + 2 * room, pivots + 3 * room
    for round in range(tl.cdiv(N - me, all)):
        n = me + round * all
        s_row, t_row, limit, nan, keep, g, count = live_row(
            s_ptr, t_ptr, label_ptr, mask_ptr, top_ptr, grad_ptr, classes, longs, n, s_a, s_b, t_a, t_b, grad_row, B,
            vocab, ignore, HAS_LABEL, HAS_TOP, HAS_MASK, BLOCK,
        )  # fmt: skip
        r, rt = tl.load(args_ptr + n * args_row), tl.load(args_ptr + n * args_row + 1)
        count = tl.where(count < 2, 0, count)
        keys, _spare = sort(longs, longs + room, count, BLOCK)
        runs(keys, starts, count, BLOCK)
        best = tl.load(classes + place_of(tl.load(keys + count - 1, mask=count > 0, other=0)), mask=count > 0, other=0)
        top = tl.load(t_row + best).to(tl.float64)
        total = _denominators(s_row, t_row, classes, keys, pivots, D, count, r, rt, top, TEACHER, BLOCK)
        value = _value(
            s_row, t_row, classes, keys, pivots, D, at_end, D_end, count, r, rt, top, total, TEACHER, BLOCK
        )  # fmt: skip
        tl.store(value_ptr + n, tl.where(keep, tl.where(count > 0, value, 1.0) + nan, 0.0))
        if GRADIENT:
            fill(out_ptr + n * width, width, limit, tl.where(g != 0, nan, 0.0).to(tl.float32), BLOCK)
            _write_plackett(
                s_row, t_row, out_ptr + n * width, classes, keys, starts, pivots, at_end, D_end,
                tl.where(g != 0, count, 0), r, rt, top, total, g, TEACHER, BLOCK,
            )  # fmt: skip
        tl.debug_barrier()


@triton.jit
def _spread_of(row, classes, to, n, BLOCK: tl.constexpr):
    """Copies the live logits; their mean, population variance, and whether they differ."""
    zero = n.to(tl.float64) * 0
    total, squares, low, high = zero, zero, zero + INF, zero - INF
    for first in range(0, n, BLOCK):
        m = first + tl.arange(0, BLOCK)
        x = tl.load(row + tl.load(classes + m, mask=m < n, other=0), mask=m < n, other=0.0).to(tl.float32)
        tl.store(to + m, x, mask=m < n)
        total += tl.sum(tl.where(m < n, x.to(tl.float64), 0.0), 0)
        low = tl.minimum(low, tl.min(tl.where(m < n, x, INF), 0).to(tl.float64))
        high = tl.maximum(high, tl.max(tl.where(m < n, x, -INF), 0).to(tl.float64))
    tl.debug_barrier()
    mean = total / tl.maximum(n.to(tl.float64), 1.0)
    for first in range(0, n, BLOCK):
        m = first + tl.arange(0, BLOCK)
        d = tl.load(to + m, mask=m < n, other=0.0).to(tl.float64) - mean
        squares += tl.sum(tl.where(m < n, d * d, 0.0), 0)
    return mean, squares / tl.maximum(n.to(tl.float64), 1.0), high > low


@triton.jit
def _pair(x, y, m, other, s, t, use):
    """sgn(t - t') tanh(s - s') with the classes at `other`, and its slope."""
    d = s - tl.load(x + other, mask=use, other=0.0)
    u = tl.load(y + other, mask=use, other=0.0)
    sign = tl.where(t > u, 1.0, 0.0) - tl.where(t < u, 1.0, 0.0)
    r = 1.0 / (1.0 + tl.exp(tl.minimum(tl.maximum(2 * d, -60.0), 60.0)))
    sign = tl.where(use, sign, 0.0)
    return sign * (1 - 2 * r), sign * 4 * r * (1 - r)


@triton.jit
def _pairs(x, y, to, args_ptr, n, K, ALL: tl.constexpr, BLOCK: tl.constexpr):
    """Sum over the pairs (i, i + h), h of every shift or, ALL, of every other class; slopes go to `to`."""
    total = n.to(tl.float64) * 0
    steps = tl.where(n > 0, n - 1, 0) if ALL else tl.where(n > 0, K, 0)
    for first in range(0, n, BLOCK):
        m = first + tl.arange(0, BLOCK)
        s, t = tl.load(x + m, mask=m < n, other=0.0), tl.load(y + m, mask=m < n, other=0.0)
        value, slope = s.to(tl.float64) * 0, s.to(tl.float64) * 0
        for k in range(steps):
            if ALL:
                h = n * 0 + 1 + k
            else:
                h = 1 + tl.minimum(n - 2, (tl.load(args_ptr + k) * (n - 1).to(tl.float64)).to(tl.int64))
            after = tl.where(m + h < n, m + h, m + h - n)
            v, d = _pair(x, y, m, after, s, t, m < n)
            value += v
            slope += d
            if not ALL:
                _v, d = _pair(x, y, m, tl.where(m - h < 0, m - h + n, m - h), s, t, m < n)
                slope += d
        total += tl.sum(value, 0)
        tl.store(to + m, slope.to(tl.float32), mask=m < n)
    tl.debug_barrier()
    return total


@triton.jit(do_not_specialize=["grad_row", "B", "N", "vocab", "width", "ignore", "room", "K"])
def kendall_kernel(
    s_ptr, t_ptr, label_ptr, mask_ptr, top_ptr, grad_ptr, longs, floats, ints, value_ptr, out_ptr, s_a, s_b, t_a, t_b,
    grad_row, B, N, vocab, width, ignore, room, tau, shifts_ptr, K, ALL: tl.constexpr, HAS_LABEL: tl.constexpr,
    HAS_TOP: tl.constexpr, HAS_MASK: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """value[n] and g times the gradient. A program has room for so many live classes: a long, 3 floats and an int."""
    me, all = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    longs, x, classes = longs + me * room, floats + me * 3 * room, ints + me * room
    y, slopes = x + room, x + 2 * room
    for round in range(tl.cdiv(N - me, all)):
        n = me + round * all
        s_row, t_row, limit, nan, keep, g, count = live_row(
            s_ptr, t_ptr, label_ptr, mask_ptr, top_ptr, grad_ptr, classes, longs, n, s_a, s_b, t_a, t_b, grad_row, B,
            vocab, ignore, HAS_LABEL, HAS_TOP, HAS_MASK, BLOCK,
        )  # fmt: skip
        mean, variance, varied = _spread_of(s_row, classes, x, count, BLOCK)
        _mean, _variance, _varied = _spread_of(t_row, classes, y, count, BLOCK)
        varied = varied & (variance > 0)
        count = tl.where(varied, count, 0)
        a = tau * tl.sqrt(tl.where(varied, variance, 1.0))
        for first in range(0, count, BLOCK):  # in units of a, which float32 may not have the inverse of
            m = first + tl.arange(0, BLOCK)
            d = tl.load(x + m, mask=m < count, other=0.0).to(tl.float64) - mean
            tl.store(x + m, (d / a).to(tl.float32), mask=m < count)
        g = -g / a
        tl.debug_barrier()
        total = _pairs(x, y, slopes, shifts_ptr, count, K, ALL, BLOCK)
        number = count.to(tl.float64)
        pairs = tl.maximum(number * (number - 1) if ALL else number * K, 1.0)
        tl.store(value_ptr + n, tl.where(keep, 1 - total / pairs + nan, 0.0))
        if GRADIENT:
            fill(out_ptr + n * width, width, limit, tl.where(g != 0, nan, 0.0).to(tl.float32), BLOCK)
            radial = number * 0
            for first in range(0, count, BLOCK):
                m = first + tl.arange(0, BLOCK)
                d = tl.load(x + m, mask=m < count, other=0.0).to(tl.float64)
                radial += tl.sum(tl.where(m < count, d * tl.load(slopes + m, mask=m < count, other=0.0), 0.0), 0)
            radial *= tau * tau / tl.maximum(number, 1.0)
            scale = g / pairs * (2.0 if ALL else 1.0)
            for first in range(0, tl.where(g != 0, count, 0), BLOCK):
                m = first + tl.arange(0, BLOCK)
                d = tl.load(x + m, mask=m < count, other=0.0).to(tl.float64)
                d = scale * (tl.load(slopes + m, mask=m < count, other=0.0).to(tl.float64) - radial * d)
                at = tl.load(classes + m, mask=m < count, other=0)
                tl.store(out_ptr + n * width + at, d.to(out_ptr.dtype.element_ty), mask=m < count)
        tl.debug_barrier()
