"""The log-partition catalogue: one class, one paper, one formula.

q = softmax(s / T) is the student, p = softmax(t / T) the teacher, y the label. E(x) is log sum_i exp(x_i).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import tape
from .alphabeta import AlphaBetaLoss, P, Q, RenyiLoss
from .base import BaseLoss
from .loss import Label, Loss, Moment, Point
from .options import check_bool, check_number

__all__ = [
    "AlphaBetaLoss", "BrierLoss", "CrossEntropyLoss", "DKDLoss", "ForwardKLLoss", "HellingerLoss", "KDLoss",
    "LogitMSELoss", "RenyiLoss", "ReverseKLLoss", "TAIDLoss", "TTMLoss", "WTTMLoss",
]  # fmt: skip


def kl(q: Moment, p: Moment, gamma: float = 1):
    """KL(p || q), the Bregman divergence of the log-partition; p = softmax(gamma t)."""
    return q.lse - p.lse + gamma * p.t - p.s


def reverse_kl(q: Moment, p: Moment):
    """KL(q || p)."""
    return p.lse - q.lse + q.s - q.t


class ForwardKLLoss(Loss):
    """`KL(p || q) = sum_i p_i log(p_i / q_i)`. [Hinton et al. 2015]"""

    def points(self) -> tuple[Point, ...]:
        return Q, P

    def value(self, q: Moment, p: Moment) -> Any:
        return kl(q, p)


def cross_entropy_of(loss: BaseLoss) -> ForwardKLLoss:
    """What is added to the distillation term of a loss, alone."""
    names = ("ce_weight", "label_smoothing", "z_loss", "reduction", "ignore_index")
    return ForwardKLLoss(kd_weight=0.0, **{name: getattr(loss, name) for name in names})


class KDLoss(ForwardKLLoss):
    """`(1 - alpha) CE(q_1, y) + alpha T^2 KL(p || q)`. [Hinton et al. 2015, sec. 2]

    Args:
        temperature: T of the KL term; the cross-entropy is at temperature 1.
        alpha: weight in [0, 1] of the KL term. Labels are optional at alpha = 1.
    """

    def __init__(self, temperature: float = 2.0, alpha: float = 0.5, *, teacher_temperature: float | None = None,
                 t_squared: bool = True, label_smoothing: float = 0.0, z_loss: float = 0.0, standardize: bool = False,
                 reduction: str = "mean", ignore_index: int = -100, validate: bool = False) -> None:  # fmt: skip
        super().__init__(
            temperature=temperature, teacher_temperature=teacher_temperature, t_squared=t_squared,
            kd_weight=0.5, ce_weight=0.5, label_smoothing=label_smoothing, z_loss=z_loss,
            standardize=standardize, reduction=reduction, ignore_index=ignore_index, validate=validate,
        )  # fmt: skip

        self.alpha = alpha

    @property
    def alpha(self) -> float:
        return self.kd_weight

    @alpha.setter
    def alpha(self, alpha: float) -> None:
        self.kd_weight = check_number("alpha", alpha, least=0, most=1)
        self.ce_weight = 1 - alpha

    def extra_repr(self) -> str:
        shown = super().extra_repr().split(", ")
        return ", ".join([f"alpha={self.alpha!r}", *(x for x in shown if not x.startswith(("kd_weight", "ce_weight")))])


class ReverseKLLoss(Loss):
    """`KL(q || p) = sum_i q_i log(q_i / p_i)`. [Gu et al. 2024, MiniLLM]"""

    def points(self) -> tuple[Point, ...]:
        return Q, P

    def value(self, q: Moment, p: Moment) -> Any:
        return reverse_kl(q, p)


class TTMLoss(Loss):
    """`KL(p^ || q), p^_i = p_i^gamma / sum_j p_j^gamma`, the power-transformed teacher. [Zheng & Yang 2024, eq. 14]

    No temperature on the student and no T^2 factor, as published.

    Args:
        gamma: exponent > 0; 1 / T in the paper's terms.
    """

    def __init__(self, gamma: float = 0.5, **options: Any) -> None:
        super().__init__(**options)
        self.gamma = gamma

    def check(self) -> None:
        check_number("gamma", self.gamma, above=0)

    def points(self) -> tuple[Point, ...]:
        return Q, Point(teacher=self.gamma)

    def value(self, q: Moment, h: Moment) -> Any:
        return kl(q, h, self.gamma)

    def minimizer(self, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.gamma * super().minimizer(teacher_logits)


class WTTMLoss(TTMLoss):
    """`U KL(p^ || q), U = sum_i p_i^gamma`, `p^` as in TTM. [Zheng & Yang 2024, eq. 20]

    1 <= U <= V^(1 - gamma): large for uncertain teachers.

    Args:
        gamma: exponent > 0.
        normalize_weight: divide U by its largest value V^(1 - gamma).
        detach_weight: no gradient to the teacher through U.
    """

    def __init__(self, gamma: float = 0.5, normalize_weight: bool = False, detach_weight: bool = False,
                 **options: Any) -> None:  # fmt: skip
        super().__init__(gamma, **options)
        self.normalize_weight, self.detach_weight = normalize_weight, detach_weight

    def check(self) -> None:
        super().check()
        check_bool("normalize_weight", self.normalize_weight)
        check_bool("detach_weight", self.detach_weight)

    def points(self) -> tuple[Point, ...]:
        return Q, Point(teacher=self.gamma), P, *([Point()] if self.normalize_weight else [])

    def value(self, q: Moment, h: Moment, p: Moment, classes: Moment | None = None) -> Any:  # type: ignore[override]  # one point more than its base
        log_weight = h.lse - self.gamma * p.lse
        if classes is not None:
            log_weight = log_weight - (1 - self.gamma) * classes.lse
        weight = tape.exp(log_weight)
        return (tape.detach(weight) if self.detach_weight else weight) * super().value(q, h)


class HellingerLoss(Loss):
    """`1 - sum_i sqrt(p_i q_i)`: the squared Hellinger distance. [Hellinger 1909]"""

    def points(self) -> tuple[Point, ...]:
        return Q, P, Point(student=0.5, teacher=0.5)

    def value(self, q: Moment, p: Moment, m: Moment) -> Any:
        return -tape.expm1(m.lse - (p.lse + q.lse) / 2)


class DKDLoss(Loss):
    """`alpha KL([p_y, 1 - p_y] || [q_y, 1 - q_y]) + beta KL(p^ || q^)`, hats without y. [Zhao et al. 2022, eq. 7]

    The moments leave the label's class out, so that 1 - p_y never cancels.

    Args:
        alpha: weight of the target-class term.
        beta: weight of the non-target term; the paper uses 8 at temperature 4.
    """

    needs_labels = True

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, *, t_squared: bool = True, **options: Any) -> None:
        super().__init__(t_squared=t_squared, **options)
        self.alpha, self.beta = alpha, beta

    def check(self) -> None:
        check_number("alpha", self.alpha)
        check_number("beta", self.beta)

    def points(self) -> tuple[Point, ...]:
        return Point(student=1, exclude_label=True), Point(teacher=1, exclude_label=True)

    def value(self, q: Moment, p: Moment, *, label: Label) -> Any:
        a, b = label.teacher - p.lse, label.student - q.lse  # log odds of the label
        target = tape.times(tape.sigmoid(a), tape.softplus(-b) - tape.softplus(-a))
        target = target + tape.times(tape.sigmoid(-a), tape.softplus(b) - tape.softplus(a))
        others = tape.where(p.lse > -math.inf, kl(q, p), 0.0)  # no other class, no such term
        return self.alpha * target + self.beta * others


class CrossEntropyLoss(Loss):
    """`-log softmax(s)_y`, from the student and the labels alone, at temperature 1. [Szegedy et al. 2016, sec. 7]

    Args:
        label_smoothing: in [0, 1], towards the uniform distribution.
        z_loss: >= 0; adds z_loss * logsumexp(s)^2 (Chowdhery et al. 2022).
    """

    needs_teacher = False

    def __init__(self, label_smoothing: float = 0.0, z_loss: float = 0.0, *, reduction: str = "mean",
                 ignore_index: int = -100, validate: bool = False) -> None:  # fmt: skip
        super().__init__(kd_weight=0.0, ce_weight=1.0, label_smoothing=label_smoothing, z_loss=z_loss,
                         reduction=reduction, ignore_index=ignore_index, validate=validate)  # fmt: skip

    def points(self) -> tuple[Point, ...]:
        return self._student_points()

    def minimizer(self, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
        return _one_hot(teacher_logits, labels) * 1e4


class BrierLoss(Loss):
    """`sum_i (q_i - 1[i = y])^2`, from the student and the labels alone. [Brier 1950; Hamidi et al. 2024]"""

    needs_teacher = False
    needs_labels = True

    def points(self) -> tuple[Point, ...]:
        return Point(student=1, exclude_label=True), Point(student=2, exclude_label=True)

    def value(self, q: Moment, qq: Moment, *, label: Label) -> Any:
        odds = label.student - q.lse
        wrong = tape.sigmoid(-odds)
        some = q.lse > -math.inf
        others = tape.exp(qq.lse - 2 * tape.where(some, q.lse, 0.0) - 2 * tape.softplus(odds))
        return wrong * wrong + tape.where(some, others, 0.0)

    def minimizer(self, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
        return _one_hot(teacher_logits, labels) * 1e4


class LogitMSELoss(Loss):
    """`sum_i (s_i - 1[i = y])^2`, from the student's logits and the labels alone. [Hui & Belkin 2021]"""

    needs_teacher = False
    needs_labels = True

    def points(self) -> tuple[Point, ...]:
        return (Point(exclude_label=True),)

    def value(self, u: Moment, *, label: Label) -> Any:
        return tape.exp(u.lse) * (u.ss + u.s * u.s) + (label.student - 1) * (label.student - 1)

    def minimizer(self, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
        return _one_hot(teacher_logits, labels) * self.temperature


def _one_hot(like: Tensor, labels: Tensor | None) -> Tensor:
    if labels is None:
        raise ValueError("minimizer needs labels")
    return torch.zeros_like(like).scatter(-1, labels.long().unsqueeze(-1), 1.0)


class TAIDLoss(Loss):
    """`KL(u || q), u = softmax((1 - tau) s + tau t)` detached. [Shing et al. 2025, eq. 3]

    The authors train on the cross-entropy of u and q: the same gradient q - u, another constant.

    Args:
        tau: share of the teacher in [0, 1]; annealed from 0.4 to 1 in the paper (set `loss.tau`).
    """

    def __init__(self, tau: float = 0.4, **options: Any) -> None:
        super().__init__(**options)
        self.tau = tau

    def check(self) -> None:
        check_number("tau", self.tau, least=0, most=1)

    def points(self) -> tuple[Point, ...]:
        return Q, Point(student=1 - self.tau, teacher=self.tau, frozen=True)

    def value(self, q: Moment, u: Moment) -> Any:
        negative_entropy = -u.lse
        if self.tau > 0:
            negative_entropy = negative_entropy + self.tau * u.t
        if self.tau < 1:
            negative_entropy = negative_entropy + (1 - self.tau) * u.s
        return tape.detach(negative_entropy) - u.s + q.lse
