"""Triton kernels of the rank losses that sort: short rows, few classes of a row, exact float32 ranks.

    top       the teacher's largest classes as a threshold: 4 bits of the key at a time, one read of both rows each
    spearman  a radix sort of both rows in L2, 4 bits at a time, then the scans of `triton_lapsum.lapsum`

Programs stay for several rows. A row of n live classes is read once from memory, and 8 n bytes move twice for each 4
bits of the keys that differ. A call repeats to the bit.
"""

import triton
import triton.language as tl

from .triton_lapsum import COUNT, lapsum, live_pair, order_key, row_at


@triton.jit(do_not_specialize=["B", "vocab", "k"])
def top_kernel(
    s_ptr, t_ptr, mask_ptr, out_ptr, s_a, s_b, t_a, t_b, B, vocab, k, LOWEST: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out (N, 2): the k-th largest teacher key among the live classes, and the last class of that key that counts.

    -1 where all live classes count. Keys differ in bits from LOWEST on.
    """
    n, lane = tl.program_id(0).to(tl.int64), tl.arange(0, 16)
    s_ptr += (n // B) * s_a + (n % B) * s_b
    t_ptr += (n // B) * t_a + (n % B) * t_b
    edge, wanted, total = n * 0, n * 0 + k, n * 0
    for step in tl.static_range((32 - LOWEST) // 4):
        shift = 28 - 4 * step
        counts = tl.zeros((16,), tl.int32)
        for first in range(0, vocab, BLOCK):
            cols = first + tl.arange(0, BLOCK)
            _s, t, live, _bad = live_pair(s_ptr, t_ptr, mask_ptr, cols, vocab, -1, 0, HAS_MASK, False)
            key = order_key(t) >> shift
            live = live & ((key >> 4) == (edge >> (shift + 4)))
            counts += tl.sum((live[:, None] & ((key & 15).to(tl.int32)[:, None] == lane[None, :])).to(tl.int32), 0)
        if step == 0:
            total += tl.sum(counts, 0)
        no_less = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
        digit = tl.max(tl.where(no_less >= wanted, lane, 0), 0)
        wanted -= tl.sum(tl.where(lane > digit, counts, 0), 0)
        edge = edge | (digit.to(tl.int64) << shift)
    edge += tl.where(edge < 2147483648, (1 << LOWEST) - 1, 0)  # the low bits of a negative number's key are set
    seen, last = n * 0, n * 0
    for first in range(0, vocab, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        _s, t, live, _bad = live_pair(s_ptr, t_ptr, mask_ptr, cols, vocab, -1, 0, HAS_MASK, False)
        same = (live & (order_key(t) == edge)).to(tl.int64)
        last = tl.maximum(last, tl.max(tl.where((same > 0) & (seen + tl.cumsum(same, 0) == wanted), cols, 0), 0))
        seen += tl.sum(same, 0)
    tl.store(out_ptr + 2 * n, tl.where(total <= k, -1, edge))
    tl.store(out_ptr + 2 * n + 1, last)


@triton.jit
def gather_live(
    s_ptr, t_ptr, mask_ptr, classes, keys, vocab, edge, last, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
    BOTH: tl.constexpr,
):  # fmt: skip
    """The live classes, and the teacher's keys with their places below. How many; whether the row is spoilt."""
    count, spoilt = edge * 0, tl.zeros((BLOCK,), tl.int32)
    for first in range(0, vocab, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        _s, t, live, bad = live_pair(s_ptr, t_ptr, mask_ptr, cols, vocab, edge, last, HAS_MASK, BOTH)
        spoilt = spoilt | bad.to(tl.int32)
        at = count + tl.cumsum(live.to(tl.int64), 0) - 1
        tl.store(classes + at, cols, mask=live)
        tl.store(keys + at, (order_key(t) << 32) | at, mask=live)
        count += tl.sum(live.to(tl.int64), 0)
    spoilt = tl.max(spoilt, 0) > 0
    tl.debug_barrier()
    return tl.where(spoilt, 0, count), spoilt


@triton.jit
def live_row(
    s_ptr, t_ptr, label_ptr, mask_ptr, top_ptr, grad_ptr, classes, keys, n, s_a, s_b, t_a, t_b, grad_row, B, vocab,
    ignore, HAS_LABEL: tl.constexpr, HAS_TOP: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
    BOTH: tl.constexpr = False,
):  # fmt: skip
    """`row_at` and `gather_live` of row n: its logits, its classes, NaN for one that is spoilt or of a strange label,
    whether it is kept, g, and how many live."""
    s_row, t_row, limit, nan, keep, g, edge, last = row_at(
        s_ptr, t_ptr, label_ptr, top_ptr, grad_ptr, n, s_a, s_b, t_a, t_b, grad_row, B, vocab, ignore, HAS_LABEL,
        HAS_TOP,
    )  # fmt: skip
    count, spoilt = gather_live(s_row, t_row, mask_ptr, classes, keys, limit, edge, last, HAS_MASK, BLOCK, BOTH)
    nan = (nan + tl.where(spoilt, float("nan"), 0.0)).to(tl.float32)  # it lives long: one register
    return s_row, t_row, limit, nan, keep, g, count


@triton.jit
def sort(keys, spare, n, BLOCK: tl.constexpr):
    """Sorts n keys by their high halves and returns where they are then, and the other place. Stable."""
    lane = tl.arange(0, 16)
    for step in range(8):
        shift = 32 + 4 * step
        counts = tl.zeros((16,), tl.int32)
        for first in range(0, n, BLOCK):
            m = first + tl.arange(0, BLOCK)
            digit = ((tl.load(keys + m, mask=m < n, other=0) >> shift) & 15).to(tl.int32)
            hot = (digit[:, None] == lane[None, :]) & (m < n)[:, None]
            counts += tl.sum(hot.to(tl.int32), 0)
        base = tl.cumsum(counts, 0) - counts
        if tl.max(counts, 0) < n:
            for first in range(0, n, BLOCK):
                m = first + tl.arange(0, BLOCK)
                x = tl.load(keys + m, mask=m < n, other=0)
                digit = ((x >> shift) & 15).to(tl.int32)
                hot = ((digit[:, None] == lane[None, :]) & (m < n)[:, None]).to(tl.int32)
                at = tl.sum(tl.where(hot > 0, base[None, :] + tl.cumsum(hot, 0) - 1, 0), 1)
                tl.store(spare + at, x, mask=m < n)
                base += tl.sum(hot, 0)
            tl.debug_barrier()
            keys, spare = spare, keys
    return keys, spare


@triton.jit
def place_of(packed):
    return packed & 0xFFFFFFFF


@triton.jit
def _later(a, b):
    return tl.maximum(a, b)


@triton.jit
def runs(keys, starts, n, BLOCK: tl.constexpr):
    """For each of n sorted keys the first position of the run of equal ones it is in."""
    carry = n * 0
    for first in range(0, n, BLOCK):
        m = first + tl.arange(0, BLOCK)
        key = tl.load(keys + m, mask=m < n, other=0) >> 32
        before = tl.load(keys + m - 1, mask=(m < n) & (m > 0), other=0) >> 32
        start = tl.associative_scan(tl.where((m == 0) | (key != before), m, 0).to(tl.int64), 0, _later)
        start = tl.maximum(start, carry)
        tl.store(starts + m, start.to(tl.int32), mask=m < n)
        carry = tl.max(tl.where(m < n, start, 0), 0)
    tl.debug_barrier()


@triton.jit
def end_of_run(keys, m, n, carry):
    """One past the last position of the run of sorted keys at each of descending positions m; what to carry on."""
    key = tl.load(keys + m, mask=m >= 0, other=0) >> 32
    after = tl.load(keys + m + 1, mask=(m >= 0) & (m + 1 < n), other=0) >> 32
    end = tl.associative_scan(tl.where((m + 1 >= n) | (key != after), -m, -n).to(tl.int64), 0, _later)
    end = tl.maximum(end, carry)
    return 1 - end, tl.max(tl.where(m >= 0, end, -n), 0)


@triton.jit
def _ranks(keys, starts, ranks, n, BLOCK: tl.constexpr):
    """Doubled centred mid-ranks by place, and the sum of their squares."""
    runs(keys, starts, n, BLOCK)
    squares, carry = n * 0, -n
    for first in range(0, n, BLOCK):
        m = n - 1 - first - tl.arange(0, BLOCK)
        end, carry = end_of_run(keys, m, n, carry)
        rank = tl.load(starts + m, mask=m >= 0, other=0) + end - n
        squares += tl.sum(tl.where(m >= 0, rank * rank, 0), 0)
        place = place_of(tl.load(keys + m, mask=m >= 0, other=0))
        tl.store(ranks + place, rank.to(tl.int32), mask=m >= 0)
    tl.debug_barrier()
    return squares


@triton.jit
def _sorted_student(s_row, classes, ranks, keys, spare, x_ptr, sums, n, BLOCK: tl.constexpr):
    """The student's numbers in order, each with its teacher's rank; returns where its keys are."""
    for first in range(0, n, BLOCK):
        m = first + tl.arange(0, BLOCK)
        s = tl.load(s_row + tl.load(classes + m, mask=m < n, other=0), mask=m < n, other=0.0).to(tl.float32)
        tl.store(keys + m, (order_key(s) << 32) | m, mask=m < n)
    tl.debug_barrier()
    keys, spare = sort(keys, spare, n, BLOCK)
    for first in range(0, n, BLOCK):
        m = first + tl.arange(0, BLOCK)
        place = place_of(tl.load(keys + m, mask=m < n, other=0))
        s = tl.load(s_row + tl.load(classes + place, mask=m < n, other=0), mask=m < n, other=0.0)
        tl.store(x_ptr + m, s.to(tl.float32), mask=m < n)
        tl.store(sums + m, (tl.load(ranks + place, mask=m < n, other=0).to(tl.int64) << COUNT) + 1, mask=m < n)
    tl.debug_barrier()
    return keys


@triton.jit
def fill(out_ptr, width, vocab, x, BLOCK: tl.constexpr):
    """x to the first vocab of width classes, 0 to the rest."""
    for first in range(0, width, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        d = tl.where(cols < vocab, x, 0.0).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + cols, d, mask=cols < width)
    tl.debug_barrier()


@triton.jit
def _write(out_ptr, keys, classes, sums, A, B, n, ADD: tl.constexpr, BLOCK: tl.constexpr):
    for first in range(0, n, BLOCK):
        m = first + tl.arange(0, BLOCK)
        rank = (tl.load(sums + m, mask=m < n, other=0) >> COUNT).to(tl.float32)
        d = tl.load(A + m, mask=m < n, other=0.0) * rank + tl.load(B + m, mask=m < n, other=0.0)
        at = tl.load(classes + place_of(tl.load(keys + m, mask=m < n, other=0)), mask=m < n, other=0)
        if ADD:
            d += tl.load(out_ptr + at, mask=m < n, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, d.to(out_ptr.dtype.element_ty), mask=m < n)


@triton.jit
def _sorted_row(
    s_ptr, t_ptr, label_ptr, mask_ptr, top_ptr, grad_ptr, longs, x, classes, value_ptr, out_ptr, n, s_a, s_b, t_a, t_b,
    grad_row, B, vocab, width, ignore, room, tau, HAS_LABEL: tl.constexpr, HAS_TOP: tl.constexpr,
    HAS_MASK: tl.constexpr, GRADIENT: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sums, ranks, starts = longs + 2 * room, classes + room, classes + 2 * room
    R, K, G = x + room, x + 2 * room, x + 3 * room
    s_row, _t_row, limit, nan, keep, g, count = live_row(
        s_ptr, t_ptr, label_ptr, mask_ptr, top_ptr, grad_ptr, classes, longs, n, s_a, s_b, t_a, t_b, grad_row, B,
        vocab, ignore, HAS_LABEL, HAS_TOP, HAS_MASK, BLOCK,
    )  # fmt: skip
    keys, spare = sort(longs, longs + room, count, BLOCK)
    squares = _ranks(keys, starts, ranks, count, BLOCK)
    keys = _sorted_student(s_row, classes, ranks, keys, spare, x, sums, count, BLOCK)
    total = count.to(tl.float64)
    value, fine = lapsum(x, sums, R, K, G, count, total, tau, squares.to(tl.float64), g, GRADIENT, BLOCK)
    tl.store(value_ptr + n, tl.where(keep, value + nan, 0.0))
    if GRADIENT:
        if not ADD:
            fill(out_ptr + n * width, width, limit, tl.where(g != 0, nan, 0.0).to(tl.float32), BLOCK)
        some = tl.where(fine & (g != 0), count, 0)
        _write(out_ptr + n * width, keys, classes, sums, K, R, some, ADD, BLOCK)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["grad_row", "B", "N", "vocab", "width", "ignore", "room"])
def spearman_sorted_kernel(
    s_ptr, t_ptr, label_ptr, mask_ptr, top_ptr, grad_ptr, longs, floats, ints, value_ptr, out_ptr, s_a, s_b, t_a, t_b,
    grad_row, B, N, vocab, width, ignore, room, tau, near, HAS_LABEL: tl.constexpr, HAS_TOP: tl.constexpr,
    HAS_MASK: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """value[n] and g times the gradient. A program has room for so many live classes: 3 longs, 4 floats and 3 ints.

    Unless it is None, only of rows n with near[n], and the gradient is added to what is there.
    """
    me, all = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    longs, floats, ints = longs + me * 3 * room, floats + me * 4 * room, ints + me * 3 * room
    for round in range(tl.cdiv(N - me, all)):
        n = me + round * all
        wanted = True
        if near is not None:
            wanted = tl.load(near + n) != 0
        if wanted:
            _sorted_row(
                s_ptr, t_ptr, label_ptr, mask_ptr, top_ptr, grad_ptr, longs, floats, ints, value_ptr, out_ptr, n, s_a,
                s_b, t_a, t_b, grad_row, B, vocab, width, ignore, room, tau, HAS_LABEL, HAS_TOP, HAS_MASK, GRADIENT,
                near is not None, BLOCK,
            )  # fmt: skip
