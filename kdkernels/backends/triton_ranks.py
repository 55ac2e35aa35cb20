"""Triton kernel of Spearman's loss without a sort: integer histograms in L2, four scans over their bins, one table.

Programs stay for several rows, each with tables of its own. Bytes a class, at w bytes a logit: 16-bit rows are read
three times, 6 w (once from memory, then from L2 where it holds the rows at work), and the gradient written, w: 7 w
where 3 w is the least; wider rows are read once more, for their moments: 9 w. Beside that two integer atomics a class
and 60 bytes a bin that occurs. Forward alone writes no gradient and reads once less. Sums of integers do not depend on
their order and all others have one, so that a call repeats to the bit.
"""

import triton
import triton.language as tl

from .triton_elements import COEFS, STATS, add_tile, label_of, no_classes, store_statistics
from .triton_lapsum import COUNT, count_of, lapsum, live_pair, narrow, row_at
from .triton_rows import finish_row
from .triton_slopes import slopes_of

CELLS = tl.constexpr(1 << 16)
# Cells of wide rows are those of floats of few bits, e + |x - c| / deviation up to 511, c the mean or, if that is near,
# 0. Of the student e is 2^-7 and a cell 2^-11 of a deviation there where most classes are; of the teacher, whose ranks
# rise within a cell, e is 2^-22.
LEAST_LOSS = tl.constexpr(256)  # over n: below it rows of cells are sorted, as csrc/cpu/grid.h says why


@triton.jit
def _cell(x, mean, scale, BY_BITS: tl.constexpr, HALF: tl.constexpr, TEACHER: tl.constexpr):
    """Cell of a number and its place in it: bits of a 16-bit one, else of e + |x - c| / deviation."""
    if BY_BITS:
        if HALF:
            bits = tl.where(x == 0, 0.0, x).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        else:
            bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True) >> 16
        return (bits ^ ((bits >> 31) & 0x7FFF)) + 32768, bits * 0
    y = ((x.to(tl.float64) - mean) * scale).to(tl.float32)
    e = 2.384185791015625e-07 if TEACHER else 0.0078125
    bits = (e + tl.minimum(tl.abs(y), 511.0)).to(tl.int32, bitcast=True) - (0x34800000 if TEACHER else 0x3C000000)
    bits = tl.where(y < 0, -bits, bits)
    return ((bits >> 13) + 32768, bits & 8191) if TEACHER else ((bits >> 12) + 32768, bits & 4095)


@triton.jit
def _number(cell, BY_BITS: tl.constexpr, HALF: tl.constexpr):
    """The number that stands for a cell of the student: itself, or in deviations from c the cell's middle."""
    at = cell - 32768
    if BY_BITS:
        bits = at ^ ((at >> 31) & 0x7FFF)
        if HALF:
            return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return (bits << 16).to(tl.float32, bitcast=True)
    bits = (at << 12) + 2048
    y = (tl.abs(bits) + 0x3C000000).to(tl.float32, bitcast=True) - 0.0078125
    return tl.where(bits < 0, -y, y)


@triton.jit
def pack(a, b):
    """Two float32 as one int64."""
    low = b.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return (a.to(tl.int32, bitcast=True).to(tl.int64) << 32) | low


@triton.jit
def unpack(x):
    return (x >> 32).to(tl.int32).to(tl.float32, bitcast=True), x.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _row_moments(s_ptr, t_ptr, mask_ptr, vocab, edge, last, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """Where cells are centred, the mean unless 0 is near, and inverse deviations of the live classes of both rows."""
    zero = edge.to(tl.float64) * 0.0
    n, a, b, aa, bb = zero, zero, zero, zero, zero
    for first in range(0, vocab, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        s, t, live, _bad = live_pair(s_ptr, t_ptr, mask_ptr, cols, vocab, edge, last, HAS_MASK, False)
        s, t = s.to(tl.float64), t.to(tl.float64)
        c = tl.sum(live.to(tl.float64), 0)
        f = tl.where(c > 0, c / tl.maximum(n + c, 1.0), 0.0)
        u = tl.sum(tl.where(live, s, 0.0), 0) / tl.maximum(c, 1.0)
        v = tl.sum(tl.where(live, t, 0.0), 0) / tl.maximum(c, 1.0)
        aa += tl.sum(tl.where(live, (s - u) * (s - u), 0.0), 0) + n * f * (u - a) * (u - a)
        bb += tl.sum(tl.where(live, (t - v) * (t - v), 0.0), 0) + n * f * (v - b) * (v - b)
        a, b, n = a + f * (u - a), b + f * (v - b), n + c
    some_a, some_b = tl.where(aa > 0, n, 0.0), tl.where(bb > 0, n, 0.0)
    a, b = tl.where(a * a * n < 4 * aa, 0.0, a), tl.where(b * b * n < 4 * bb, 0.0, b)
    return a, tl.sqrt(some_a / tl.where(aa > 0, aa, 1.0)), b, tl.sqrt(some_b / tl.where(bb > 0, bb, 1.0))


@triton.jit
def _count_teacher(
    s_ptr, t_ptr, mask_ptr, table, vocab, edge, last, mean_s, scale_s, mean_t, scale_t, so_far, own,
    BY_BITS: tl.constexpr, HALF: tl.constexpr, HAS_MASK: tl.constexpr, POINTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts of the teacher's cells; live classes, whether the row is spoilt, and the range of cells of both rows.

    And, with POINTS, what becomes of the statistics so far of a loss of the log-partition.
    """
    count, low, high = edge * 0, edge * 0 + CELLS, edge * 0
    spoilt = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, vocab, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        s, t, live, bad = live_pair(s_ptr, t_ptr, mask_ptr, cols, vocab, edge, last, HAS_MASK, False)
        spoilt = spoilt | bad.to(tl.int32)
        cell, rest = _cell(t, mean_t, scale_t, BY_BITS, HALF[1], True)
        at, _rest = _cell(s, mean_s, scale_s, BY_BITS, HALF[0], False)
        tl.atomic_add(table + cell, (rest.to(tl.int64) << COUNT) + 1, mask=live, sem="relaxed")
        count += tl.sum(live.to(tl.int64), 0)
        low = tl.minimum(low, tl.min(tl.where(live, tl.minimum(cell, at), CELLS), 0))
        high = tl.maximum(high, tl.max(tl.where(live, tl.maximum(cell, at) + 1, 0), 0))
        if POINTS is not None:
            t = t if POINTS[2] else tl.zeros_like(t)
            so_far = add_tile(so_far, s, t, cols, own[0], own[1], own[2], POINTS[0], POINTS[1], POINTS[2], POINTS[3])
    return count, tl.max(spoilt, 0) > 0, tl.minimum(low, high), high, so_far


@triton.jit
def _rank_lines(table, low, high, n, BLOCK: tl.constexpr):
    """Counts of cells become lines: the doubled centred rank at a place within the cell is offset + slope * place.

    Within a cell of c numbers it rises by 2 c around the cell's mid-rank, which belongs to their mean place.
    """
    below = -n
    for first in range(low, high, BLOCK):
        m = first + tl.arange(0, BLOCK)
        packed = tl.load(table + m, mask=m < high, other=0)
        c = count_of(packed)
        middle = (below + 2 * tl.cumsum(c, 0) - c).to(tl.float32)
        below += 2 * tl.sum(c, 0)
        slope = 2 * c.to(tl.float32) / 8192
        place = (packed >> COUNT).to(tl.float32) / tl.maximum(c, 1).to(tl.float32)
        tl.store(table + m, pack(middle - slope * place, slope), mask=m < high)


@triton.jit
def _rank(table, cell, place, live):
    offset, slope = unpack(tl.load(table + cell, mask=live, other=0, cache_modifier=".cg"))
    return tl.floor(offset + slope * place.to(tl.float32) + 0.5).to(tl.int64)


@triton.jit
def _sum_ranks(
    s_ptr, t_ptr, mask_ptr, table, vocab, edge, last, mean_s, scale_s, mean_t, scale_t,
    BY_BITS: tl.constexpr, HALF: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts of the student's cells and sums of the ranks there, in the second table; the sum of their squares."""
    squares = edge * 0
    for first in range(0, vocab, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        s, t, live, _bad = live_pair(s_ptr, t_ptr, mask_ptr, cols, vocab, edge, last, HAS_MASK, False)
        cell, rest = _cell(t, mean_t, scale_t, BY_BITS, HALF[1], True)
        rank = tl.where(live, _rank(table, cell, rest, live), 0)
        squares += tl.sum(rank * rank, 0)
        own, _rest = _cell(s, mean_s, scale_s, BY_BITS, HALF[0], False)
        tl.atomic_add(table + CELLS + own, (rank << COUNT) + 1, mask=live, sem="relaxed")
    return squares


@triton.jit
def _compact(table, x_ptr, cells, sums, low, high, BY_BITS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """The cells that occur, in order: their number, cell, and sum. Returns how many."""
    M = low * 0
    for first in range(low, high, BLOCK):
        cell = first + tl.arange(0, BLOCK)
        packed = tl.load(table + cell, mask=cell < high, other=0)
        some = count_of(packed) > 0
        at = M + tl.cumsum(some.to(tl.int64), 0) - 1
        tl.store(sums + at, packed, mask=some)
        tl.store(cells + at, cell.to(tl.int32), mask=some)
        tl.store(x_ptr + at, _number(cell.to(tl.int32), BY_BITS, HALF), mask=some)
        M += tl.sum(some.to(tl.int64), 0)
    return M


@triton.jit
def _place(table, cells, A, B, M, BLOCK: tl.constexpr):
    for first in range(0, M, BLOCK):
        m = first + tl.arange(0, BLOCK)
        line = pack(tl.load(A + m, mask=m < M, other=0.0), tl.load(B + m, mask=m < M, other=0.0))
        tl.store(table + tl.load(cells + m, mask=m < M, other=0), line, mask=m < M)


@triton.jit
def _write(
    s_ptr, t_ptr, mask_ptr, table, out_ptr, vocab, width, edge, last, mean_s, scale_s, mean_t, scale_t, nan, bend,
    own, BY_BITS: tl.constexpr, HALF: tl.constexpr, HAS_MASK: tl.constexpr, POINTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The line of the student's cell at the teacher's rank; `nan` to all classes. And, with POINTS, the gradient of the
    loss of the log-partition. Within a cell the soft rank rises by K / 2a, and the offset by `bend` A^2: A is K's."""
    for first in range(0, width, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        s, t, live, _bad = live_pair(s_ptr, t_ptr, mask_ptr, cols, vocab, edge, last, HAS_MASK, False)
        cell, rest = _cell(t, mean_t, scale_t, BY_BITS, HALF[1], True)
        at, _rest = _cell(s, mean_s, scale_s, BY_BITS, HALF[0], False)
        A, B = unpack(tl.load(table + CELLS + at, mask=live, other=0, cache_modifier=".cg"))
        if not BY_BITS:
            y = ((s.to(tl.float64) - mean_s) * scale_s).to(tl.float32) - _number(at, BY_BITS, HALF[0])
            B += (A * bend) * (A * tl.minimum(tl.maximum(y, -1.0), 1.0))
        d = tl.where(live, A * _rank(table, cell, rest, live).to(tl.float32) + B, 0.0)
        d = tl.where(cols < vocab, d + nan, 0.0)
        if POINTS is not None:
            t = t if POINTS[2] else tl.zeros_like(t)
            d += slopes_of(cols, s, t, own[0], own[3], own[3], own[4], vocab, POINTS[0], POINTS[2], None, 0)
        tl.store(out_ptr + cols, d.to(out_ptr.dtype.element_ty), mask=cols < width)


@triton.jit
def _clear(tables, low, high, BLOCK: tl.constexpr):
    tl.debug_barrier()
    for first in range(low, high, BLOCK):
        m = first + tl.arange(0, BLOCK)
        tl.store(tables + m, m * 0, mask=m < high)
        tl.store(tables + CELLS + m, m * 0, mask=m < high)
    tl.debug_barrier()


@triton.jit
def _row_of(also, label_ptr, n, vocab, ignore, HAS_LABEL: tl.constexpr, K: tl.constexpr):
    """Of row n and the loss of the log-partition: the label, args, the program, coefficients, the weight; statistics,
    the value, and whether the row is kept and damaged by its label."""
    args, program, weight, stats, coef, value, args_row, weight_row = also
    y, keep, strange = label_of(label_ptr, n, vocab, ignore, HAS_LABEL)
    g = tl.load(weight + n * weight_row).to(tl.float32)
    stats, coef = stats + n * (K + 1) * STATS, coef + n * (K + 1) * COEFS
    return y, args + n * args_row, program, coef, g, stats, value + n, keep, strange


@triton.jit
def _finish(own, so_far, s_row, t_row, mask_ptr, HAS_MASK: tl.constexpr, POINTS: tl.constexpr, TAPE: tl.constexpr):
    """Value and coefficients of `_row_of`, from the statistics of all its classes."""
    y, args, program, coef, _g, stats, value, keep, strange = own
    store_statistics(so_far, s_row, t_row, mask_ptr, y, keep, strange, program, stats, POINTS[0], POINTS[1], POINTS[2],
                     HAS_MASK)  # fmt: skip
    tl.store(value + tl.arange(0, 1), finish_row(stats, args, program, coef, TAPE, POINTS[0]))


@triton.jit(do_not_specialize=["grad_row", "B", "N", "vocab", "width", "ignore", "also"])
def spearman_kernel(
    s_ptr, t_ptr, label_ptr, mask_ptr, top_ptr, grad_ptr, tables, packed_ptr, floats, cells, value_ptr, out_ptr, s_a,
    s_b, t_a, t_b, grad_row, B, N, vocab, width, ignore, tau, BY_BITS: tl.constexpr, HALF: tl.constexpr,
    HAS_LABEL: tl.constexpr, HAS_TOP: tl.constexpr, HAS_MASK: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
    BINS: tl.constexpr, near=None, also=None, POINTS: tl.constexpr = None, TAPE: tl.constexpr = None,
):  # fmt: skip
    """value[n] and g times the gradient, left out where near[n]: a loss so near 0 or 2 that the row is to be sorted.
    tables (programs, 2, 65536) are 0, and left so. With POINTS = (K, lanes, whether it has a teacher, covariances) a
    loss of the log-partition has its value and gradient, of `also` = (args, program, weight, stats, coef, value, args
    and weight from row to row)."""
    me, all = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    here = me * CELLS
    tables, packed_ptr, cells, x = tables + 2 * here, packed_ptr + here, cells + here, floats + 4 * here
    for round in range(tl.cdiv(N - me, all)):
        n = me + round * all
        s_row, t_row, limit, nan, keep, g, edge, last = row_at(
            s_ptr, t_ptr, label_ptr, top_ptr, grad_ptr, n, s_a, s_b, t_a, t_b, grad_row, B, vocab, ignore, HAS_LABEL,
            HAS_TOP,
        )  # fmt: skip
        ms, rs, mt, rt = nan * 0, nan * 0 + 1, nan * 0, nan * 0
        if not BY_BITS:
            ms, rs, mt, rt = _row_moments(s_row, t_row, mask_ptr, limit, edge, last, HAS_MASK, BLOCK)
        own, so_far = (), ()
        if POINTS is not None:
            own, so_far = _row_of(also, label_ptr, n, vocab, ignore, HAS_LABEL, POINTS[0]), no_classes(POINTS[1], BLOCK)
        count, spoilt, low, high, so_far = _count_teacher(
            s_row, t_row, mask_ptr, tables, limit, edge, last, ms, rs, mt, rt, so_far, own, BY_BITS, HALF, HAS_MASK,
            POINTS, BLOCK,
        )  # fmt: skip
        if POINTS is not None:
            _finish(own, so_far, s_row, t_row, mask_ptr, HAS_MASK, POINTS, TAPE)
        tl.debug_barrier()
        _rank_lines(tables, low, high, count, BINS)
        tl.debug_barrier()
        squares = _sum_ranks(
            s_row, t_row, mask_ptr, tables, limit, edge, last, ms, rs, mt, rt, BY_BITS, HALF, HAS_MASK, BLOCK
        ).to(tl.float64)
        tl.debug_barrier()
        M = _compact(tables + CELLS, x, cells, packed_ptr, low, tl.where(spoilt, low, high), BY_BITS, HALF[0], BINS)
        tl.debug_barrier()
        total, slope = count.to(tl.float64), g * rs
        R, K, G = x + CELLS, x + 2 * CELLS, x + 3 * CELLS
        value, fine = lapsum(x, packed_ptr, R, K, G, M, total, tau, squares, slope, GRADIENT, BINS)
        bend = narrow((1 - value) * squares / tl.where(slope != 0, slope, 1.0))
        nan += tl.where(spoilt, float("nan"), 0.0)
        tl.store(value_ptr + n, tl.where(keep, value + nan, 0.0))
        if near is not None:
            small = tl.minimum(value, 2 - value) * total < LEAST_LOSS
            tl.store(near + n, small.to(tl.int8))
            fine = fine & (small == 0)
        if GRADIENT:
            tl.debug_barrier()
            _place(tables + CELLS, cells, K, R, M, BINS)
            tl.debug_barrier()
            use = tl.where(fine & (g != 0), edge, 1 << 40)  # nobody lives otherwise
            _write(
                s_row, t_row, mask_ptr, tables, out_ptr + n * width, limit, width, use, last, ms, rs, mt, rt,
                tl.where(g != 0, nan, 0.0).to(tl.float32), bend, own, BY_BITS, HALF, HAS_MASK, POINTS, BLOCK,
            )  # fmt: skip
        _clear(tables, low, high, BINS)
