"""Losses that compare two rows as a whole: what they share, and the way to their kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, call
from .base import BaseLoss
from .logpartition import ForwardKLLoss, cross_entropy_of
from .rankops import KENDALL, PEARSON, PLACKETT_LUCE, SPEARMAN, Compare

__all__ = ["KENDALL", "PEARSON", "PLACKETT_LUCE", "SPEARMAN", "Comparison", "RankLoss"]


class RankLoss(BaseLoss):
    """Base class of the losses that compare two rows as a whole: correlations, ranks, orders.

    A class is live where vocab_size and vocab_mask keep it and neither logit is -inf; the others are left out of every
    count and mean, and their gradient is 0. A row with fewer than two live classes, or in which the live logits of
    either side are all equal, has loss 1 and gradient 0 (`PlackettLuceLoss` has a value for equal logits). A NaN or
    +inf makes its row NaN, and no other.

    Args:
        temperature: T > 0, divides both rows. Ranks and the correlation of logits do not depend on it.
        t_squared: multiply the distillation term by T^2.
        kd_weight: weight of the distillation term.
        ce_weight: weight of an added cross-entropy of the student at temperature 1 with the labels.
        label_smoothing, z_loss: of that cross-entropy, as in `kdkernels.Loss`; without one they raise.
        reduction: "mean" (sum of row_weight * loss over the number of kept rows), "sum", "none" or "batchmean".
        ignore_index: rows with this label are left out, whatever they hold.
        validate: as in `kdkernels.Loss`.

    Raises:
        TypeError, ValueError: an option is not of its kind or out of its range; a teacher that requires grad, except
            for `PearsonLoss`.
    """

    teacher_gradient = False
    merges = False
    _cross_entropy: ForwardKLLoss

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        t_squared: bool = False,
        kd_weight: float = 1.0,
        ce_weight: float = 0.0,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        reduction: str = "mean",
        ignore_index: int = -100,
        validate: bool = False,
    ) -> None:
        super().__init__()
        self.temperature, self.t_squared = temperature, t_squared
        self.kd_weight, self.ce_weight = kd_weight, ce_weight
        self.label_smoothing, self.z_loss = label_smoothing, z_loss
        self.reduction, self.ignore_index, self.validate = reduction, ignore_index, validate

    def minimizer(self, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no minimizer in closed form: it wants the order of "
                                  "teacher_logits, with gaps as wide as they get")  # fmt: skip

    def _prepare(self) -> None:
        super()._prepare()
        vars(self)["_cross_entropy"] = cross_entropy_of(self)

    def _evaluate(self, rows, student_logits, num_items, temperature):
        parts = []
        if self._uses.teacher:
            parts.append(self._term(rows, student_logits, num_items, temperature))
        if not parts or self._uses.labels:  # without either term, the 0 of a cross-entropy that has no weight
            alone = rows._replace(teacher=None)
            parts.append(self._cross_entropy._evaluate(alone, student_logits, num_items, None))
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def _term(self, rows: call.Rows, student_logits: Tensor, num_items, temperature) -> Tensor:
        """The reduced (or per-row) distillation term."""
        raise NotImplementedError

    def _check_teacher(self, teacher: Any) -> None:
        if teacher.requires_grad and torch.is_grad_enabled() and not self.teacher_gradient:
            raise ValueError(f"teacher_logits requires grad, but {type(self).__name__} has no gradient for it; "
                             f"pass teacher_logits.detach()")  # fmt: skip


class Comparison(RankLoss):
    """A rank loss with a kernel of its own: one value a row, and the gradient in the same pass."""

    kind: int
    dead_in_both = False
    """Whether only classes at -inf in both rows are dead."""
    needs_spread = True
    """Whether a row of equal logits has no value."""
    scale_free = True
    """Whether it is the same at every temperature."""
    _args: Tensor
    _factor: Tensor
    _top: int

    def settings(self) -> tuple[float, float, float]:
        """What the kernels are told: tau, top_k (0: all classes) and a switch of the kind's own."""
        raise NotImplementedError(f"{type(self).__name__} must declare settings()")

    def definition(self, s: Tensor, t: Tensor, live: Tensor, args: Tensor) -> Tensor:
        """(N,) losses of s, t (N, V) float64, finite where `live` and 0 elsewhere; no row is constant."""
        raise NotImplementedError(f"{type(self).__name__} must declare definition()")

    def columns(self) -> Tensor | None:
        """More columns of args (shifts,), float64."""
        return None

    def _prepare(self) -> None:
        super()._prepare()
        scale = 1 / self.temperature
        # Tensors: torch.compile would guard on the numbers that it sees read.
        vars(self)["_args"] = torch.tensor([[scale, scale, *self.settings()]], dtype=torch.float64)
        vars(self)["_top"] = int(self.settings()[1])
        vars(self)["_factor"] = torch.tensor(self.kd_weight, dtype=torch.float64)

    def _term(self, rows, student_logits, num_items, temperature):
        self._check_teacher(rows.teacher)
        args, scale = self._arguments(rows, temperature)
        weight, divisor = call.weighting(self, rows, num_items)
        weight = scale if weight is None else weight * scale
        per_row, ignore = self.reduction == "none", self.ignore_index
        backend: Any = backends.pick_with("COMPARE", rows.student, rows.teacher, self.kind, rows.vocab, self._top)
        if hasattr(backend, "COMPARE"):
            operators = backend.COMPARE(rows.student, rows.teacher, self.kind, rows.vocab, self._top)
            return Compare.apply(rows.student, rows.teacher, args, rows.labels, rows.mask, weight, divisor, self.kind,
                                 operators, rows.vocab, ignore, per_row)  # fmt: skip
        value = self._by_definition(rows, args)
        return call.reduced(value, student_logits, rows.labels, weight, divisor, ignore, per_row)

    def _arguments(self, rows: call.Rows, temperature) -> tuple[Tensor, Tensor]:
        """args (1 or N, 5 + shifts) of the kernels, on the host where all rows share them, and the rows' factor."""
        args, device, exact = self._args, rows.student.device, torch.float64
        scale = args[0, 0]  # what is on the host and has no dimension is not copied: a copy waits
        if temperature is not None:
            if not isinstance(temperature, Tensor):  # torch.compile would hold a number in as_tensor constant
                temperature = torch.full((), float(temperature), dtype=exact)
            scale = 1 / (temperature.reshape(-1).to(device, exact) if temperature.dim() else temperature.to(exact))
            if not self.scale_free:
                both = scale.reshape(-1, 1).expand(-1, 2)
                args = torch.cat((both, args[:, 2:].to(both.device).expand(len(both), -1)), -1)
        if (more := self.columns()) is not None:
            args = torch.cat((args, more.to(args.device).expand(len(args), -1)), -1)
        factor = torch.ones(1, dtype=exact, device=device) * self._factor
        return args.contiguous(), factor / scale**2 if self.t_squared else factor

    def _by_definition(self, rows: call.Rows, args: Tensor) -> Tensor:
        """`definition` on the live classes, and what it is not asked about: constant, spoilt and left-out rows."""
        from .backends import calls
        from .backends.reference import _prepare

        if not torch.compiler.is_compiling():
            calls["reference", "compare"] += 1
        keep = None if rows.labels is None else rows.labels != self.ignore_index
        if rows.weight is not None:
            keep = rows.weight != 0 if keep is None else keep & (rows.weight != 0)
        args = args.to(rows.student.device)
        s, t = _prepare(rows.student, rows, keep), _prepare(rows.teacher, rows, keep)
        if not len(s):
            return s.sum(-1)
        gone = (s == -math.inf, t == -math.inf)
        live = ~(gone[0] & gone[1] if self.dead_in_both else gone[0] | gone[1])
        spoilt = ((s != s) | (t != t) | (s == math.inf) | (t == math.inf)).any(-1)
        top = self._top
        if top:
            live = live & largest(t.detach(), live, top)
        flat = live.sum(-1) < 2
        if self.needs_spread:
            flat = flat | constant(s.detach(), live) | constant(t.detach(), live)
        odd = (flat | spoilt)[:, None]  # rows that are decided here get something harmless instead
        ramp = torch.arange(s.shape[-1], dtype=s.dtype, device=s.device)
        live = torch.where(odd, ramp < max(top or s.shape[-1], 2), live)
        s, t = (torch.where(odd, ramp, x).masked_fill(~live, 0.0) for x in (s, t))
        value = torch.where(flat, 1.0, self.definition(s, t, live, args))
        logits = rows.student.reshape(-1, rows.student.shape[-1])[:, : rows.vocab].double()
        logits = torch.where(spoilt[:, None], logits, 0.0)  # their gradient is NaN as well
        value = torch.where(spoilt, math.nan, value) + logits.sum(-1) * torch.where(spoilt, math.nan, 0.0)
        return value if keep is None else torch.where(keep, value, 0.0)


def largest(t: Tensor, live: Tensor, count: int) -> Tensor:
    """(N, V) booleans: the `count` largest live entries of each row of t, the first of equals."""
    order = torch.sort(torch.where(live, t, -math.inf), dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(live).scatter_(-1, order[:, :count], True)


def constant(x: Tensor, live: Tensor) -> Tensor:
    """(N,) booleans: whether the live entries of a row are all equal."""
    return torch.where(live, x, -math.inf).amax(-1) == torch.where(live, x, math.inf).amin(-1)


def correlation(u: Tensor, v: Tensor, dim: int = -1, noise: Sequence = (0.0, 0.0)) -> Tensor:
    """Of deviations; 0 where a sum of their squares is no more than noise: what differs may have underflown."""
    uu, vv = (u * u).sum(dim), (v * v).sum(dim)
    varied = (uu > noise[0]) & (vv > noise[1])
    uv, uu, vv = torch.where(varied, (u * v).sum(dim), 0.0), torch.where(varied, uu, 1.0), torch.where(varied, vv, 1.0)
    return uv / uu.sqrt() / vv.sqrt()


def bandwidth(s: Tensor, live: Tensor, tau: Tensor) -> Tensor:
    """(N, 1): tau times the (population) deviation of the live entries."""
    n = live.sum(-1, keepdim=True)
    mean = s.sum(-1, keepdim=True) / n
    return tau[:, None] * (((s - mean) * live).pow(2).sum(-1, keepdim=True) / n).sqrt()
