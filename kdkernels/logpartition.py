"""The log-partition catalogue: one class, one paper, one formula.

q = softmax(s / T) is the student, p = softmax(t / T) the teacher, y the label. E(x) is log sum_i exp(x_i).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import tape
from .call import check_number
from .loss import Label, Loss, Moment, Point

__all__ = [
    "AlphaBetaLoss", "BrierLoss", "DKDLoss", "ForwardKLLoss", "HellingerLoss", "KDLoss", "LogitMSELoss", "RenyiLoss",
    "ReverseKLLoss", "TAIDLoss", "TTMLoss", "WTTMLoss",
]  # fmt: skip

Q, P = Point(student=1), Point(teacher=1)


def _kl(q: Moment, p: Moment, gamma: float = 1):
    """KL(p || q), the Bregman divergence of the log-partition; p = softmax(gamma t)."""
    return q.lse - p.lse + gamma * p.t - p.s


class ForwardKLLoss(Loss):
    """KL(p || q) = sum_i p_i log(p_i / q_i). [Hinton et al. 2015]"""

    def points(self):
        return Q, P

    def value(self, q, p):
        return _kl(q, p)


class KDLoss(ForwardKLLoss):
    """(1 - alpha) CE(q_1, y) + alpha T^2 KL(p || q). [Hinton et al. 2015, sec. 2]

    Args:
        temperature: T of the KL term; the cross-entropy is at temperature 1.
        alpha: weight in [0, 1] of the KL term. Labels are optional at alpha = 1.
    """

    def __init__(self, temperature=2.0, alpha=0.5, *, teacher_temperature=None, t_squared=True, label_smoothing=0.0,
                 z_loss=0.0, standardize=False, reduction="mean", ignore_index=-100):  # fmt: skip
        check_number("alpha", alpha, least=0, most=1)
        super().__init__(
            temperature=temperature, teacher_temperature=teacher_temperature, t_squared=t_squared,
            kd_weight=alpha, ce_weight=1 - alpha, label_smoothing=label_smoothing, z_loss=z_loss,
            standardize=standardize, reduction=reduction, ignore_index=ignore_index,
        )  # fmt: skip

    @property
    def alpha(self) -> float:
        return self.kd_weight

    def extra_repr(self) -> str:
        shown = super().extra_repr().split(", ")
        return ", ".join([f"alpha={self.alpha!r}", *(x for x in shown if not x.startswith(("kd_weight", "ce_weight")))])


class ReverseKLLoss(Loss):
    """KL(q || p) = sum_i q_i log(q_i / p_i). [Gu et al. 2024, MiniLLM]"""

    def points(self):
        return Q, P

    def value(self, q, p):
        return p.lse - q.lse + q.s - q.t


class TTMLoss(Loss):
    """KL(p^ || q) with the power-transformed teacher p^_i = p_i^gamma / sum_j p_j^gamma. [Zheng & Yang 2024, eq. 14]

    No temperature on the student and no T^2 factor, as published.

    Args:
        gamma: exponent > 0; 1 / T in the paper's terms.
    """

    def __init__(self, gamma: float = 0.5, **options):
        super().__init__(**options)
        self.gamma = check_number("gamma", gamma, above=0)

    def points(self):
        return Q, Point(teacher=self.gamma)

    def value(self, q, h):
        return _kl(q, h, self.gamma)

    def minimizer(self, teacher_logits, labels=None):
        return self.gamma * super().minimizer(teacher_logits)


class WTTMLoss(TTMLoss):
    """U KL(p^ || q) with p^ of TTM and the weight U = sum_i p_i^gamma. [Zheng & Yang 2024, eq. 20]

    1 <= U <= V^(1 - gamma): large for uncertain teachers.

    Args:
        gamma: exponent > 0.
        normalize_weight: divide U by its largest value V^(1 - gamma).
        detach_weight: no gradient to the teacher through U.
    """

    def __init__(self, gamma: float = 0.5, normalize_weight: bool = False, detach_weight: bool = False, **options):
        super().__init__(gamma, **options)
        self.normalize_weight, self.detach_weight = normalize_weight, detach_weight

    def points(self):
        return Q, Point(teacher=self.gamma), P, *([Point()] if self.normalize_weight else [])

    def value(self, q, h, p, classes=None):  # type: ignore[override]  # one point more than its base
        log_weight = h.lse - self.gamma * p.lse
        if classes is not None:
            log_weight = log_weight - (1 - self.gamma) * classes.lse
        weight = tape.exp(log_weight)
        return (tape.detach(weight) if self.detach_weight else weight) * super().value(q, h)


# Quadrature where a divided difference would lose its digits: (position, weight) of Gauss and Legendre on [0, 1] and
# (barycentric coordinates, weight) of Radon on a triangle, both exact for polynomials of degree 5.
_GAUSS = (((5 - 15**0.5) / 10, 5 / 18 + 0.0), (0.5, 8 / 18), ((5 + 15**0.5) / 10, 5 / 18))
_RADON = (
    ((1 / 3, 1 / 3, 1 / 3), 9 / 40),
    *(
        (corner, (155 + sign * 15**0.5) / 1200)
        for sign in (-1, 1)
        for x in [(6 + sign * 15**0.5) / 21]
        for corner in ((x, x, 1 - 2 * x), (x, 1 - 2 * x, x), (1 - 2 * x, x, x))
    ),
)


def _reach(resolution: float) -> float:
    """Where the quadrature takes over: 1e-3 in float64, else 1e-2."""
    return resolution ** (1 / 8) / 10


# Quadrature in place of a difference quotient of close arguments, exact for polynomials of degree 5: (position, weight)
# of Gauss and Legendre on [0, 1], (barycentric coordinates, weight) of Radon on a triangle.
_GAUSS = ((0.5 - 0.15**0.5, 5 / 18), (0.5, 8 / 18), (0.5 + 0.15**0.5, 5 / 18))
_RADON = [((1 / 3, 1 / 3, 1 / 3), 9 / 40)]
for _root in (15**0.5, -(15**0.5)):
    _x, _weight = (6 + _root) / 21, (155 + _root) / 1200
    _RADON += [(at, _weight) for at in ((_x, _x, 1 - 2 * _x), (_x, 1 - 2 * _x, _x), (1 - 2 * _x, _x, _x))]


def _close(x: float, y: float, resolution: float) -> bool:
    """Within 7e-4 (7e-3 where elements are float32) quadrature is nearer than the quotient."""
    return abs(x - y) < resolution ** (1 / 8) / 15


def _derivative(m: Moment, q: Moment, p: Moment):
    """Mean of log p - log q; like numbers are subtracted first: near p = q that is exact."""
    return (m.t - m.s) - (p.lse - q.lse)


class AlphaBetaLoss(Loss):
    """-sum_i [p_i^a q_i^b - a/(a+b) p_i^(a+b) - b/(a+b) q_i^(a+b)] / (a b). [Cichocki et al. 2011; Wang et al. 2025]

    With its limits at a = 0, b = 0, a + b = 0 and a = b = 0. (1, 0) is KL(p || q), (0, 1) KL(q || p),
    (1, 1) half the squared distance, (1/2, 1/2) four times the squared Hellinger distance.
    It is the divided difference f[0, a, a + b] of f(x) = sum_i p_i^x q_i^(a + b - x); quadrature of f' or f'' stands
    for the quotients of arguments that are close or equal.

    Args:
        alpha, beta: any finite numbers; the paper's language models use 0.2 and 0.7.
    """

    def __init__(self, alpha: float = 0.2, beta: float = 0.7, **options):
        super().__init__(**options)
        self.alpha, self.beta = check_number("alpha", alpha), check_number("beta", beta)

    def _arguments(self) -> tuple[tuple[float, float, float], int, list[tuple[float, float]]]:
        """(x, y, z) with those that are close in front, how many are, and (argument, weight) of the quadrature."""
        a, c = self.alpha, self.alpha + self.beta
        orders = ((a, c, 0.0), (0.0, a, c), (0.0, c, a))
        close = [order for order in orders if _close(*order[:2], self.resolution)]
        if not close:
            return orders[0], 0, []
        x, y, _ = corners = close[0]
        if len(close) == 1:
            return corners, 2, [(x + (y - x) * at, weight) for at, weight in _GAUSS]
        return corners, 3, [(sum(l * v for l, v in zip(at, corners, strict=True)), weight) for at, weight in _RADON]

    def _at(self, x: float) -> Point:
        return Point(student=self.alpha + self.beta - x, teacher=x)

    def points(self):
        corners, _, nodes = self._arguments()
        return tuple(dict.fromkeys([Q, P, *map(self._at, [*corners, *(x for x, _ in nodes)])]))  # each once

    def value(self, *moments):
        (x, y, z), close, nodes = self._arguments()
        a, b, c = self.alpha, self.beta, self.alpha + self.beta
        found = dict(zip(self.points(), moments, strict=True))
        q, p = found[Q], found[P]

        def log_f(x):
            return found[self._at(x)].lse - x * p.lse - (c - x) * q.lse

        def second(m):
            bias = _derivative(m, q, p)
            both = tape.where(m.s > -math.inf, tape.where(m.t > -math.inf, bias * bias, math.inf), math.inf)
            return m.tt - 2 * m.st + m.ss + both

        if close == 2:
            first = sum(w * tape.exp(log_f(at)) * _derivative(found[self._at(at)], q, p) for at, w in nodes)
            value = (first - tape.exp(log_f(y)) * tape.expm1(log_f(z) - log_f(y)) / (z - y)) / (x - z)
        elif close == 3:
            value = sum(w * tape.exp(log_f(at)) * second(found[self._at(at)]) for at, w in nodes) / 2
        if close and 0 in (a, b, c):
            return value
        cross = log_f(a)  # the other two relative to it: they cancel near q = p
        quotients = tape.exp(cross) * (tape.expm1(log_f(c) - cross) / (b * c) + tape.expm1(log_f(0.0) - cross) / (a * c))
        if not close:
            return quotients
        smooth = value  # f is not, where a class is impossible in one row alone
        smooth = tape.where(found[self._at(c)].s > -math.inf, smooth, quotients)
        return tape.where(found[self._at(0.0)].t > -math.inf, smooth, quotients)


class RenyiLoss(Loss):
    """log(sum_i p_i^alpha q_i^(1 - alpha)) / (alpha - 1): a Jensen gap of the log-partition. [Renyi 1961]

    Args:
        alpha: order > 0; 1 is KL(p || q). Near 1, quadrature of the derivative stands for the quotient.
    """

    def __init__(self, alpha: float = 0.5, **options):
        super().__init__(**options)
        self.alpha = check_number("alpha", alpha, above=0)

    def _nodes(self) -> dict[Point, float]:
        if self.alpha == 1:
            return {P: 1.0}
        orders = {1 + (self.alpha - 1) * at: weight for at, weight in _GAUSS}
        return {Point(student=1 - order, teacher=order): weight for order, weight in orders.items()}

    def points(self):
        near = _close(self.alpha, 1, self.resolution)
        own = Point(student=1 - self.alpha, teacher=self.alpha)
        return tuple(dict.fromkeys([Q, P, own, *(self._nodes() if near else ())]))

    def value(self, q, p, *rest):
        found = dict(zip(self.points(), (q, p, *rest), strict=True))
        smooth = sum(w * _derivative(found[at], q, p) for at, w in self._nodes().items() if at in found)
        if self.alpha == 1:
            return smooth
        quotient = (rest[0].lse - self.alpha * p.lse - (1 - self.alpha) * q.lse) / (self.alpha - 1)
        if not _close(self.alpha, 1, self.resolution):
            return quotient
        return tape.where(p.s > -math.inf, smooth, quotient)


class HellingerLoss(Loss):
    """1 - sum_i sqrt(p_i q_i): the squared Hellinger distance. [Hellinger 1909]"""

    def points(self):
        return Q, P, Point(student=0.5, teacher=0.5)

    def value(self, q, p, m):
        return -tape.expm1(m.lse - (p.lse + q.lse) / 2)


class DKDLoss(Loss):
    """alpha KL([p_y, 1 - p_y] || [q_y, 1 - q_y]) + beta KL(p^ || q^), p^ and q^ without y. [Zhao et al. 2022, eq. 7]

    The moments leave the label's class out, so that 1 - p_y never cancels.

    Args:
        alpha: weight of the target-class term.
        beta: weight of the non-target term; the paper uses 8 at temperature 4.
    """

    needs_labels = True

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, *, t_squared: bool = True, **options):
        super().__init__(t_squared=t_squared, **options)
        self.alpha, self.beta = check_number("alpha", alpha), check_number("beta", beta)

    def points(self):
        return Point(student=1, exclude_label=True), Point(teacher=1, exclude_label=True)

    def value(self, q, p, *, label: Label):
        a, b = label.teacher - p.lse, label.student - q.lse  # log odds of the label
        target = tape.times(tape.sigmoid(a), tape.softplus(-b) - tape.softplus(-a))
        target = target + tape.times(tape.sigmoid(-a), tape.softplus(b) - tape.softplus(a))
        others = tape.where(p.lse > -math.inf, _kl(q, p), 0.0)  # no other class, no such term
        return self.alpha * target + self.beta * others


class BrierLoss(Loss):
    """sum_i (q_i - 1[i = y])^2, from the student and the labels alone. [Brier 1950; Hamidi et al. 2024]"""

    needs_teacher = False
    needs_labels = True

    def points(self):
        return Point(student=1, exclude_label=True), Point(student=2, exclude_label=True)

    def value(self, q, qq, *, label: Label):
        odds = q.lse - label.student
        wrong = tape.sigmoid(odds)
        return wrong * wrong + tape.exp(qq.lse - 2 * label.student - 2 * tape.softplus(odds))

    def minimizer(self, teacher_logits, labels=None):
        return _one_hot(teacher_logits, labels) * 1e4


class LogitMSELoss(Loss):
    """sum_i (s_i - 1[i = y])^2, from the student's logits and the labels alone. [Hui & Belkin 2021]"""

    needs_teacher = False
    needs_labels = True

    def points(self):
        return (Point(exclude_label=True),)

    def value(self, u, *, label: Label):
        return tape.exp(u.lse) * (u.ss + u.s * u.s) + (label.student - 1) * (label.student - 1)

    def minimizer(self, teacher_logits, labels=None):
        return _one_hot(teacher_logits, labels) * self.temperature


def _one_hot(like: Tensor, labels: Tensor | None) -> Tensor:
    if labels is None:
        raise ValueError("minimizer needs labels")
    return torch.zeros_like(like).scatter(-1, labels.long().unsqueeze(-1), 1.0)


class TAIDLoss(Loss):
    """KL(u || q) with the detached mixture u = softmax((1 - tau) s + tau t). [Shing et al. 2025, eq. 3]

    The authors train on the cross-entropy of u and q: the same gradient q - u, another constant.

    Args:
        tau: share of the teacher in [0, 1]; annealed from 0.4 to 1 in the paper (set `loss.tau`).
    """

    def __init__(self, tau: float = 0.4, **options):
        super().__init__(**options)
        self.tau = check_number("tau", tau, least=0, most=1)

    def points(self):
        return Q, Point(student=1 - self.tau, teacher=self.tau, frozen=True)

    def value(self, q, u):
        negative_entropy = -u.lse
        if self.tau > 0:
            negative_entropy = negative_entropy + self.tau * u.t
        if self.tau < 1:
            negative_entropy = negative_entropy + (1 - self.tau) * u.s
        return tape.detach(negative_entropy) - u.s + q.lse
