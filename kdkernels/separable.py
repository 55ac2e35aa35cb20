"""Losses that are a sum over the classes, sum_i phi(log q_i, log p_i), and the catalogue of those.

q = softmax(s / T) is the student, p = softmax(t / T) the teacher.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends, elements, options, tape
from .loss import Loss
from .options import check_bool, check_number
from .rowwise import RowsLoss

__all__ = ["JSDLoss", "SkewKLLoss", "SkewReverseKLLoss", "TVDLoss"]


class SeparableLoss(RowsLoss):
    """h(sum_i phi(log q_i, log p_i)), q = softmax(s / T) the student's and p = softmax(t / T) the teacher's.

    Subclass it, declare `phi` and, where it is not the sum itself, `value`; every backend follows:

        class Pearson(kdkernels.SeparableLoss):
            def phi(self, log_q: Any, log_p: Any) -> Any:
                return (tape.exp(log_q) - tape.exp(log_p)) ** 2

    `phi` is traced once, and its slopes are derived: arithmetic and the functions of `kdkernels.tape` (`exp`, `log`,
    `times`, `where`, ...), no torch or math, no branches on data. log q_i or log p_i is -inf where a logit is; a class
    at -inf in both rows is left out. Write `times(exp(log_p), x)` for p x with 0 * inf = 0. The options are those of
    `kdkernels.Loss`. The CUDA C++ backend has no kernels for these losses: on a GPU they run on Triton's.
    """

    unsharded = None
    adds = True

    def phi(self, log_q: Any, log_p: Any) -> Any:
        """The contribution of a class."""
        raise NotImplementedError(f"{type(self).__name__} must declare phi()")

    def value(self, total: Any) -> Any:
        """The loss of a row from the sum of its contributions: the sum itself unless it is overridden."""
        return total

    def distances(self, log_q: Tensor, log_p: Tensor, dead: Tensor, labels: Tensor | None = None) -> Tensor:
        alive = [torch.where(dead, 0.0, x) for x in (log_q, log_p)]
        return torch.where(dead, 0.0, torch.as_tensor(self.phi(*alive))).sum(-1)

    def _distance(self, moments, label):
        (q, p), sums = moments[:2], moments[-1]
        total = (sums.ss + sums.tt) / 2  # each side's coefficients take its slope from one of them
        for lse, slope in ((q.lse, sums.s), (p.lse, sums.t)):  # through the log-partitions
            total = total - (lse - tape.detach(lse)) * tape.detach(slope)
        return self.value(total)

    def _elements(self):
        if not self.kd_weight:
            return []
        with options.explain_value(self, "phi"):
            return elements.lowered(self.phi)

    def _evaluate(self, rows, student_logits, num_items, temperature):
        return Loss._evaluate(self, rows, student_logits, num_items, temperature)

    def _pick(self, student, teacher):
        if not self.kd_weight:
            return super()._pick(student, teacher)
        backend = backends.pick_with("SEPARABLE", student, teacher)
        return backend, getattr(backend, "SEPARABLE", None)


class WeightedSum(SeparableLoss):
    """sum_k w_k loss_k of losses that are the sum over the classes itself."""

    def __init__(self, parts: list[tuple[float, SeparableLoss]], **options: Any) -> None:
        super().__init__(**options)
        self.parts = parts

    def phi(self, log_q: Any, log_p: Any) -> Any:
        total: Any = 0.0
        for weight, part in self.parts:
            total = total + weight * part.phi(log_q, log_p)
        return total


def in_one(terms) -> list[tuple[float, SeparableLoss]]:
    """The separable distillation terms of pairs (weight, loss) as one, or none.

    Raises:
        ValueError: they are not one sum over the classes.
    """
    found = [(w * x.kd_weight, x) for w, x in terms if isinstance(x, SeparableLoss) and x.kd_weight]
    if len(found) < 2:
        return found
    own = ("temperature", "teacher_temperature", "t_squared")
    first, *others = ({name: getattr(x, name) for name in own} for _, x in found)
    if any(x != first for x in others) or any(type(x).value is not SeparableLoss.value for _, x in found):
        names = ", ".join(type(x).__name__ for _, x in found)
        raise ValueError(f"separable losses share a sum if they have the same {', '.join(own)} and no value() of their "
                         f"own: {names}")  # fmt: skip
    return [(1.0, WeightedSum(found, **first))]


def _gap(log_q, log_p):
    """p, q, d = log p - log q, min(p, q) / max(p, q) - 1, and q - p to full precision where they meet."""
    p, q, d = tape.exp(log_p), tape.exp(log_q), log_p - log_q
    near = tape.expm1(tape.where(d > 0, -d, d))
    gap = tape.with_slopes(tape.where(d > 0, near * p, -near * q), (log_q, q), (log_p, -p))
    return p, q, d, near, gap


def _kl(p, d, gap):
    """Contribution to KL(p || q): p d - p + q, whose sum is the same, and every term of which is small near p = q."""
    return tape.times(p, d) + gap


def _mixture(d, near, share: float):
    """log(m / p) and log(m / q), m = share p + (1 - share) q, as functions of d = log(p / q)."""
    other = tape.where(d > 0, 1 - share, share)  # of the smaller of p and q
    log_ratio = tape.log1p(other * near)
    if not 0.09 < share < 0.91:  # log1p(x) is inexact where x is close to -1
        far = tape.log(tape.where(d > 0, share, 1 - share) + other * tape.exp(tape.where(d > 0, -d, d)))
        log_ratio = tape.where(near > -0.5, log_ratio, far)
    return tape.where(d > 0, log_ratio, log_ratio - d), tape.where(d > 0, log_ratio + d, log_ratio)


def _skewed(p, log_p, q, log_q, of_p, gap, share: float, detached: bool = False):
    """Contribution to KL(p || m), m = share p + (1 - share) q, as p log(p / m) - p + m.

    Slopes that are small differences near p = q are taken from p / m - 1. A multiple of p in the slope in log p changes
    no logit's slope: with p's share of m held constant that is p log(p / m) alone.
    """
    term, less = tape.times(p, -of_p), tape.expm1(-of_p)
    own = term if detached else term - share * p * less
    return tape.with_slopes(term + (1 - share) * gap, (log_p, own), (log_q, (share - 1) * q * less))


class JSDLoss(SeparableLoss):
    """`beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q`. [Agarwal et al. 2024, GKD]

    The mixture is one of probabilities, computed on the logarithms. At beta = 0 it is KL(p || q) and at 1 KL(q || p),
    as in GKD: the limits of JSD / beta and JSD / (1 - beta), not of JSD, which goes to 0 at both ends.

    Args:
        beta: share of the teacher in [0, 1].
    """

    merges = True  # an f-divergence

    def __init__(self, beta: float = 0.5, **options: Any) -> None:
        super().__init__(**options)
        self.beta = beta

    def check(self) -> None:
        check_number("beta", self.beta, least=0, most=1)

    def phi(self, log_q: Any, log_p: Any) -> Any:
        p, q, d, near, gap = _gap(log_q, log_p)
        if self.beta == 0:
            return _kl(p, d, gap)
        if self.beta == 1:
            return _kl(q, -d, -gap)
        # m is where the sum is least as a function of m: no slope goes through the logarithms.
        of_p, of_q = (tape.with_slopes(x) for x in _mixture(d, near, self.beta))
        return self.beta * tape.times(p, -of_p) + (1 - self.beta) * tape.times(q, -of_q)


class SkewKLLoss(SeparableLoss):
    """`KL(p || m), m = alpha p + (1 - alpha) q`. [Ko et al. 2024, DistiLLM]

    Args:
        alpha: share of the teacher in [0, 1); 0 is KL(p || q).
    """

    merges = True  # an f-divergence

    def __init__(self, alpha: float = 0.1, **options: Any) -> None:
        super().__init__(**options)
        self.alpha = alpha

    def check(self) -> None:
        if check_number("alpha", self.alpha, least=0, most=1) == 1:
            raise ValueError("alpha must be < 1: the mixture would be the first distribution itself, and the loss 0")

    def phi(self, log_q: Any, log_p: Any) -> Any:
        p, q, d, near, gap = _gap(log_q, log_p)
        if self.alpha == 0:
            return _kl(p, d, gap)
        return _skewed(p, log_p, q, log_q, _mixture(d, near, self.alpha)[0], gap, self.alpha)


class SkewReverseKLLoss(SkewKLLoss):
    """`KL(q || m), m = alpha q + (1 - alpha) p`. [Ko et al. 2024, DistiLLM; Ko et al. 2025, DistiLLM-2]

    Args:
        alpha: share of the student in [0, 1); 0 is KL(q || p).
        detach_mixture: no gradient through the student's share of m, as in the code of DistiLLM-2.
    """

    def __init__(self, alpha: float = 0.1, detach_mixture: bool = False, **options: Any) -> None:
        super().__init__(alpha, **options)
        self.detach_mixture = detach_mixture

    def check(self) -> None:
        super().check()
        check_bool("detach_mixture", self.detach_mixture)

    def phi(self, log_q: Any, log_p: Any) -> Any:
        p, q, d, near, gap = _gap(log_q, log_p)
        if self.alpha == 0:
            return _kl(q, -d, -gap)
        if self.detach_mixture:
            *_, d, near, _ = _gap(tape.detach(log_q), log_p)
        of_q = _mixture(d, near, 1 - self.alpha)[1]
        return _skewed(q, log_q, p, log_p, of_q, -gap, self.alpha, self.detach_mixture)


class TVDLoss(SeparableLoss):
    """`sum_i |p_i - q_i| / 2`, the total variation distance. [Wen et al. 2023, f-divergence KD]"""

    merges = True  # an f-divergence

    def phi(self, log_q: Any, log_p: Any) -> Any:
        p, q, d, near, _ = _gap(log_q, log_p)
        half = tape.where(near < 0, 0.5, 0.0)
        sign = tape.where(d > 0, half, -half)
        return tape.with_slopes(-half * near * tape.where(d > 0, p, q), (log_q, -sign * q), (log_p, sign * p))
