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


def _kl(q: Moment, p: Moment):
    """KL(p || q): the Bregman divergence of the log-partition."""
    return q.lse - p.lse + p.t - p.s


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
        return q.lse - h.lse + self.gamma * h.t - h.s

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


class AlphaBetaLoss(Loss):
    """-sum_i [p_i^a q_i^b - a/(a+b) p_i^(a+b) - b/(a+b) q_i^(a+b)] / (a b). [Cichocki et al. 2011; Wang et al. 2025]

    With its limits at a = 0, b = 0, a + b = 0 and a = b = 0. (1, 0) is KL(p || q), (0, 1) KL(q || p),
    (1, 1) half the squared distance, (1/2, 1/2) four times the squared Hellinger distance.
    A parameter within the square root (cube root for a = b = 0) of the statistics' resolution of a limit takes the
    limit (1e-16 in float64, else 1e-8): closer to it the difference quotient loses more than that.

    Args:
        alpha, beta: any finite numbers; the paper's language models use 0.2 and 0.7.
    """

    def __init__(self, alpha: float = 0.2, beta: float = 0.7, **options):
        super().__init__(**options)
        self.alpha, self.beta = check_number("alpha", alpha), check_number("beta", beta)

    def _limit(self) -> tuple[bool, bool, bool]:
        near, origin = self.resolution ** (1 / 2), self.resolution ** (1 / 3)
        if abs(self.alpha) < origin and abs(self.beta) < origin:  # a difference quotient of second order
            return True, True, True
        return abs(self.alpha) < near, abs(self.beta) < near, abs(self.alpha + self.beta) < near

    def points(self):
        a, b = self.alpha, self.beta
        match self._limit():
            case (True, True, _):
                return Q, P, Point()
            case (True, _, _):
                return Q, P, Point(student=b), Point(teacher=b)
            case (_, True, _):
                return Q, P, Point(teacher=a), Point(student=a)
            case (_, _, True):
                return Q, P, Point(student=-a, teacher=a), Point()
        return Q, P, Point(student=b, teacher=a), Point(student=a + b), Point(teacher=a + b)

    def value(self, q, p, *rest):
        a, b = self.alpha, self.beta
        match self._limit():
            case (True, True, _):
                (u,) = rest
                bias = u.t - u.s - (p.lse - q.lse)
                both = tape.where(u.s > -math.inf, tape.where(u.t > -math.inf, bias * bias, math.inf), math.inf)
                return tape.exp(u.lse) * (u.tt - 2 * u.st + u.ss + both) / 2
            case (True, _, _):
                return _tilted(b, rest[0], rest[1], q.lse, p.lse, rest[0].s - rest[0].t)
            case (_, True, _):
                return _tilted(a, rest[0], rest[1], p.lse, q.lse, rest[0].t - rest[0].s)
            case (_, _, True):
                m, u = rest
                shift = p.lse - q.lse
                excess = tape.expm1((m.lse - u.lse) - a * shift)  # mean of (p/q)^a - 1
                return tape.exp(u.lse) * (excess + a * ((u.s - u.t) + shift)) / a**2
        m, qq, pp = rest
        c = a + b
        log_cross = m.lse - a * p.lse - b * q.lse  # the other two sums relative to it: they cancel near q = p
        teacher = tape.expm1(pp.lse - c * p.lse - log_cross) / (b * c)
        student = tape.expm1(qq.lse - c * q.lse - log_cross) / (a * c)
        return tape.exp(log_cross) * (teacher + student)


def _tilted(b: float, x: Moment, y: Moment, own_lse, other_lse, difference):
    """1/b^2 sum_i [x_i^b log(x_i^b / y_i^b) - x_i^b + y_i^b] from the moments at b times the logits of x and of y."""
    shift = own_lse - other_lse  # differences of like numbers first: near x = y they are exact
    excess = tape.expm1((y.lse - x.lse) + b * shift)
    return tape.exp(x.lse - b * own_lse) * (b * (difference - shift) + excess) / b**2


class RenyiLoss(Loss):
    """log(sum_i p_i^alpha q_i^(1 - alpha)) / (alpha - 1): a Jensen gap of the log-partition. [Renyi 1961]

    Args:
        alpha: order > 0; 1 is KL(p || q).
    """

    def __init__(self, alpha: float = 0.5, **options):
        super().__init__(**options)
        self.alpha = check_number("alpha", alpha, above=0)

    def _is_kl(self) -> bool:
        return abs(self.alpha - 1) < math.sqrt(self.resolution)

    def points(self):
        return (Q, P) if self._is_kl() else (Q, P, Point(student=1 - self.alpha, teacher=self.alpha))

    def value(self, q, p, m=None):
        if m is None:
            return _kl(q, p)
        return (m.lse - self.alpha * p.lse - (1 - self.alpha) * q.lse) / (self.alpha - 1)


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
