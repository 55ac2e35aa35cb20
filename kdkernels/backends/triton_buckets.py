"""Triton kernels of the outcomes of `kdkernels.buckets`: k classes of a row apart, the others one outcome.

    bucket         one program a row: reads s (w bytes a class at w bytes a logit), writes 8 (k + 6) bytes a row
    bucket_spread  one program a row: reads s, writes the gradient (2 w bytes a class)

A row's classes come sorted, so that a tile looks at its own only. The operators: `kdkernels.buckets._kernel`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import register_buckets
from .triton import INTERPRETED, _config, _given, _launch, _rows
from .triton_elements import _tile
from .triton_tape import INF, _times

NONE = tl.constexpr(1 << 40)  # in the place of -1, behind all classes


@triton.jit
def _add(m, z, s, live, scale):
    """Maximum and sum of exp(scale * s - m) with a tile's classes."""
    x = tl.where(live, scale.to(tl.float32) * (s - tl.max(tl.where(live, s, -INF), 0)), -INF)
    top = tl.max(tl.where(live, s, -INF), 0).to(tl.float64)
    more = tl.sum(tl.where(live & (s > -INF), tl.exp(x), 0.0), 0).to(tl.float64)
    high = tl.maximum(m, tl.where(more > 0, scale * top, -INF))
    z = z * tl.where(m == high, 1.0, tl.exp(m - high))
    return high, z + more * tl.where((more > 0) & (scale * top < high), tl.exp(scale * top - high), 1.0)


@triton.jit
def _apart(cols, sorted_ptr, j, k, end):
    """Which classes of a tile, that ends at `end`, stay apart; and the place of the first behind it."""
    apart, c = cols < 0, tl.load(sorted_ptr + j, mask=j < k, other=NONE)
    while c < end:
        apart = apart | (cols == c)
        j += 1
        c = tl.load(sorted_ptr + j, mask=j < k, other=NONE)
    return apart, j


@triton.jit(do_not_specialize=["B", "vocab", "k", "scale_row"])
def bucket_kernel(
    s_ptr, mask_ptr, classes_ptr, sorted_ptr, scale_ptr, label_ptr, out_ptr, own_ptr, stats_ptr, s_a, s_b, B, vocab, k,
    scale_row, TAIL: tl.constexpr, LABEL: tl.constexpr, HAS_MASK: tl.constexpr, KP: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out (N, k + TAIL), own (N, 2) of the label and the rest, stats (N, 3): log-sum-exp of both, and the maximum."""
    n, vocab = tl.program_id(0).to(tl.int64), vocab // ALIGN * ALIGN
    s_ptr += (n // B) * s_a + (n % B) * s_b
    one, y = n.to(tl.float64) * 0.0 + 1.0, n * 0 - 1
    scale = tl.load(scale_ptr + n * scale_row) if TAIL else one
    if LABEL:
        y = tl.load(label_ptr + n)
    m, z, m2, z2, top = one - INF, one - 1.0, one - INF, one - 1.0, one.to(tl.float32) - INF
    j, damaged = n * 0, tl.zeros((BLOCK,), tl.int32)
    for first in range(0, vocab, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        s, _t, live, bad = _tile(s_ptr, s_ptr, mask_ptr, cols, vocab, False, HAS_MASK)
        damaged, live = damaged | bad.to(tl.int32), live & (bad == 0)
        top = tl.maximum(top, tl.max(tl.where(live, s, -INF), 0))
        if TAIL:
            apart, j = _apart(cols, sorted_ptr + n * k, j, k, first + BLOCK)
            m, z = _add(m, z, s, live & (apart == 0), scale)
        if LABEL:
            m2, z2 = _add(m2, z2, s, live & (cols != y), one)
    nan = tl.where(tl.max(damaged, 0) > 0, float("nan"), 0.0).to(tl.float64)
    tail = tl.where(z > 0, m + tl.log(tl.where(z > 0, z, 1.0)), -INF) + nan
    rest = tl.where(z2 > 0, m2 + tl.log(tl.where(z2 > 0, z2, 1.0)), -INF) + nan
    tl.store(stats_ptr + n * 3, tail)
    tl.store(stats_ptr + n * 3 + 1, rest)
    tl.store(stats_ptr + n * 3 + 2, tl.where(top > -INF, top, 0.0).to(tl.float64))
    at = tl.arange(0, KP)
    c = tl.load(classes_ptr + n * k + at, mask=at < k, other=-1)
    has = c >= 0
    if HAS_MASK:
        has = has & (tl.load(mask_ptr + c, mask=has, other=0) != 0)
    out_ptr += n * (k + TAIL)
    tl.store(out_ptr + at, tl.load(s_ptr + c, mask=has, other=-INF).to(tl.float64), mask=at < k)
    if TAIL:
        tl.store(out_ptr + k, tail * (1.0 / scale))
    if LABEL:
        has = y >= 0
        if HAS_MASK:
            has = has & (tl.load(mask_ptr + y, mask=has, other=0) != 0)
        tl.store(own_ptr + 2 * n, tl.load(s_ptr + y, mask=has, other=-INF).to(tl.float64))
        tl.store(own_ptr + 2 * n + 1, rest)


@triton.jit
def _share(s, top, scale, total, by):
    """by * exp(scale * s - total): what a class gets of the gradient of a sum, whose log-sum-exp is total."""
    lam = tl.where(total == -INF, -INF, scale * top - total).to(tl.float32)
    return _times(by.to(tl.float32), tl.exp(scale.to(tl.float32) * (s - top.to(tl.float32)) + lam))


@triton.jit(do_not_specialize=["B", "vocab", "width", "k", "scale_row"])
def bucket_spread_kernel(
    grad_ptr, own_ptr, s_ptr, mask_ptr, sorted_ptr, order_ptr, scale_ptr, label_ptr, stats_ptr, out_ptr, s_a, s_b, B,
    vocab, width, k, scale_row, TAIL: tl.constexpr, LABEL: tl.constexpr, HAS_MASK: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out (N, width): what comes in for a class that stays apart, for the label and the rest, and of the bucket."""
    n, vocab, width = tl.program_id(0).to(tl.int64), vocab // ALIGN * ALIGN, width // ALIGN * ALIGN
    s_ptr += (n // B) * s_a + (n % B) * s_b
    grad_ptr += n * (k + TAIL)
    one, y, j = n.to(tl.float64) * 0.0 + 1.0, n * 0 - 1, n * 0
    tail, rest, top = tl.load(stats_ptr + n * 3), tl.load(stats_ptr + n * 3 + 1), tl.load(stats_ptr + n * 3 + 2)
    by, scale, by_label, by_rest = one * 0.0, one, one * 0.0, one * 0.0
    if TAIL:
        by, scale = tl.load(grad_ptr + k), tl.load(scale_ptr + n * scale_row)
    if LABEL:
        y, by_label, by_rest = tl.load(label_ptr + n), tl.load(own_ptr + 2 * n), tl.load(own_ptr + 2 * n + 1)
    for first in range(0, width, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        s, _t, live, _bad = _tile(s_ptr, s_ptr, mask_ptr, cols, vocab, False, HAS_MASK)
        d = tl.where(live, _share(s, top, scale, tail, by), 0.0)
        c = tl.load(sorted_ptr + n * k + j, mask=j < k, other=NONE)
        while c < first + BLOCK:
            g = tl.load(grad_ptr + tl.load(order_ptr + n * k + j)).to(tl.float32)
            d = tl.where(cols == c, g, d)
            j += 1
            c = tl.load(sorted_ptr + n * k + j, mask=j < k, other=NONE)
        if LABEL:
            d += tl.where(cols == y, by_label.to(tl.float32), 0.0)
            d += tl.where(live & (cols != y), _share(s, top, one, rest, by_rest), 0.0)
        tl.store(out_ptr + n * width + cols, d.to(out_ptr.dtype.element_ty), mask=cols < width)


def _sorted(classes: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(classes < 0, NONE.value, classes).sort(-1)


def _scale(s: Tensor, inverse: Tensor | None) -> tuple[Tensor, int]:
    """1 / T, or any pointer, and the step from row to row."""
    return (s, 0) if inverse is None else (inverse.contiguous(), int(len(inverse) > 1))


@torch.library.custom_op("kdkernels::triton_bucket", mutates_args=())
def bucket(student: Tensor, mask: Tensor | None, classes: Tensor, inverse: Tensor | None, labels: Tensor | None,
           vocab: int) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Outcomes (N, k + 1), those of label and rest (N, 2), and what bucket_spread wants to know (N, 3)."""
    s, s_a, s_b = _rows(student, student)
    (y, masked), (scale, scale_row) = _given(s, labels, mask), _scale(s, inverse)
    (N, k), new, double = classes.shape, student.new_empty, torch.float64
    out = new((N, k + (inverse is not None)), dtype=double)
    own, stats = new((N if labels is not None else 0, 2), dtype=double), new((N, 3), dtype=double)
    if N:
        with _launch("bucket", s.device):
            bucket_kernel[(N,)](
                s, masked, classes.contiguous(), _sorted(classes)[0], scale, y, out, own, stats, s_a, s_b, s.shape[-2],
                vocab, k, scale_row, inverse is not None, labels is not None, mask is not None,
                triton.next_power_of_2(max(k, 1)), **_config(vocab),
            )  # fmt: skip
    return out, own, stats


@torch.library.custom_op("kdkernels::triton_bucket_spread", mutates_args=())
def bucket_spread(grad: Tensor, by_entropy: Tensor | None, student: Tensor, mask: Tensor | None, classes: Tensor,
                  inverse: Tensor | None, labels: Tensor | None, stats: Tensor, vocab: int) -> Tensor:  # fmt: skip
    """The gradient of the student's logits."""
    s, s_a, s_b = _rows(student, student)
    (y, masked), (scale, scale_row) = _given(s, labels, mask), _scale(s, inverse)
    out = torch.empty(s.shape, dtype=torch.float32 if INTERPRETED else s.dtype, device=s.device)
    if out.numel():
        by, (order, places) = s if by_entropy is None else by_entropy.contiguous(), _sorted(classes)
        with _launch("bucket_spread", s.device):
            bucket_spread_kernel[(len(classes),)](
                grad.contiguous(), by, s, masked, order, places, scale, y, stats, out, s_a, s_b, s.shape[-2], vocab,
                s.shape[-1], classes.shape[1], scale_row, inverse is not None, by_entropy is not None, mask is not None,
                **_config(s.shape[-1], vocab, each=512),
            )  # fmt: skip
    return out.to(s.dtype)


register_buckets("triton_")
BUCKET: tuple = (bucket, bucket_spread)
