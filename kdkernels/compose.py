"""Sums of losses: one loss with the points of all, so that the logits are read once for all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .loss import Label, Loss, Moment, Point
from .options import REAL, Uses, check_number
from .parts import reducing
from .rowwise import SUMS, is_sums
from .separable import SeparableLoss, in_one

_OF_THE_TERMS = ("temperature", "teacher_temperature", "t_squared", "kd_weight", "ce_weight", "label_smoothing",
                 "z_loss", "standardize")  # fmt: skip


class Weighted:
    """What sums of any losses have in common."""

    weights: tuple[float, ...]
    terms: Any
    reduction: Any
    ignore_index: Any
    _check_temperature: Callable[..., None]

    def minimizer(self, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
        raise NotImplementedError("a sum of losses is least at a compromise of its terms, of which there is no formula")

    def weighed(self, temperature: float | Tensor | None) -> list:
        """Pairs (weight, loss), of the sum's reduction, each for itself. Raises if not all may have the temperature."""
        self._check_temperature(temperature)
        return [(w, self._reducing(term)) for w, term in zip(self.weights, self.terms, strict=True)]

    def _reducing(self, term):
        return term if term.reduction == self.reduction else reducing(term, self.reduction)

    def extra_repr(self) -> str:
        return f"weights={self.weights}, reduction={self.reduction!r}, ignore_index={self.ignore_index}"


class SumLoss(Weighted, Loss):
    """sum_k w_k loss_k of losses of the log-partition and separable ones, made by `0.7 * loss_a + 0.3 * loss_b`.

    Its points are those of the terms, each once, the contributions of its separable terms to a class are added up, and
    the logits are read once for all. The terms keep options of their
    own, which may change, temperatures included; reduction and ignore_index are those of the sum, which the terms have
    to agree on. `temperature=` at call time replaces that of all terms, and raises where they differ.

    Args:
        terms: pairs (weight, loss).

    Raises:
        TypeError, ValueError: a weight is no finite number; a term is no `kdkernels.Loss` (see `MixedSumLoss`);
            the terms differ in reduction or ignore_index, or only some of them standardise; separable terms have
            different temperatures, or several of them a `value` and another not.
    """

    terms: Any  # nn.ModuleList of them
    weights: tuple[float, ...]
    _seen: list[int]
    _points: tuple[Point, ...]
    _places: list[list[int]]
    _phis: list[tuple[float, SeparableLoss]]

    def __init__(self, terms: Sequence[tuple[float, Loss]]) -> None:
        flat = [pair for weight, term in terms for pair in _pairs(weight, term)]
        super().__init__(**shared(flat))
        self.terms = nn.ModuleList(term for _, term in flat)
        self.weights = tuple(weight for weight, _ in flat)

    def _prepare(self) -> None:
        scaled = [term for term in self.terms if not all(p.raw for p in term.all_points())]
        temperatures = {(term.temperature, term.teacher_temperature) for term in scaled} or {(1.0, None)}
        standardized = {term.standardize for term in scaled} or {False}
        if len(standardized) > 1:
            raise ValueError("the terms of a sum must all have standardize, or none of them")
        own = vars(self)
        own["_mixed"] = len(temperatures) > 1
        own["temperature"], own["teacher_temperature"] = (1.0, None) if own["_mixed"] else temperatures.pop()
        own["standardize"] = standardized.pop()
        own["needs_teacher"] = any(term._uses.teacher for term in self.terms)
        own["needs_labels"] = any(term._uses.labels for term in self.terms)
        own["_phis"] = in_one(zip(self.weights, self.terms, strict=True))
        own["merges"] = all(term.merges for term in self.terms)
        each = [[self._at(term, point) for point in term.all_points()] for term in self.terms]
        first = [self._at(phi, point) for _, phi in own["_phis"] for point in phi.points()]  # kernels look for q, p
        every = dict.fromkeys(point for points in (first, *each, self._more_points()) for point in points)
        if own["_phis"]:  # and for these at the end
            every[SUMS] = every.pop(SUMS)
        place = {point: k for k, point in enumerate(every)}
        own["_points"], own["_places"] = tuple(place), [[place[point] for point in points] for points in each]
        own["_seen"] = [term._version for term in self.terms]
        super()._prepare()

    def _more_points(self) -> list[Point]:
        """Those that no term needs."""
        return []

    @property
    def _uses(self) -> Uses:  # type: ignore[override]  # what every call looks at first
        if [term._version for term in self.terms] != self._seen:
            prepare: Any = torch.compiler.disable(self._prepare) if torch.compiler.is_compiling() else self._prepare
            prepare()
        return vars(self)["_uses"]

    def _check_temperature(self, temperature) -> None:
        if temperature is not None and self._mixed:
            own = [term.temperature for term in self.terms]
            raise ValueError(f"temperature would replace that of all terms, which have different ones: {own}")

    def _prepared(self, rows, num_items, temperature):
        self._check_temperature(temperature)
        return super()._prepared(rows, num_items, temperature)

    def _at(self, term: Loss, point: Point) -> Point:
        """The term's point in the temperatures of the sum: 1 where the terms have different ones."""
        if is_sums(point):
            return point
        if not self._mixed or point.raw:
            return point if self.standardize or not self._mixed else point._replace(raw=False)
        s, t = _scales(term)
        return point._replace(student=point.student * s, teacher=point.teacher * t)

    def all_points(self) -> tuple[Point, ...]:
        return self._points

    def row_value(self, moments: list[Moment], label: Label, raw_label: Any, temperature: Any) -> Any:
        total = 0.0
        for weight, term, places in zip(self.weights, self.terms, self._places, strict=True):
            own, at, T = [moments[k] for k in places], label, temperature
            if self._mixed:
                s, t = _scales(term)
                own = [_scaled(p, m, s, t) for p, m in zip(term.all_points(), own, strict=True)]
                at, T = Label(s * label.student, t * label.teacher), term.temperature
            shadow = copy.copy(term)
            shadow.__dict__["resolution"] = self.resolution
            if isinstance(term, SeparableLoss) and term.kd_weight:  # what it adds to the sum over the classes is below
                own, shadow.__dict__["kd_weight"] = own[2:-1], 0.0
            total = total + weight * shadow.row_value(own, at, raw_label, T)
        for weight, phi in self._phis:
            T = phi.temperature if self._mixed else temperature
            value = weight * phi._distance([*moments[:2], moments[-1]], label)
            total = total + (T * T * value if phi.t_squared else value)
        return total

    def _elements(self):
        return [number for _, phi in self._phis for number in phi._elements()]

    def _sums(self, *inputs):
        return self._phis[0][1]._sums(*inputs)

    def _pick(self, student, teacher):
        return self._phis[0][1]._pick(student, teacher) if self._phis else super()._pick(student, teacher)

    def __setattr__(self, name, value):
        if name in _OF_THE_TERMS and "_seen" in vars(self):
            raise AttributeError(f"{name} belongs to the terms of a sum: set it on one of .terms")
        super().__setattr__(name, value)


def shared(flat: Sequence[tuple[float, Any]]) -> dict[str, Any]:
    """The options of a sum of pairs (weight, loss) that its terms have to agree on, and validate."""
    if not flat:
        raise ValueError("a sum of losses needs a term")
    options: dict[str, Any] = {"validate": any(term.validate for _, term in flat)}
    for name in ("reduction", "ignore_index"):
        found = list(dict.fromkeys(getattr(term, name) for _, term in flat))
        if len(found) > 1:
            raise ValueError(f"the terms of a sum must have the same {name}, got {found}")
        options[name] = found[0]
    return options


def checked_weight(weight) -> float:
    if isinstance(weight, bool) or not isinstance(weight, REAL):
        raise TypeError(f"a loss is multiplied by a number, got {type(weight).__name__} {weight!r}")
    return check_number("the weight of a loss", weight)


def joins(term) -> bool:
    """Whether a `SumLoss` takes it."""
    return isinstance(term, Loss) and term.adds


def _pairs(weight, term):
    checked_weight(weight)
    if not joins(term):
        raise TypeError(f"a sum takes losses of the log-partition (kdkernels.Loss), got {type(term).__name__}; a sum "
                        "with others is a MixedSumLoss")  # fmt: skip
    if isinstance(term, SumLoss):
        return [(weight * w, x) for w, x in zip(term.weights, term.terms, strict=True)]
    return [(weight, term)]


def fits(terms) -> bool:
    """Whether a `SumLoss` takes these pairs (weight, loss); wrong ones are its business, too."""
    if not all(joins(term) for _, term in terms):
        return False
    try:
        in_one(pair for weight, term in terms for pair in _pairs(weight, term))
    except ValueError:
        return False
    return True


def _scales(term: Loss) -> tuple[float, float]:
    return 1 / term.temperature, 1 / (term.teacher_temperature or term.temperature)


def _scaled(point: Point, m: Moment, s: float, t: float) -> Moment:
    if point.raw:
        return m
    if point.given:
        return m._replace(s=s * m.s, t=t * m.t, ss=m.ss / s, st=m.st / t)
    return Moment(m.lse, s * m.s, t * m.t, s * s * m.ss, s * t * m.st, t * t * m.tt)
