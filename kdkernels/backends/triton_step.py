"""A training step in Triton: value and gradient of a row by one program, and the kernels around it.

    begin    one program: counts the rows (8 bytes a label)
    step     one program a row: reads s and t twice, the second time backwards, when the caches hold what was read last
             (2 w bytes a class and what they have lost of 2 w), and writes the gradient (w); 2 K exponentials a class
    rescale  leaves the gradient alone where the incoming one is 1
"""

import triton
import triton.language as tl

from .triton_elements import COEFS, STATS, reduce_kernel
from .triton_rows import finish_row
from .triton_slopes import slopes


@triton.jit(do_not_specialize=["N", "ignore", "high", "low"])
def begin_kernel(
    label_ptr, over_ptr, done_ptr, total_ptr, N, ignore, high, low, HAS_LABEL: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """over = high + low, which numbers in float32 only are passed for; of 0, the number of rows kept."""
    over = tl.zeros((), tl.float64) + high + low
    if over == 0:
        if HAS_LABEL:
            kept = tl.zeros((BLOCK,), tl.int64)
            for start in range(0, N, BLOCK):
                n = start + tl.arange(0, BLOCK)
                kept += (tl.load(label_ptr + n, mask=n < N, other=ignore) != ignore).to(tl.int64)
            over = tl.maximum(tl.sum(kept, 0).to(tl.float64), 1.0)
        else:
            over += tl.maximum(N, 1)
    tl.store(over_ptr, over)
    tl.store(done_ptr, 0)
    tl.store(total_ptr, 0.0)


@triton.jit
def _total(values, done_ptr, total_ptr, N, BLOCK: tl.constexpr):
    """The last program to be done adds up the values of all rows, always in the same order."""
    tl.debug_barrier()
    if tl.atomic_add(done_ptr, 1) == N - 1:
        tl.debug_barrier()
        total = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, N, BLOCK):
            n = start + tl.arange(0, BLOCK)
            total += tl.load(values + n, mask=n < N, other=0.0, cache_modifier=".cg")
        tl.store(total_ptr, tl.sum(total, 0).to(tl.float32))


@triton.jit(do_not_specialize=["args_row", "B", "vocab", "width", "ignore", "weight_row", "N"])
def step_kernel(
    s_ptr, t_ptr, label_ptr, mask_ptr, args, program, weight, over_ptr, done_ptr, stats, coef, values, total_ptr,
    to_ptr, s_a, s_b, t_a, t_b, args_row, B, vocab, width, ignore, weight_row, N, TAPE: tl.constexpr, K: tl.constexpr,
    KP: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_LABEL: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, SECOND: tl.constexpr, ADD: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row n = (n // B, n % B): its statistics, its value and coefficients, its gradient to to_ptr (N, width), which may
    be the student's logits."""
    n, y = tl.program_id(0).to(tl.int64), tl.program_id(0).to(tl.int64) * 0 - 1
    reduce_kernel(s_ptr, t_ptr, label_ptr, mask_ptr, args, program, stats, s_a, s_b, t_a, t_b, args_row, B, vocab,
                  ignore, K, KP, HAS_TEACHER, HAS_LABEL, HAS_MASK, SECOND, ALIGN, BLOCK)  # fmt: skip
    coef += n * (K + 1) * COEFS
    value = finish_row(stats + n * (K + 1) * STATS, args + n * args_row, program, coef, TAPE, K)
    g = 1.0 / tl.load(over_ptr)
    if HAS_WEIGHT:
        g = tl.load(weight + n * weight_row) / tl.load(over_ptr)
    if HAS_LABEL:
        y = tl.load(label_ptr + n)
        g = tl.where(y == ignore, 0.0, g)
    tl.store(values + n + tl.arange(0, 1), tl.where(g == 0, 0.0, value * g))
    tl.debug_barrier()
    s_ptr += (n // B) * s_a + (n % B) * s_b
    t_ptr += (n // B) * t_a + (n % B) * t_b
    vocab, width = vocab // ALIGN * ALIGN, width // ALIGN * ALIGN
    tiles = tl.cdiv(width, BLOCK)
    for tile in range(tiles):
        cols = (tiles - 1 - tile) * BLOCK + tl.arange(0, BLOCK)
        d = slopes(cols, s_ptr, t_ptr, mask_ptr, y, coef, coef, g.to(tl.float32), vocab, K, HAS_TEACHER, HAS_MASK,
                   None, 0)  # fmt: skip
        to = to_ptr + n * width + cols
        if ADD:
            d += tl.load(to, mask=cols < width, other=0.0).to(tl.float32)
        tl.store(to, d.to(to_ptr.dtype.element_ty), mask=cols < width)
    _total(values, done_ptr, total_ptr, N, BLOCK)


@triton.jit(do_not_specialize=["count"])
def rescale_kernel(x_ptr, factor_ptr, count, BLOCK: tl.constexpr):
    """factor * x in place; 0 stays 0 whatever the factor."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < count, other=0.0).to(tl.float32)
        tl.store(x_ptr + at, tl.where(x == 0, 0.0, x * factor).to(x_ptr.dtype.element_ty), mask=at < count)
