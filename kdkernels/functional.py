"""Functions of one row that the engine computes like a loss: power sums, and the deviation of a z-score."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import call, tape
from .logpartition import Q
from .loss import Loss, Point
from .options import check_number


class _PowerSum(Loss):
    needs_teacher = False

    def __init__(self, gamma: float, **options: Any):
        super().__init__(**options)
        self.gamma = gamma

    def check(self):
        check_number("gamma", self.gamma, least=0)

    def points(self):
        return Q, Point(student=self.gamma)

    def value(self, q, h):
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

    def points(self):
        return (Point(),)

    def value(self, u):
        count = tape.exp(u.lse)
        varied = u.ss > 1e-24 + 1e-28 * u.s * u.s
        spread = tape.where(varied, u.ss * count / tape.where(count > 1.5, count - 1, 1.0), 1.0)
        return 1 / tape.sqrt(spread)


INVERSE_DEVIATION = _InverseDeviation(reduction="none")  # made here: torch.compile traces its calls only
