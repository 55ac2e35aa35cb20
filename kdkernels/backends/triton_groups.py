"""Triton kernels of moments by groups of classes. Formats: `kdkernels.groups`.

    groups  one program a row and group: the numbers of its classes (8 bytes, of all rows: from L2) and their logits,
            for tops, then for sums (from L2): 2 w bytes a class at w bytes a logit; writes 24 bytes a group
    spread  one program a row and tile: both rows, writes one gradient: 3 w bytes a class

Elements are float32 relative to the top of their group, sums float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import groups
from . import triton as base
from .triton_lapsum import live_pair, row_at
from .triton_tape import INF, _times


@triton.jit
def _some(order_ptr, m, end, vocab, y, skip, BY_LABEL: tl.constexpr):
    """The classes at places m of the order, or those themselves but the label's; `vocab` is none."""
    if BY_LABEL:
        return tl.where((m < end) & ((m != y) | (skip == 0)), m, vocab)
    return tl.load(order_ptr + m, mask=m < end, other=2147483647)


@triton.jit(do_not_specialize=["args_row", "B", "vocab", "ignore"])
def group_kernel(
    s_ptr, t_ptr, label_ptr, mask_ptr, args_ptr, order_ptr, start_ptr, out_ptr, s_a, s_b, t_a, t_b, args_row, B, vocab,
    ignore, BY_LABEL: tl.constexpr, HAS_LABEL: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[n, g] (3): log-partitions of the student's and the teacher's classes, and the mean of a t - b s."""
    n, g, zero = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(0).to(tl.float64) * 0
    s_ptr, t_ptr, limit, nan, _keep, _g, _edge, _last = row_at(
        s_ptr, t_ptr, label_ptr, label_ptr, args_ptr, n, s_a, s_b, t_a, t_b, 0, B, vocab, ignore, HAS_LABEL, False
    )
    b, a, y = tl.load(args_ptr + n * args_row), tl.load(args_ptr + n * args_row + 1), n * 0 - 1
    if BY_LABEL:
        y = tl.load(label_ptr + n)
        inside = (y >= 0) & (y < limit)
        first, end = tl.where((g == 1) & inside, y, 0), tl.where(g == 1, tl.where(inside, y + 1, 0), limit)
    else:
        first, end = tl.load(start_ptr + g), tl.where(limit > 0, tl.load(start_ptr + g + 1), 0)
    S, T, spoilt = tl.full((), -INF, tl.float32), tl.full((), -INF, tl.float32), tl.zeros((BLOCK,), tl.int32)
    for at in range(first, end, BLOCK):
        cols = _some(order_ptr, at + tl.arange(0, BLOCK), end, vocab, y, g == 0, BY_LABEL)
        s, t, live, bad = live_pair(s_ptr, t_ptr, mask_ptr, cols, vocab, -1, 0, HAS_MASK, True)
        spoilt = spoilt | bad.to(tl.int32)
        S, T = tl.maximum(S, tl.max(tl.where(live, s, -INF), 0)), tl.maximum(T, tl.max(tl.where(live, t, -INF), 0))
    S0, T0 = tl.where(S == -INF, 0.0, S), tl.where(T == -INF, 0.0, T)
    z, zt, far = zero, zero, zero
    for at in range(first, end, BLOCK):
        cols = _some(order_ptr, at + tl.arange(0, BLOCK), end, vocab, y, g == 0, BY_LABEL)
        s, t, live, _bad = live_pair(s_ptr, t_ptr, mask_ptr, cols, vocab, -1, 0, HAS_MASK, True)
        u, v = b.to(tl.float32) * (s - S0), a.to(tl.float32) * (t - T0)
        p = tl.where(live, tl.exp(v), 0.0)
        z += tl.sum(tl.where(live, tl.exp(u), 0.0), 0).to(tl.float64)
        zt += tl.sum(p, 0).to(tl.float64)
        far += tl.sum(tl.where(p > 0, p * (v - u), 0.0), 0).to(tl.float64)
    nan += tl.where(tl.max(spoilt, 0) > 0, float("nan"), 0.0)
    lse, lse_t = b * S0 + tl.log(tl.where(z > 0, z, 1.0)), a * T0 + tl.log(tl.where(zt > 0, zt, 1.0))
    kept = limit > 0
    out_ptr += (n * tl.num_programs(1) + g) * 3
    tl.store(out_ptr, nan + tl.where(z > 0, lse, tl.where(kept, -INF, 0.0)))
    tl.store(out_ptr + 1, nan + tl.where(zt > 0, lse_t, tl.where(kept, -INF, 0.0)))
    tl.store(out_ptr + 2, nan + tl.where(zt > 0, far / tl.where(zt > 0, zt, 1.0) + a * T0 - b * S0, 0.0))


@triton.jit
def _weight(x, scale, lse):
    """e^(scale x - lse), 0 where either is -inf."""
    there = (x > -INF) & (lse != -INF)
    return tl.where(there, tl.exp(tl.where(there, scale * x.to(tl.float64) - lse, 0.0).to(tl.float32)), 0.0)


@triton.jit(do_not_specialize=["args_row", "B", "G", "vocab", "width", "ignore"])
def group_spread_kernel(
    slope_ptr, moment_ptr, s_ptr, t_ptr, label_ptr, mask_ptr, args_ptr, group_ptr, out_ptr, s_a, s_b, t_a, t_b,
    args_row, B, G, vocab, width, ignore, SIDE: tl.constexpr, BY_LABEL: tl.constexpr, HAS_LABEL: tl.constexpr,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Within the groups, the student's b (q_i gL - p_i gM) or the teacher's a p_i (gP + gM (1 + x_i - M))."""
    n, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    s_ptr, t_ptr, limit, _nan, _keep, _g, _edge, _last = row_at(
        s_ptr, t_ptr, label_ptr, label_ptr, args_ptr, n, s_a, s_b, t_a, t_b, 0, B, vocab, ignore, HAS_LABEL, False
    )
    b, a = tl.load(args_ptr + n * args_row), tl.load(args_ptr + n * args_row + 1)
    s, t, live, _bad = live_pair(s_ptr, t_ptr, mask_ptr, cols, limit, -1, 0, HAS_MASK, True)
    group = (cols == tl.load(label_ptr + n)).to(tl.int64) if BY_LABEL else tl.load(group_ptr + cols, mask=live, other=0)
    at = (n * G + group) * 3
    by_mean = tl.load(slope_ptr + at + 2, mask=live, other=0.0)
    p = _weight(t, a, tl.load(moment_ptr + at + 1, mask=live, other=0.0)).to(tl.float64)
    if SIDE:
        by, mean = tl.load(slope_ptr + at + 1, mask=live, other=0.0), tl.load(moment_ptr + at + 2, mask=live, other=0.0)
        d = a * _times(p, by + _times(by_mean, 1 + (a * t.to(tl.float64) - b * s.to(tl.float64) - mean)))
    else:
        lse, by = tl.load(moment_ptr + at, mask=live, other=0.0), tl.load(slope_ptr + at, mask=live, other=0.0)
        d = b * (_times(_weight(s, b, lse).to(tl.float64), by) - _times(p, by_mean))
    whole = tl.load(moment_ptr + n * G * 3 + 2)  # NaN in all groups of a spoilt row
    d = tl.where(live, d, 0.0) + tl.where(cols < limit, tl.where(whole != whole, float("nan"), 0.0), 0.0)
    tl.store(out_ptr + n * width + cols, d.to(out_ptr.dtype.element_ty), mask=cols < width)


def _ordered(groups: Tensor | None, count: int, vocab: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The classes by group, and where each group begins."""
    if groups is None:
        return like, like
    in_order, order = groups[:vocab].sort(stable=True)
    return order, torch.searchsorted(in_order, torch.arange(count + 1, device=groups.device))


@torch.library.custom_op("kdkernels::triton_group_moments", mutates_args=())
def group_moments(student: Tensor, teacher: Tensor, labels: Tensor | None, mask: Tensor | None, args: Tensor,
                  groups: Tensor | None, count: int, vocab: int, ignore_index: int) -> Tensor:  # fmt: skip
    (s, s_a, s_b), (t, t_a, t_b) = base._rows(student, student), base._rows(teacher, student)
    N, args = s.shape[:-1].numel(), base._there(args, s.device)
    out = s.new_empty((N, count, 3), dtype=torch.float64)
    order, starts = _ordered(groups, count, vocab, s)
    if N:
        config = base._config(min(vocab, 1024))  # wider tiles spill on sm_80
        with base._launch("group_moments", s.device):
            group_kernel[(N, count)](
                s, t, *base._given(s, labels, mask), args, order, starts, out, s_a, s_b, t_a, t_b,
                args.shape[1] * (len(args) > 1), s.shape[-2], vocab, ignore_index, groups is None, labels is not None,
                mask is not None, config["BLOCK"], num_warps=config["num_warps"],
            )  # fmt: skip
    none = (out[..., :2] == -torch.inf).all(1).any(-1)  # no distribution on one side
    return torch.where((none | out.isnan().any(-1).any(-1))[:, None, None], torch.nan, out)


@torch.library.custom_op("kdkernels::triton_group_spread", mutates_args=())
def group_spread(slopes: Tensor, moments: Tensor, student: Tensor, teacher: Tensor, labels: Tensor | None,
                 mask: Tensor | None, args: Tensor, groups: Tensor | None, count: int, vocab: int, ignore_index: int,
                 side: int) -> Tensor:  # fmt: skip
    (s, s_a, s_b), (t, t_a, t_b) = base._rows(student, student), base._rows(teacher, student)
    own, args = t if side else s, base._there(args, s.device)
    out = torch.empty(own.shape, dtype=torch.float32 if base.INTERPRETED else own.dtype, device=s.device)
    width, config = own.shape[-1], base._config(own.shape[-1])
    if out.numel():
        grid = len(moments), triton.cdiv(width, config["BLOCK"])
        with base._launch("group_spread", s.device):
            group_spread_kernel[grid](
                slopes.contiguous(), moments, s, t, *base._given(s, labels, mask), args,
                s if groups is None else groups, out, s_a, s_b, t_a, t_b, args.shape[1] * (len(args) > 1), s.shape[-2],
                count, vocab, width, ignore_index, side, groups is None, labels is not None, mask is not None,
                config["BLOCK"], num_warps=config["num_warps"],
            )  # fmt: skip
    return out.to(own.dtype)


groups.register("triton_")
GROUPED = (group_moments, group_spread)
