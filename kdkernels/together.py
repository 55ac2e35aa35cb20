"""Sums of losses that compare rows and of others: where a backend can, all of a row while it is in cache.

Operator (`csrc/cpu/together.cpp`, `backends/triton_together.py`):

    together_step(student (N, W) or (A, B, W), teacher, labels (N,)?, mask (V,)?, args, program, weight (N or 1,)?,
                  divisor, factors (R, 1 or N), comparisons (R, 1 or N, 2 + columns), vocab, ignore_index, alone)
        -> sum of all weighted values (), gradient of the student's logits

`args`, `program`, `weight` and `divisor` are those of `step` (`kdkernels.ops`); a comparison is its kind, the number of
its shifts, and its args (`kdkernels.rankops`), which are on the host as those are; its factor is what a row's value is
multiplied with. `alone`: the program is not told of the teacher. A backend's `TOGETHER(student, teacher, vocab,
comparisons' kinds and settings)` is this and the places of those it takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import backends, call
from .base import BaseLoss
from .compare import Comparison
from .compose import SumLoss, Weighted, checked_weight, joins, shared
from .loss import Loss
from .options import Uses
from .out import handed_over
from .rowwise import RowsLoss


class MixedSumLoss(Weighted, BaseLoss):
    """sum_k w_k loss_k of losses of any family, made by `ForwardKLLoss() + 0.5 * SpearmanLoss(top_k=128)`.

    Value and gradients are those of the losses one by one. On the C++ backend losses of the log-partition and those
    that compare rows (`SpearmanLoss`, `KendallLoss`, `PlackettLuceLoss`, `PearsonLoss`) take turns row by row, so that
    the logits are read from memory once and one gradient is written: for a reduced loss, when only the student wants a
    gradient, neither in float16 nor under torch.compile. On a GPU so are those of the log-partition and one
    `SpearmanLoss` of all classes of long rows, by Triton, also where the other losses run in CUDA C++. All others are
    computed one after the other, as those of vocabulary shards are, each with collectives of its own, and as all losses
    are on the reference backend and where "cuda" was asked for by name. The terms keep options of their own,
    which may change; reduction and ignore_index are those of the sum, which the terms have to agree on.

    Args:
        terms: pairs (weight, loss).

    Raises:
        TypeError, ValueError: a weight is no finite number; a term is no loss; the terms differ in reduction or
            ignore_index.
    """

    merges = False
    in_turn = True
    temperature, t_squared, kd_weight, ce_weight, label_smoothing, z_loss = 1.0, False, 1.0, 0.0, 0.0, 0.0
    terms: Any  # nn.ModuleList of them
    weights: tuple[float, ...]

    def __init__(self, terms: Sequence[tuple[float, BaseLoss]]) -> None:
        super().__init__()
        flat = [pair for weight, term in terms for pair in _pairs(weight, term)]
        for name, value in shared(flat).items():
            setattr(self, name, value)
        self.rowwise = all(term.rowwise for _, term in flat)
        self.weights = tuple(weight for weight, _ in flat)
        self.terms = nn.ModuleList(term for _, term in flat)

    @property
    def _uses(self) -> Uses:  # type: ignore[override]  # options of the terms may change
        each = [term._uses for term in self.terms]
        return Uses(any(one.teacher for one in each), any(one.labels for one in each), False)

    @property
    def standardize(self) -> bool:  # type: ignore[override]
        return any(term.standardize for term in self.terms)

    def _prepare(self) -> None:
        single = [(w, term) for w, term in zip(self.weights, self.terms, strict=True) if of_log_partition(term)]
        vars(self)["_first"] = SumLoss(single) if single else None
        vars(self)["_others"] = [(w, term) for w, term in zip(self.weights, self.terms, strict=True)
                                    if not of_log_partition(term)]  # fmt: skip
        vars(self).pop("_split", None)

    @property
    def unsharded(self) -> str | None:  # type: ignore[override]
        whole = [term for term in self.terms if term.unsharded]
        return f"of its {type(whole[0]).__name__}, {whole[0].unsharded}" if whole else None

    def _check_temperature(self, temperature) -> None:
        if vars(self)["_first"] is not None:
            vars(self)["_first"]._check_temperature(temperature)

    def _evaluate(self, rows, student_logits, num_items, temperature):
        first, later = self._plan(rows, num_items, temperature)
        total = 0.0 if first is None else Together.apply(rows.student, rows.teacher, first)
        for weight, term in later:
            own = rows if term._uses.teacher else rows._replace(teacher=None)
            value = self._reducing(term)._evaluate(own, student_logits, num_items, temperature)
            total = total + weight * value
        return total

    def _plan(self, rows: call.Rows, num_items, temperature):
        """What is done in one go (or None), and pairs (weight, loss) that follow one by one."""
        single: Any = vars(self)["_first"]
        others = vars(self)["_others"]
        places = [k for k, (_, x) in enumerate(others) if isinstance(x, Comparison) and x._uses.teacher
                  and not x._uses.labels]  # fmt: skip
        terms = [(others[k][0], self._reducing(others[k][1]), rows) for k in places]
        first, taken = in_one_go(single and self._reducing(single), terms, rows, num_items, temperature)
        if first is None:
            return None, ([] if single is None else [(1, single)]) + others
        gone = {places[k] for k in taken}
        return first, [pair for k, pair in enumerate(others) if k not in gone]

    def _value_and_grad(self, rows: Any, student_logits, num_items, temperature, out, accumulate):
        with torch.enable_grad():
            wanted = rows._replace(student=rows.student.detach().requires_grad_())
            first, later = self._plan(wanted, num_items, temperature)
        if first is None or later:
            return super()._value_and_grad(rows, student_logits, num_items, temperature, out, accumulate)
        step, _rescale, inputs = first
        value, gradient = step(call.dense(rows.student), call.dense(rows.teacher), *inputs)
        return value, handed_over(gradient.view(rows.student.shape), out, accumulate)


class _Nothing(Loss):
    """Stands for the loss of the log-partition where there is none."""

    needs_teacher = False

    def points(self):
        return ()

    def value(self):
        return 0.0


_NOTHING = _Nothing()


def in_one_go(single: Any, terms: Sequence[tuple[float, Comparison, call.Rows]], rows: call.Rows, num_items,
              temperature) -> tuple[Any, Sequence[int]]:  # fmt: skip
    """What `Together` is told of a loss of the log-partition (or None) and of comparisons, with their weights and the
    rows as each weighs them; and the places of those it takes. None: all are to go one by one."""
    nothing = None, ()
    wanted = rows.student.requires_grad and torch.is_grad_enabled()
    if not terms or not wanted or rows.teacher is None or rows.teacher.requires_grad:
        return nothing
    loss = terms[0][1]
    if loss.reduction == "none" or rows.student.dtype == torch.float16 or torch.compiler.is_compiling():
        return nothing
    first = _NOTHING if single is None else single
    alone = rows if first._uses.teacher else rows._replace(teacher=None)
    operators = first._pick(rows.student, alone.teacher)[1]
    together = backends.kernels("TOGETHER", rows.student, rows.teacher)
    if together is None or operators.elements:
        return nothing
    kinds = [(term.kind, term.settings()) for _, term, _ in terms]
    step, taken = together(rows.student, rows.teacher, rows.vocab, kinds)
    if len(taken) + (single is not None) < 2:
        return nothing
    *_, program, args, weight, divisor = first._prepared(alone, num_items, temperature)
    if args.requires_grad:
        return nothing
    each = [_columns(term, by, own, num_items, temperature) for by, term, own in (terms[k] for k in taken)]
    inputs = (rows.labels, rows.mask, args, program.code, weight, divisor, *map(_stacked, zip(*each, strict=True)),
              rows.vocab, loss.ignore_index, alone.teacher is None)  # fmt: skip
    return (step, operators.rescale, inputs), taken


def of_log_partition(term) -> bool:
    """Whether all of it is made at points of the log-partition."""
    return joins(term) and not isinstance(term, RowsLoss)


def _pairs(weight, term) -> list:
    checked_weight(weight)
    if isinstance(term, (SumLoss, MixedSumLoss)):
        return [(weight * w, x) for w, x in zip(term.weights, term.terms, strict=True)]
    if not isinstance(term, BaseLoss):
        raise TypeError(f"a sum takes losses, got {type(term).__name__}")
    return [(weight, term)]


def _columns(loss: Comparison, weight: float, rows: call.Rows, num_items, temperature) -> tuple[Tensor, Tensor]:
    """(1 or N,) and (1 or N, 2 + columns) of the operator's `factors` and `comparisons`."""
    args, scale = loss._arguments(rows, temperature)
    weights, divisor = call.weighting(loss, rows, num_items)
    scale = weight * (scale if weights is None else scale * weights)
    head = torch.tensor([loss.kind, args.shape[1] - 5], dtype=torch.float64, device=args.device)
    factor = call.factor(scale, divisor, rows.labels, loss.ignore_index, rows.student)
    return factor, torch.cat((head.expand(len(args), 2), args), -1)


def _stacked(columns: Sequence[Tensor]) -> Tensor:
    """(R, 1 or N, ...) of R tensors (1 or N, ...), the narrower ones filled up with 0."""
    rows, *wide = (max(sizes) for sizes in zip(*(x.shape for x in columns), strict=True))
    padded = [nn.functional.pad(x, (0, wide[0] - x.shape[1])) if wide else x for x in columns]
    return torch.stack([x.expand(rows, *wide) for x in padded])


class Together(torch.autograd.Function):
    """The weighted sum of all values; the gradient is made with it and handed over once."""

    @staticmethod
    def forward(ctx, student, teacher, plan):
        ctx.step, ctx.rescale, inputs = plan
        value, ctx.gradient = ctx.step(call.dense(student), call.dense(teacher), *inputs)
        ctx.save_for_backward(student, teacher, *(x for x in inputs if isinstance(x, Tensor)))
        ctx.inputs = [None if isinstance(x, Tensor) else (x,) for x in inputs]
        return value

    @staticmethod
    def backward(ctx, grad):
        ready, ctx.gradient = ctx.gradient, None  # it is the caller's from here on, who may write to it
        student, teacher, *tensors = ctx.saved_tensors
        if ready is not None and not torch.is_grad_enabled() and (scaled := ctx.rescale(ready, grad)) is not None:
            return scaled.view(student.shape), None, None
        rest = iter(tensors)
        labels, mask, args, code, weight, divisor, factors, comparisons, *last = (next(rest) if x is None else x[0]
                                                                                  for x in ctx.inputs)  # fmt: skip
        by = grad.reshape(-1).to(torch.float64)
        weight = call.factor(weight, divisor, labels, last[1], student) * by
        inputs = (labels, mask, args, code, weight, 1.0, factors * by, comparisons, *last)
        gradient = ctx.step(call.dense(student), call.dense(teacher), *inputs)[1]
        return gradient.view(student.shape), None, None
