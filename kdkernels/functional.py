"""Functions of one row that the engine computes like a loss: power sums, and the deviation of a z-score."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import call, tape
from .logpartition import Q
from .loss import Loss, Moment, Point
from .options import check_number
from .shards import Known


class _PowerSum(Loss):
    needs_teacher = False

    def __init__(self, gamma: float, **options: Any) -> None:
        super().__init__(**options)
        self.gamma = gamma

    def check(self) -> None:
        check_number("gamma", self.gamma, least=0)

    def points(self) -> tuple[Point, ...]:
        return Q, Point(student=self.gamma)

    def value(self, q: Moment, h: Moment) -> Any:
        return tape.exp(h.lse - self.gamma * q.lse)


def power_sum(logits: Tensor, gamma: float) -> Tensor:
    """sum_i softmax(logits)_i^gamma, (..., V) -> (...), differentiable: WTTM's weight. [Zheng & Yang 2024, eq. 9]"""
    return _PowerSum(gamma, reduction="none")(logits)


def power_transform(logits: Tensor, gamma: float) -> Tensor:
    """softmax(gamma * logits), (..., V) -> (..., V): p_i^gamma / sum_j p_j^gamma. [Zheng & Yang 2024, eq. 9]"""
    check_number("gamma", gamma, least=0)
    call.check_logits("logits", logits)
    if gamma == 0:  # ignores even -inf
        logits = torch.where(logits == -torch.inf, 0.0, logits)
    return torch.softmax(gamma * logits, -1)


class _InverseDeviation(Loss):
    """1 / (unbiased standard deviation) of each row; 1 for a constant row, as is one of a deviation below 1e-12."""

    needs_teacher = False

    def points(self) -> tuple[Point, ...]:
        return (Point(),)

    def value(self, u: Moment) -> Any:
        count = tape.exp(u.lse)
        varied = u.ss > 1e-24 + 1e-28 * u.s * u.s
        spread = tape.where(varied, u.ss * count / tape.where(count > 1.5, count - 1, 1.0), 1.0)
        return 1 / tape.sqrt(spread)

    def each(self, alone: list[call.Rows]) -> list[Tensor]:
        """Of several logits of the same rows. On vocabulary shards one all_gather brings all their states together."""
        shards = alone[0].shards
        if shards is not None and len(alone) > 1:
            prepared: list[Any] = [self._prepared(rows, None, None) for rows in alone]
            if any(operators is None for _, operators, *_ in prepared):  # the reference copies its rows anyway
                both = _stacked(alone)
                return list(self._evaluate(both, both.student, None, None).chunk(len(alone)))
            states = []
            for rows, (_, operators, program, args, *_) in zip(alone, prepared, strict=True):
                given = call.dense(rows.student), None, rows.labels, rows.mask, args, program.code
                states.append(operators.reduce(*given, rows.vocab, self.ignore_index))
            known = shards.merge_stats(torch.cat(states), prepared[0][3]).chunk(len(alone))
            alone = [rows._replace(shards=Known(own)) for rows, own in zip(alone, known, strict=True)]
        return [self._evaluate(rows, rows.student, None, None) for rows in alone]


def _stacked(alone: list[call.Rows]) -> call.Rows:
    """All rows of several logits, in float64."""
    first = alone[0]
    wide = [rows.student.reshape(-1, rows.student.shape[-1])[:, : rows.vocab].double() for rows in alone]
    labels = None if first.labels is None else first.labels.repeat(len(alone))
    return first._replace(student=torch.cat(wide), labels=labels)


INVERSE_DEVIATION = _InverseDeviation(reduction="none")  # made here: torch.compile traces its calls only
