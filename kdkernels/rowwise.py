"""Losses of the log-probabilities of whole rows, by their definition in torch: a few rows at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, call
from .alphabeta import P, Q
from .backends import reference
from .buckets import blocks
from .loss import Loss, Moment, Point, Program

# Where the moments of a point stand, at this one stand sums over the classes: s, t are those of the slopes of phi in
# log q and log p (see separable.py), ss and tt both the distance.
SUMS = Point(raw=True, frozen=True)
CLASSES = 1 << 20  # of a batch that are computed at a time


def is_sums(point: Point) -> bool:
    """Whether it is SUMS: not by == alone, for coefficients that are tensors compare to tensors."""
    return not any(isinstance(x, Tensor) for x in (point.student, point.teacher)) and point == SUMS


class RowsLoss(Loss):
    """A loss that torch computes in float64 from the log-probabilities of whole rows, a few rows at a time.

    Beside the gradient there is no memory that grows with the number of rows. There is a gradient for the teacher. With
    `kernels` a backend that has them does the work.
    """

    merges = False
    adds = False
    kernels = ""
    """The attribute of a backend that has kernels of the distance, if any does."""
    _cross_entropy: Loss
    unsharded: str | None = "it looks at whole rows"

    def points(self) -> tuple[Point, ...]:
        return Q, P

    def all_points(self) -> tuple[Point, ...]:
        return super().all_points() + ((SUMS,) if self.kd_weight else ())

    def distances(self, log_q: Tensor, log_p: Tensor, dead: Tensor, labels: Tensor | None = None) -> Tensor:
        """(N,) distances of rows (N, V) in float64; a class that is dead is none, its logarithms are -inf.

        labels: (N,) where the loss needs them; of a row that is left out any class.
        """
        raise NotImplementedError(f"{type(self).__name__} must declare distances()")

    def _sums(self, log_q, log_p, dead, shards: Any, lse: list[Tensor], args: Tensor, labels: Tensor | None) -> Moment:
        total, zero = self.distances(log_q, log_p, dead, labels), log_q.new_zeros(len(log_q))
        if shards is not None:  # the other ranks' sums depend on this rank's part of lse, and of the scales
            leaves = [x.detach().requires_grad_() for x in (log_q, log_p)]
            with torch.enable_grad():
                own = self.distances(leaves[0], leaves[1], dead, labels).sum()
                found = torch.autograd.grad(own, leaves, allow_unused=True) if own.requires_grad else (None, None)
            slopes = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]
            scaled = [torch.where(g == 0, 0.0, g * (x.detach() + y.detach()[:, None]))
                      for g, x, y in zip(slopes, leaves, lse, strict=True)]  # fmt: skip
            by = [-g.sum(-1) for g in slopes] + [g.sum(-1) for g in scaled]
            total = shards.merge_sums(total, by, [*lse, *args[:, :2].log().unbind(-1)])
        spoilt = torch.where((log_q + log_p).isnan().any(-1) | total.isnan(), torch.nan, 0.0)[:, None]
        for x in (log_q, log_p):  # NaN for the gradients as well
            total = total + (x.clamp(min=-1e300) * spoilt).sum(-1)
        return Moment(zero, zero, zero, total, zero, total)

    def _distance(self, moments, label):
        return moments[-1].ss

    def _pick(self, student, teacher):
        if not self.kd_weight:
            return super()._pick(student, teacher)
        if self.kernels:
            return backends.pick_with(self.kernels, student, teacher), None
        return backends.definition(type(self).__name__), None

    def _prepare(self):
        super()._prepare()
        if self.ce_weight:
            from .logpartition import cross_entropy_of

            vars(self)["_cross_entropy"] = cross_entropy_of(self)

    def _by_kernels(self, kernels, rows: call.Rows, args: Tensor, weight: Tensor | None, divisor: float) -> Tensor:
        """The reduced (or per-row) distillation term."""
        raise NotImplementedError

    def _evaluate(self, rows, student_logits, num_items, temperature):
        backend, operators, program, args, weight, divisor = self._prepared(rows, num_items, temperature)
        kernels = getattr(backend, self.kernels, None) if self.kd_weight and self.kernels else None
        if kernels is not None and args.requires_grad:  # through the deviations of its rows
            with backends.use_backend("reference"):
                return RowsLoss._evaluate(self, rows, student_logits, num_items, temperature)
        if kernels is not None:
            if self.ce_weight and student_logits.dtype in (torch.bfloat16, torch.float16):
                rows = rows._replace(student=rows.student.float())  # two gradients are summed: rounded once, at the end
            total = self._by_kernels(kernels, rows, args, weight, divisor)
            if not self.ce_weight:
                return total
            alone = rows._replace(teacher=None)
            return total + self._cross_entropy._evaluate(alone, student_logits, num_items, None)
        few = rows.student.numel() <= CLASSES or args.requires_grad or torch.compiler.is_compiling()
        if operators is not None or few:
            return super()._evaluate(rows, student_logits, num_items, temperature)
        inputs = _Inputs(self, program, args.detach(), rows)
        value = _ByRows.apply(rows.student, rows.teacher, inputs)
        ignore, per_row = self.ignore_index, self.reduction == "none"
        return call.reduced(value, student_logits, rows.labels, weight, divisor, ignore, per_row)


class _Inputs(NamedTuple):
    loss: RowsLoss
    program: Program
    args: Tensor
    rows: call.Rows

    def values(self, student: Tensor, teacher: Tensor, at: slice) -> Tensor:
        """The losses of some of the rows."""
        args = self.args if len(self.args) == 1 else self.args[at]
        labels, weight = (None if x is None else x[at] for x in (self.rows.labels, self.rows.weight))
        rows = self.rows._replace(student=student, teacher=teacher, labels=labels, weight=weight)
        return reference.row_losses(self.loss, rows, self.program, args)


class _ByRows(torch.autograd.Function):
    """Row losses (N,), a chunk of rows at a time; the backward makes each chunk again, with its gradient."""

    @staticmethod
    def forward(ctx, student, teacher, inputs):
        ctx.save_for_backward(student, teacher)
        ctx.inputs = inputs
        return torch.cat([inputs.values(*pair, at) for at, *pair in blocks(student, teacher, memory=CLASSES)])

    @staticmethod
    def backward(ctx, grad):
        logits, again = ctx.saved_tensors, torch.is_grad_enabled()
        wanted = [x for x, needed in zip(logits, ctx.needs_input_grad, strict=False) if needed]
        if again:  # to be differentiated once more: all at once
            with torch.enable_grad():
                value = ctx.inputs.values(*(x.reshape(-1, x.shape[-1]) for x in logits), slice(None))
            found = iter(torch.autograd.grad(value, wanted, grad, create_graph=True))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:2]), None
        out = [x.new_zeros(x.shape).view(-1, x.shape[-1]) if needed else None
               for x, needed in zip(logits, ctx.needs_input_grad, strict=False)]  # fmt: skip
        for at, *pair in blocks(*logits, memory=CLASSES):
            leaves = [x.detach().requires_grad_(to is not None) for x, to in zip(pair, out, strict=True)]
            with torch.enable_grad():
                value = ctx.inputs.values(*leaves, at)
            found = iter(torch.autograd.grad(value, [x for x in leaves if x.requires_grad], grad[at]))
            for to in out:
                if to is not None:
                    to[at] = next(found)
        return *(None if to is None else to.view(x.shape) for to, x in zip(out, logits, strict=True)), None
