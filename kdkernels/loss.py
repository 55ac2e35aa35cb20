"""What a loss is: points of the log-partition, and arithmetic on the row statistics found there.

For a pair of logit rows s (student) and t (teacher), a point with coefficients (b, a) tilts the row by
x_i = b s_i + a t_i and has the log-partition E = log sum_i exp(x_i) and the means of s and t under softmax(x).
A `Loss` names its points and computes its value from those numbers; every backend does the rest.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import call, options, tape
from .base import BaseLoss
from .ops import RowLoss, value_and_grad

MOMENTS = 6  # lse, s, t, ss, st, tt
_versions = itertools.count()


class Point(NamedTuple):
    """Coefficients of the tilt x_i = student * s_i + teacher * t_i.

    Attributes:
        student, teacher: coefficients of the (temperature-scaled) logits. A zero coefficient ignores its logit.
        frozen: the weights softmax(x) are constants in the gradient.
        exclude_label: the label's class is left out of the sums.
        raw: the coefficients apply to logits at temperature 1.
        given: its moments have the coefficients, which may be tensors of one for each row, in place of covariances.
    """

    student: Any = 0.0
    teacher: Any = 0.0
    frozen: bool = False
    exclude_label: bool = False
    raw: bool = False
    given: bool = False


class Moment(NamedTuple):
    """Statistics of a row at one point: log-partition, mean logits and their (co)variances under softmax(x)."""

    lse: Any
    s: Any
    t: Any
    ss: Any
    st: Any
    tt: Any

    @property
    def student(self) -> Any:
        """The point's coefficient of the student's logits, if it is `given`."""
        return self.ss

    @property
    def teacher(self) -> Any:
        return self.st


class Label(NamedTuple):
    """Logits of the label's class."""

    student: Any
    teacher: Any


class Program(NamedTuple):
    """A traced loss: `code` is its structure and instructions, `args` the numbers a user may change (see `ops`)."""

    code: Tensor
    args: Tensor


class Loss(BaseLoss):
    """Base class of the losses: subclass it, declare `points` and `value`, and have a loss on every backend.

    Args:
        temperature: T > 0, divides both rows.
        teacher_temperature: replaces T for the teacher's row.
        t_squared: multiply the distillation term by T^2 (Hinton et al. 2015).
        kd_weight: weight of the distillation term.
        ce_weight: weight of an added cross-entropy of the student at temperature 1 with the labels.
        label_smoothing: smoothing of that cross-entropy, in [0, 1]; without one it raises.
        z_loss: >= 0; that cross-entropy gains z_loss * (log-partition)^2 (Chowdhery et al. 2022).
        standardize: z-score each row first (logit standardisation, Sun et al. 2024); one whose deviation is below
            1e-12, or 1e-14 of its mean, is constant and stays as it is. Covariances at tilted points have no gradient
            then, and raise.
        reduction: "mean" (sum of row_weight * loss over the number of kept rows), "sum", "none" or
            "batchmean" (sum over the size of the first dimension).
        ignore_index: rows with this label are left out, whatever they hold.
        validate: look at labels on a GPU before they are used, which waits for it; a label outside the vocabulary
            raises, where otherwise its row becomes NaN and has no gradient. On a CPU it always raises.

    Raises:
        TypeError, ValueError: an option is not of its kind or out of its range.
    """

    unsharded: str | None = None
    adds = True
    """Whether it may be a term of a sum of losses that reads the logits once."""
    _version: int
    _double: Program
    _single: Program

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        teacher_temperature: float | None = None,
        t_squared: bool = False,
        kd_weight: float = 1.0,
        ce_weight: float = 0.0,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        standardize: bool = False,
        reduction: str = "mean",
        ignore_index: int = -100,
        validate: bool = False,
    ) -> None:
        super().__init__()
        self.temperature, self.teacher_temperature = temperature, teacher_temperature
        self.t_squared, self.standardize = t_squared, standardize
        self.kd_weight, self.ce_weight = kd_weight, ce_weight
        self.label_smoothing, self.z_loss = label_smoothing, z_loss
        self.reduction, self.ignore_index, self.validate = reduction, ignore_index, validate
        self.resolution = 1e-16  # relative error of the row statistics; set while tracing

    def points(self) -> tuple[Point, ...]:
        """The points of the log-partition this loss looks at."""
        raise NotImplementedError(f"{type(self).__name__} must declare points()")

    def value(self, *moments: Any, **label: Any) -> Any:
        """The loss of a row from its moments (and `label` where `needs_labels`), in torch-like arithmetic."""
        raise NotImplementedError(f"{type(self).__name__} must declare value()")

    def minimizer(self, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
        """Student logits at which the distillation term is smallest."""
        return teacher_logits * (self.temperature / (self.teacher_temperature or self.temperature))

    def _evaluate(self, rows, student_logits, num_items, temperature):
        backend, operators, program, args, weight, divisor = self._prepared(rows, num_items, temperature)
        per_row, ignore = self.reduction == "none", self.ignore_index
        if operators is None:
            value = backend.row_losses(self, rows, program, args)
            return call.reduced(value, student_logits, rows.labels, weight, divisor, ignore, per_row)
        operators = self._of_whole_rows(operators, rows)
        if not torch.is_grad_enabled():  # which an autograd Function does not look at: it would make a gradient
            rows, args = call.detached(rows), args.detach()
        return RowLoss.apply(
            rows.student, rows.teacher, args, rows.labels, rows.mask, weight, divisor, program.code,
            operators, rows.vocab, ignore, per_row,
        )  # fmt: skip

    def _of_whole_rows(self, operators, rows):
        return operators if rows.shards is None else rows.shards.operators(operators)

    def _prepared(self, rows, num_items, temperature):
        backend, operators = self._pick(rows.student, rows.teacher)
        double = rows.student.dtype == torch.float64 or operators is None  # the reference is, always
        program = self._double if double else self._single
        args = call.arguments(self, program, rows, temperature)
        return backend, operators, program, args, *call.weighting(self, rows, num_items)

    def _value_and_grad(self, rows, student_logits, num_items, temperature, out, accumulate):
        _, operators, program, args, weight, divisor = self._prepared(rows, num_items, temperature)
        if rows.shards is not None or operators is None or operators.step is None:
            return super()._value_and_grad(rows, student_logits, num_items, temperature, out, accumulate)
        numbers = (args, weight, divisor, program.code, self.ignore_index)
        return value_and_grad(operators, rows, *numbers, out, accumulate)

    def _distance(self, moments: list[Moment], label: Label):
        """The distillation term of a row, from the moments at `all_points()`."""
        own = moments[: len(self.points())]
        return self.value(*own, **({"label": label} if self.needs_labels else {}))

    def _elements(self) -> list[float]:
        """What the program says of single classes: nothing."""
        return []

    def all_points(self) -> tuple[Point, ...]:
        """`points()` and those of the cross-entropy."""
        return (tuple(self.points()) if self.kd_weight else ()) + self._student_points()

    def _student_points(self) -> tuple[Point, ...]:
        extra = (Point(student=1, raw=True),) if self.ce_weight else ()
        return extra + ((Point(raw=True),) if self.ce_weight and self.label_smoothing else ())

    def row_value(self, moments: list[Moment], label: Label, raw_label: Any, temperature: Any) -> Any:
        """Value of a row: distillation and cross-entropy terms, on tensors or traced values."""
        count = len(self.points()) if self.kd_weight else 0
        extra = moments[count:]
        total: Any = 0.0
        if self.kd_weight:
            total = self._distance(moments, label)
            total = total * self.kd_weight if self.kd_weight != 1 else total
            total = temperature * temperature * total if self.t_squared else total
        if self.ce_weight:
            smooth = self.label_smoothing
            ce = extra[0].lse - raw_label
            if smooth:
                smoothed = smooth * (extra[0].lse - extra[1].s)
                ce = (1 - smooth) * ce + smoothed if smooth < 1 else smoothed
            if self.z_loss:
                ce = ce + self.z_loss * extra[0].lse * extra[0].lse
            total = total + self.ce_weight * ce
        return total

    def _prepare(self) -> None:
        super()._prepare()
        for name, resolution in (("_double", 1e-16), ("_single", 1e-8)):
            shadow = copy.copy(self)
            vars(shadow)["resolution"] = resolution
            vars(self)[name] = _traced(shadow)
        vars(self)["_version"] = next(_versions)


def _traced(loss: Loss) -> Program:
    points = loss.all_points()
    options.check_points(loss, points)
    labels = MOMENTS * len(points)
    code = tape.Tape(labels + 4)
    numbers = [code.input(i) for i in range(code.inputs)]
    moments = [Moment(*numbers[MOMENTS * k : MOMENTS * (k + 1)]) for k in range(len(points))]
    with options.explain_value(loss):
        value = loss.row_value(moments, Label(*numbers[labels : labels + 2]), *numbers[labels + 2 : labels + 4])
        elements = loss._elements()
    out = value.register if isinstance(value, tape.Expr) else code.emit(tape.Op.CONST, const=float(value)).register
    code.used.add(out)
    sloped = code.sloped(out) if loss.standardize else set()
    flags = [options.flags(p, code.used, sloped, MOMENTS * k, loss.standardize) for k, p in enumerate(points)]
    lines = [x for line in code.code for x in line]
    args = [1 / loss.temperature, 1 / (loss.teacher_temperature or loss.temperature), loss.temperature]
    args += [c for p in points for c in (p.student, p.teacher)]
    flat = (torch.as_tensor(x, dtype=torch.float64, device="cpu").reshape(-1) for x in args)
    columns = torch.broadcast_tensors(*flat)
    header = [len(points), len(code.code), len(elements), out]
    return Program(torch.tensor([*header, *flags, *lines, *elements], dtype=torch.float64), torch.stack(columns, -1))
