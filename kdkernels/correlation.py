"""Losses by correlation: Pearson's, that of whole batches of classes, and mixed with ranks."""

from __future__ import annotations

import math
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from . import backends, call, tape
from .backends.reference import _prepare
from .compare import PEARSON, Comparison, RankLoss, correlation
from .loss import Loss, Point
from .options import check_choice, check_number
from .rankops import OverRows
from .ranks import SpearmanLoss

__all__ = ["CMKDLoss", "DISTLoss", "PearsonLoss"]

EQUAL = 1e-13  # probabilities that differ from one another by less than this part of them
NOISE = 1e-12  # of a sum of squares that comes out of log-partitions, where all probabilities are equal


class PearsonLoss(Comparison):
    """`1 - rho(s, t)`, or of probabilities `1 - rho(q, p)`, Pearson's. [Pearson 1895; Huang et al. 2022, DIST eq. 4]

    Of probabilities q, p the deviations V q_i - 1 are summed, as expm1(s_i - L + log V) with L the log-partition: sums
    of squares minus 1 / V would cancel. Deviations below 1e-13 are rounding: rho is 0, as for a constant row. A class
    at -inf in one row is then a class of probability 0 there, and only classes at -inf in both are left out. The
    teacher's gradient is there too.

    On vocabulary shards the loss of probabilities comes from log-partitions, whose differences cancel where the logits
    over T hardly differ: in float32 with deviations of 1 (0.1, 0.01) the gradient errs by 1e-6 (1e-5, 1e-4). That of
    logits looks at whole rows.

    Args:
        space: "logits" or "probs".
    """

    work = "3 w, 0 exp (of probabilities: 2)"
    kind = PEARSON
    teacher_gradient = True

    def __init__(self, space: str = "logits", **options: Any):
        super().__init__(**options)
        self.space = space

    def check(self):
        check_choice("space", self.space, ("logits", "probs"))
        vars(self)["dead_in_both"] = self.space == "probs"
        vars(self)["scale_free"] = self.space == "logits"
        vars(self)["unsharded"] = None if self.space == "probs" else type(self).unsharded
        vars(self).pop("_in_sums", None)

    def on_shards(self):
        if "_in_sums" not in vars(self):
            shared = signature(Comparison).parameters
            vars(self)["_in_sums"] = _PearsonInSums(**{name: getattr(self, name) for name in shared})
        return vars(self)["_in_sums"]

    def minimizer(self, teacher_logits, labels=None):
        return teacher_logits

    def settings(self):
        return 1.0, 0, self.space == "probs"

    def definition(self, s, t, live, args):
        noise = live.sum(-1) * EQUAL**2 if self.space == "probs" else torch.zeros_like(s[:, 0])
        u, v = (self._deviations(x, live, args[:, k, None]) for k, x in enumerate((s, t)))
        return 1 - correlation(u, v, noise=(noise, noise))

    def _deviations(self, x, live, scale):
        n = live.sum(-1, keepdim=True)
        if self.space == "probs":
            x = torch.where(live, x * scale, -torch.inf)
            x = x - x.detach().amax(-1, keepdim=True)  # log V - L is then exact where the logits hardly differ
            x = torch.where(live, torch.expm1(x + (n.log() - x.logsumexp(-1, keepdim=True))), 0.0)  # of mean 0, nearly
        return (x - x.sum(-1, keepdim=True) / n) * live


class _PearsonInSums(Loss):
    """`PearsonLoss` of probabilities, V sum_i q_i p_i - 1 and the like from log-partitions: those of shards add up."""

    def points(self):
        return (Point(student=1), Point(teacher=1), Point(student=1, teacher=1), Point(student=2), Point(teacher=2),
                Point())  # fmt: skip

    def value(self, q, p, qp, qq, pp, u):
        joint = tape.expm1(qp.lse - q.lse - p.lse + u.lse)
        own, other = (tape.expm1(xx.lse - 2 * x.lse + u.lse) for x, xx in ((q, qq), (p, pp)))
        size = tape.where(own > NOISE, own, 1.0) * tape.where(other > NOISE, other, 1.0)
        varied = tape.where(own > NOISE, tape.where(other > NOISE, 1.0, 0.0), 0.0)
        return 1 - varied * joint * tape.exp(-tape.log(size) / 2)


class DISTLoss(RankLoss):
    """`beta mean_i (1 - rho(q_i, p_i)) + gamma mean_k (1 - rho(q_.k, p_.k))`, rho Pearson's. [Huang et al. 2022, eq. 9]

    The first term compares the probabilities of a row, the second those of a class over the rows of the batch; a class
    that one side gives the same probability in all rows counts 1 there. row_weight and num_items act on the first term
    only. The authors add the cross-entropy, and use temperature 4 with T^2 on CIFAR-100 and 1 on ImageNet. There is a
    gradient for the teacher. The second term has kernels in C++; elsewhere torch computes it in float64, in memory of a
    few times the logits'.

    Args:
        temperature: T > 0 of both softmaxes.
        beta: weight of the inter-class term, >= 0.
        gamma: weight of the intra-class term, >= 0; it knows the whole batch, so that reduction must be "mean".
    """

    work = "3 w, 2 exp; between rows 7 w, 6 exp, or by torch in passes over float64"
    teacher_gradient = True
    rowwise = False
    _inter: PearsonLoss

    def __init__(self, temperature: float = 1.0, beta: float = 1.0, gamma: float = 1.0, *, t_squared: bool = True,
                 **options: Any):  # fmt: skip
        super().__init__(temperature=temperature, t_squared=t_squared, **options)
        self.beta, self.gamma = beta, gamma

    def check(self):
        check_number("beta", self.beta, least=0)
        check_number("gamma", self.gamma, least=0)
        if self.reduction != "mean":
            raise ValueError(f"reduction must be 'mean' for a loss over whole batches, got {self.reduction!r}")

    def minimizer(self, teacher_logits, labels=None):
        return teacher_logits

    def _prepare(self):
        super()._prepare()
        vars(self)["_inter"] = PearsonLoss(
            "probs", temperature=self.temperature, t_squared=self.t_squared, ignore_index=self.ignore_index
        )

    def _term(self, rows, student_logits, num_items, temperature):
        inter = self._inter._term(rows, student_logits, num_items, temperature)
        T = self.temperature if temperature is None else temperature
        if isinstance(T, Tensor) and T.dim():
            T = T.reshape(-1, 1)
        squared = T**2 if self.t_squared else 1.0
        if isinstance(squared, Tensor) and squared.dim():
            raise ValueError("temperature must be one number for t_squared: the classes of a batch share the factor")
        intra = squared * class_correlation(rows, self.ignore_index, T)
        return self.kd_weight * (self.beta * inter + self.gamma * intra.to(inter.dtype))


def class_correlation(rows: call.Rows, ignore: int, T) -> Tensor:
    """Mean over the live classes of 1 - rho of its probabilities over the kept rows."""
    operators = getattr(backends.pick(rows.student, rows.teacher), "OVER_ROWS", None)
    if operators is None:
        return _by_definition(rows, None if rows.labels is None else rows.labels != ignore, T)
    T = T.reshape(-1, 1) if isinstance(T, Tensor) else torch.full((1, 1), float(T), dtype=torch.float64)
    args = (1 / T.to(torch.float64)).expand(-1, 2).contiguous()
    return OverRows.apply(rows.student, rows.teacher, args, rows.labels, rows.mask, operators, rows.vocab, ignore)


def _by_definition(rows: call.Rows, keep: Tensor | None, T) -> Tensor:
    """Of q over the class's mean, less 1: rho knows no scale, and a class unlikely in all rows counts as any other."""
    s, t = (_prepare(x, rows, keep) / T for x in (rows.student, rows.teacher))
    some = torch.ones_like(s[:, :1]) if keep is None else keep[:, None].to(s.dtype)
    live = (((s != -math.inf) | (t != -math.inf)) & (some > 0)).any(0)
    u, v = (_relative(x.log_softmax(-1), some) for x in (s, t))
    noise = some.sum() * EQUAL**2
    value = torch.where(live, 1 - correlation(u, v, 0, (noise, noise)), 0.0).sum() / live.sum().clamp(min=1)
    nothing = ((s == -math.inf).all(-1) | (t == -math.inf).all(-1)) & (some[:, 0] > 0)
    return torch.where(nothing.any(), math.nan, value)  # a row without a distribution


def _relative(log_q: Tensor, some: Tensor) -> Tensor:
    """Deviations over the rows that count, of mean 0."""
    count = some.sum().clamp(min=1)
    mean = (log_q.detach() + some.log()).logsumexp(0) - count.log()
    u = torch.expm1(torch.where(some > 0, log_q - torch.where(mean == -math.inf, 0.0, mean), 0.0))
    return (u - u.sum(0) / count) * some


class _Uncertainty(Loss):
    """H(p) / log V of one row, between 0 and 1; 0 for a row with one class."""

    needs_teacher = False

    def points(self):
        return Point(student=1), Point()

    def value(self, p, u):
        several = u.lse > 0
        return tape.where(several, (p.lse - p.s) / tape.where(several, u.lse, 1.0), 0.0)


class CMKDLoss(RankLoss):
    """`a_i (1 - Pearson(s, t)) + b_i (1 - Spearman(s, t))`, weighed by the teacher's uncertainty. [Niu et al. 2024]

    From the paper's abstract: Pearson and Spearman correlation together, and weights that follow the difficulty of the
    sample. The paper's exact weights were not available, these are ours: h = H(p) / log V is the teacher's entropy
    over its own classes, between 0 and 1, a = pearson_weight (1 - h) and b = spearman_weight h, so that hard samples
    lean on ranks. The soft ranks are those of `SpearmanLoss`. z-scores of the logits, which the paper takes, change
    neither correlation.

    Args:
        pearson_weight, spearman_weight: >= 0.
        hard: the term that rows with an uncertain teacher lean on: "spearman", "pearson", or "both", which leaves both
            weights constant.
        tau, top_k: of `SpearmanLoss`.
        temperature: of the softmax whose entropy is taken.
    """

    work = "10 w, 1 exp, and those of the soft ranks"
    _parts: tuple

    def __init__(self, pearson_weight: float = 1.0, spearman_weight: float = 1.0, hard: str = "spearman",
                 tau: float = 0.1, top_k: int | None = None, **options: Any):  # fmt: skip
        super().__init__(**options)
        self.pearson_weight, self.spearman_weight, self.hard = pearson_weight, spearman_weight, hard
        self.tau, self.top_k = tau, top_k

    def check(self):
        check_number("pearson_weight", self.pearson_weight, least=0)
        check_number("spearman_weight", self.spearman_weight, least=0)
        check_choice("hard", self.hard, ("spearman", "pearson", "both"))

    def _prepare(self):
        super()._prepare()
        shared: dict[str, Any] = {
            name: getattr(self, name) for name in ("temperature", "t_squared", "reduction", "ignore_index")
        }
        vars(self)["_parts"] = (
            PearsonLoss("logits", kd_weight=self.kd_weight * self.pearson_weight, **shared),
            SpearmanLoss(self.tau, top_k=self.top_k, kd_weight=self.kd_weight * self.spearman_weight, **shared),
            _Uncertainty(temperature=self.temperature, reduction="none", ignore_index=self.ignore_index),
        )

    def _term(self, rows: Any, student_logits, num_items, temperature):
        self._check_teacher(rows.teacher)
        pearson, spearman, uncertainty = self._parts
        if self.hard == "both":
            weights = (rows.weight, rows.weight)
        else:
            with torch.no_grad():
                t = rows.teacher.double() if rows.student.dtype == torch.float64 else rows.teacher
                alone = rows._replace(student=t, teacher=None, weight=None)
                h = uncertainty._evaluate(alone, t, None, temperature).reshape(-1).double()
            hard, easy = h, 1 - h
            if rows.weight is not None:  # a weight of 0 counts nothing, whatever the row holds
                hard, easy = (torch.where(rows.weight == 0, 0.0, x * rows.weight) for x in (hard, easy))
            weights = (easy, hard) if self.hard == "spearman" else (hard, easy)
        first, second = (
            part._term(rows._replace(weight=weight), student_logits, num_items, temperature)
            for part, weight in zip((pearson, spearman), weights, strict=True)
        )
        return first + second
