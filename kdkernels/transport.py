"""A loss that relates the rows of a batch to each other by transport."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import backends, call
from .compare import RankLoss
from .options import check_count, check_number
from .rowwise import CLASSES


class SinkhornLoss(RankLoss):
    """`sum_ij P_ij C_ij / N, C_ij = sum_k |q_ik - p_jk|`, over the rows of a batch. [Cui et al. 2024, SinKD]

    P is exp(-C / epsilon), its rows and then its columns divided by their sums, `iterations` times. The gradient goes
    through P, to the teacher as well. Torch computes it, in float32 for logits of 32 bits or less (sums and P in
    float64; C has C++ kernels on a CPU), some of the classes at a time and once more in the backward: in memory of N^2
    and of a copy of narrower logits; row_weight is refused.

    Args:
        temperature: T > 0 of both softmaxes.
        epsilon: > 0, entropic regularisation.
        iterations: >= 1.
        reduction: "mean", over the kept rows, or "sum".
    """

    work = "torch, in passes: 8 exp, 2 N differences"
    teacher_gradient = True
    rowwise = False

    def __init__(self, temperature: float = 2.0, epsilon: float = 0.1, iterations: int = 20, **options: Any):
        super().__init__(temperature=temperature, **options)
        self.epsilon, self.iterations = epsilon, iterations

    def check(self):
        check_number("epsilon", self.epsilon, above=0)
        check_count("iterations", self.iterations)
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum' for a loss over whole batches, got {self.reduction!r}")

    def minimizer(self, teacher_logits, labels=None):
        raise NotImplementedError("SinkhornLoss is not 0 at the teacher's logits: P moves mass between rows")

    def _term(self, rows: Any, student_logits, num_items, temperature):
        backends.definition(type(self).__name__)
        if rows.weight is not None:
            raise ValueError("row_weight is not for SinkhornLoss, whose rows are related to each other")
        _, divisor = call.weighting(self, rows, num_items)
        if not rows.student.numel():
            return (rows.student.sum() + rows.teacher.sum()).to(call.result_dtype(student_logits))
        T = self.temperature if temperature is None else temperature
        if isinstance(T, Tensor) and T.dim():
            if self.t_squared:
                raise ValueError("temperature must be one number for t_squared: the rows of a batch share the factor")
            T = T.reshape(-1, 1)
        keep = None if rows.labels is None else rows.labels != self.ignore_index
        cost = _cost(rows, keep, T)
        some = torch.ones_like(cost[:, 0]) if keep is None else keep.to(cost.dtype)
        value = transport(cost, some, self.epsilon, self.iterations)
        if self.t_squared:
            value = value * (T * T)
        value = value * self.kd_weight / (divisor or some.sum().clamp(min=1))
        return value.to(call.result_dtype(student_logits))


def _cost(rows: call.Rows, keep: Tensor | None, T) -> Tensor:
    """(N, N) float64: sum_k |q_ik - p_jk|. Rows that are not kept count as zeros."""
    assert rows.teacher is not None
    pair = [x.reshape(-1, x.shape[-1])[:, : rows.vocab] for x in (rows.student, rows.teacher)]
    backend = backends.pick(*pair)
    double = any(x.dtype == torch.float64 for x in pair) or backend.__name__.endswith("reference")
    kernels = None if double else getattr(backend, "DISTANCES", None)
    step = max(4 * CLASSES // max(len(pair[0]), 1), 1)
    pair = [x.to(torch.float64 if double else torch.float32) for x in pair]  # gradients of pieces add up in that
    pieces = list(zip(*(x.split(step, -1) for x in pair), strict=True))
    masks = [None] * len(pieces) if rows.mask is None else rows.mask.split(step)

    def scaled(x, mask):
        x = x if mask is None else torch.where(mask, x, -math.inf)
        x = x if keep is None else torch.where(keep[:, None], x, 0.0)
        return x / (T.to(x.dtype) if isinstance(T, Tensor) else T)

    def mass(x, top, mask):
        return (scaled(x, mask) - top).exp().sum(-1, keepdim=True, dtype=torch.float64)

    def distance(s, t, tops, totals, mask):
        q, p = ((scaled(x, mask) - top).exp() / z.to(top.dtype) for x, top, z in zip((s, t), tops, totals, strict=True))
        return _Distances.apply(q, p, kernels) if kernels else torch.cdist(q, p, p=1.0).double()

    with torch.no_grad():
        tops = [torch.stack([scaled(x[side], m).amax(-1, keepdim=True) for x, m in zip(pieces, masks, strict=True)])
                .amax(0) for side in (0, 1)]  # fmt: skip
    again = partial(checkpoint, use_reentrant=False) if len(pieces) > 1 else lambda function, *inputs: function(*inputs)
    totals = [sum(again(mass, x[side], tops[side], m) for x, m in zip(pieces, masks, strict=True)) for side in (0, 1)]
    return cast(Tensor, sum(again(distance, *x, tops, totals, m) for x, m in zip(pieces, masks, strict=True)))


class _Distances(torch.autograd.Function):
    """L1 distances (N, M) float64 between the rows of x (N, V) and y (M, V), by a backend's two operators."""

    @staticmethod
    def forward(ctx, x, y, operators):
        x, y = x.contiguous(), y.contiguous()
        ctx.save_for_backward(x, y)
        ctx.slopes = operators[1]
        return operators[0](x, y)

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        by_x, by_y = ctx.needs_input_grad[:2]
        return (ctx.slopes(grad.contiguous(), x, y) if by_x else None,
                ctx.slopes(grad.T.contiguous(), y, x) if by_y else None, None)  # fmt: skip


def transport(cost: Tensor, some: Tensor, epsilon: float, iterations: int) -> Tensor:
    """sum_ij P_ij C_ij of the rows and columns with some = 1."""
    alone = (some[:, None] * some) == 0
    log_plan = torch.where(alone, -1e300, -cost / epsilon)  # logarithms: at a small epsilon whole rows are 0
    for _ in range(iterations):
        for dim in (1, 0):
            log_plan = log_plan - torch.where(alone, 0.0, log_plan.logsumexp(dim, keepdim=True))
    return (torch.where(alone, 0.0, log_plan.exp()) * cost).sum()
