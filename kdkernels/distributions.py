"""Losses that sort the probabilities of a row, or split them into groups."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from . import call, tape
from .alphabeta import P, Q
from .buckets import blocks
from .groups import GroupMoments
from .logpartition import kl, reverse_kl
from .loss import Loss, Moment, Point
from .options import ELSEWHERE, check_bool, check_number
from .out import check_out, handed_over
from .rankops import NARROW, ULD, Compare
from .rowwise import CLASSES, RowsLoss
from .transport import SinkhornLoss

__all__ = ["AKLLoss", "GroupedKLLoss", "SinkhornLoss", "ULDLoss"]


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Terms of KL(p || q), 0 where p is."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q).where(p > 0, 0.0), 0.0)


class AKLLoss(Loss):
    """`w KL(p || q) + (1 - w) KL(q || p), w = g_head / (g_head + g_tail)`, held constant. [Wu et al. 2025, AKL]

    The head are the teacher's largest probabilities as long as they sum to mu or less, and the largest in any case;
    g are the sums of |p - q| over the head and over the rest. Equal probabilities are in the head together or not.
    The weight is computed by torch, a few rows at a time, in float32 for logits of 32 bits or less; on a CPU no row is
    sorted unless its head has thousands of classes.

    Args:
        mu: mass of the head, in (0, 1).
    """

    work = "the weight from torch, in passes: 2 exp, a selection"
    merges = False
    unsharded = "its head is one of the whole row"
    adds = False

    def __init__(self, mu: float = 0.5, **options: Any) -> None:
        super().__init__(**options)
        self.mu = mu

    def check(self) -> None:
        check_number("mu", self.mu, above=0, below=1)  # at 1 rounding would say which classes are the tail

    def points(self) -> tuple[Point, ...]:
        return Q, P, Point(student=0.5, given=True)  # whose coefficient is w

    def value(self, q: Moment, p: Moment, w: Moment) -> Any:
        return tape.times(w.student, kl(q, p)) + tape.times(1 - w.student, reverse_kl(q, p))

    def _prepared(self, rows, num_items, temperature):
        backend, operators, program, args, *rest = super()._prepared(rows, num_items, temperature)
        if self.kd_weight:
            weight, at = self._share(rows, args, operators is None), 3 + 2 * 2
            args = args.to(weight.device).expand(len(weight), -1)
            args = torch.cat((args[:, :at], weight, args[:, at + 1 :]), -1)
        return backend, operators, program, args, *rest

    @torch.no_grad()
    def _share(self, rows: call.Rows, args: Tensor, double: bool) -> Tensor:
        """w (N, 1) float64."""
        found, scales = [], args[:, :2].to(rows.student.device)
        assert rows.teacher is not None
        memory = rows.student.numel() if torch.compiler.is_compiling() else CLASSES
        for at, *pair in blocks(rows.student, rows.teacher, memory=memory):
            wide = double or rows.vocab <= NARROW or any(x.dtype == torch.float64 for x in pair)  # as kernels
            logits = [x[:, : rows.vocab].to(torch.float64 if wide else torch.float32) for x in pair]
            if rows.mask is not None:
                logits = [torch.where(rows.mask, x, -math.inf) for x in logits]
            scale = scales if len(scales) == 1 else scales[at]
            q, p = ((x * scale[:, k, None].to(x.dtype)).softmax(-1) for k, x in enumerate(logits))
            gap = (p - q).abs_()
            total = gap.sum(-1, keepdim=True, dtype=torch.float64)
            share = (gap * _head(p, self.mu)).sum(-1, keepdim=True, dtype=torch.float64) / total
            found.append(torch.where(total > 0, share, 0.5))
        return torch.cat(found) if found else args.new_zeros((0, 1), device=rows.student.device)


def _head(p: Tensor, mu: float) -> Tensor:
    """(N, V) whether a probability is one of the head's: sorts as few of the largest as show where it ends."""
    few = p.is_cpu and not torch.compiler.is_compiling()  # elsewhere a look at it would wait
    count = min(64, p.shape[-1]) if few else p.shape[-1]
    while True:
        top = p.topk(count).values
        end = (top.cumsum(-1, dtype=torch.float64) <= mu).sum(-1, keepdim=True)
        if count == p.shape[-1] or bool((end < count).all()):
            break
        count = min(8 * count, p.shape[-1])
    outside = torch.where(end < count, top.gather(-1, end.clamp(max=count - 1)), -1.0)  # the largest of them
    return (p > outside) | (p == top[:, :1])


class ULDLoss(RowsLoss):
    """`sum_i |q_(i) - p_(i)|`, both sorted from the largest: the universal logit distance. [Boizard et al. 2024]

    For teachers with a vocabulary of their own: teacher_logits may be of another width than student_logits (the
    narrower row is filled up with probabilities of 0; vocab_size and vocab_mask are then refused). Rows belong together
    as they stand: align the positions of two tokenizers first. The heads of a `LinearLoss` may be of two sizes. The
    authors add the cross-entropy, with this at 1.5. Equal probabilities share their slopes.
    """

    work = "3 w, 2 exp, 2 sorts"
    kernels = "ULD"
    unsharded = "it sorts whole rows"
    any_width = True

    def forward(self, student_logits: Tensor, teacher_logits: Any = None,
                labels: Tensor | None = None, **call: Any) -> Tensor:  # fmt: skip
        s, t = self._filled(student_logits, teacher_logits, labels, call)
        return super().forward(s, t, labels, **call)

    @torch.no_grad()
    def value_and_grad(self, student_logits: Tensor, teacher_logits: Any = None, labels: Tensor | None = None, *,
                       out: Tensor | None = None, accumulate: bool = False, **call: Any) -> tuple[Tensor, Tensor]:
        s, t = self._filled(student_logits, teacher_logits, labels, call)
        if s is student_logits:
            return super().value_and_grad(s, t, labels, out=out, accumulate=accumulate, **call)
        check_out(self, out, accumulate, student_logits, teacher_logits)
        value, gradient = super().value_and_grad(s, t, labels, **call)
        return value, handed_over(gradient[..., : student_logits.shape[-1]], out, accumulate)

    def _filled(self, s, t, labels, call):
        """Both rows at the width of the wider one."""
        if not (isinstance(s, Tensor) and isinstance(t, Tensor) and s.dim() and t.dim()):
            return s, t
        widths = s.shape[-1], t.shape[-1]
        if widths[0] == widths[1] or call.get("vocab_size") is not None:
            return s, t
        if call.get("vocab_mask") is not None:
            raise ValueError(f"vocab_mask needs rows of one width, got {tuple(s.shape)} and {tuple(t.shape)}")
        kept = isinstance(labels, Tensor) and labels.is_cpu and labels[labels != self.ignore_index]
        if isinstance(kept, Tensor) and (kept >= widths[0]).any():
            raise ValueError(f"labels must be in [0, {widths[0]}) or ignore_index={self.ignore_index}")
        wide = max(widths)
        return (x if x.shape[-1] == wide else torch.nn.functional.pad(x, (0, wide - x.shape[-1]), value=-math.inf)
                for x in (s, t))  # fmt: skip

    def distances(self, log_q: Tensor, log_p: Tensor, dead: Tensor, labels: Tensor | None = None) -> Tensor:
        q, p = (x.exp().sort(-1, descending=True).values for x in (log_q, log_p))
        sign = (q - p).detach().sign()
        return (_shared(sign, q) * q).sum(-1) - (_shared(sign, p) * p).sum(-1)

    def _by_kernels(self, kernels, rows, args, weight, divisor):
        scale = self.kd_weight * (args[:, 2] ** 2 if self.t_squared else torch.ones_like(args[:, 2]))
        weight = scale if weight is None else weight * scale
        args = torch.nn.functional.pad(args[:, :2], (0, 3))  # neither tau, nor top_k, nor a switch
        return Compare.apply(rows.student, rows.teacher, args, rows.labels, rows.mask, weight, divisor, ULD, kernels,
                             rows.vocab, self.ignore_index, self.reduction == "none")  # fmt: skip


def _shared(sign: Tensor, x: Tensor) -> Tensor:
    """The mean sign of equal entries of the sorted x (N, V): which of them stands where is nobody's choice."""
    new = torch.nn.functional.pad(x[:, 1:] != x[:, :-1], (1, 0)).long().cumsum(-1)
    total, count = (torch.zeros_like(sign).scatter_add(-1, new, y) for y in (sign, torch.ones_like(sign)))
    return (total / count.clamp(min=1)).gather(-1, new)


class GroupedKLLoss(RowsLoss):
    """`between KL(P || Q) + within sum_g w_g KL(p_g || q_g)`, for classes in groups. [Zhao et al. 2022; LTKD; GKD]

    P_g and Q_g are the masses of the groups, p_g and q_g the distributions within them. With w_g = P_g and both weights
    1 it is KL(p || q), exactly. DKD has one group for the label and one for the rest, and weighs the latter by 1;
    grouped KD has the student's top classes and the rest, LTKD classes by their frequency.

    Args:
        groups: the group of each class, integers from 0: (V,) for all rows; or, for groups of each row,
            "label": the label's class is group 1 and the others are group 0, as in `DKDLoss`, which is this loss with
            balanced=True, between=alpha, within=beta, and has kernels;
            a function of the log-probabilities log q and log p, (n, V) float64 of some of the rows without a gradient,
            and, if it has a parameter of that name, their labels (n,), that returns (n, V).
            None: one group, and so KL(p || q) times `within`. A `SparseTeacher` or `SharedVocab` may come with None
            and "label", with a function if tail="renormalise".
        between, within: weights; `within` may be a tuple of one for each group, and a group with weight 0 is left out.
        balanced: w_g = 1, so that a group counts whatever its mass.
    """

    work = "5 w, 4 exp"
    unsharded = "its groups are of classes of whole rows"
    groups: Any
    within: Any
    _count: int
    _asks_labels = False

    def __init__(self, groups: Any = None, between: float = 1.0, within: float | tuple = 1.0, balanced: bool = False,
                 **options: Any) -> None:  # fmt: skip
        super().__init__(**options)
        self.between, self.within, self.balanced = between, within, balanced
        if groups is None or isinstance(groups, str) or callable(groups):
            self.groups = groups
        else:
            self.register_buffer("groups", torch.as_tensor(groups), persistent=False)

    @property
    def kernels(self) -> str:  # type: ignore[override]
        return "" if callable(self.groups) else "GROUPED"

    @property
    def needs_labels(self) -> bool:  # type: ignore[override]
        return isinstance(self.groups, str) or self._asks_labels

    def check(self) -> None:
        vars(self)["_asks_labels"] = callable(self.groups) and "labels" in inspect.signature(self.groups).parameters
        if isinstance(self.groups, Tensor):
            _check_groups("groups", self.groups)
            if self.groups.dim() != 1:
                raise ValueError(f"groups must have shape (V,), got {tuple(self.groups.shape)}")
        elif isinstance(self.groups, str) and self.groups != "label":
            raise ValueError(f"groups must be integers, a function or 'label', got {self.groups!r}")
        vars(self)["numbered"] = isinstance(self.groups, Tensor)
        vars(self)["merges"] = self.groups is None or isinstance(self.groups, str)
        check_number("between", self.between)
        for weight in self.within if isinstance(self.within, tuple) else (self.within,):
            check_number("within", weight)
        check_bool("balanced", self.balanced)
        vars(self)["_count"] = int(self.groups.max()) + 1 if isinstance(self.groups, Tensor) else 1

    def distances(self, log_q: Tensor, log_p: Tensor, dead: Tensor, labels: Tensor | None = None) -> Tensor:
        at = self._groups_of(log_q.detach(), log_p.detach(), labels)
        count = int(at.max()) + 1 if at.numel() else 1
        (mass_q, rest_q), (mass_p, rest_p) = (_grouped(x, at, count) for x in (log_q, log_p))
        return self._of_groups(mass_q, mass_p, torch.zeros_like(mass_p).scatter_add(-1, at, _kl(rest_p, rest_q)))

    def _of_groups(self, log_q: Tensor, log_p: Tensor, inner: Tensor) -> Tensor:
        """(N,) from the log masses of the groups and the divergences within them, each (N, G)."""
        mass = log_p.exp()
        weighted = inner if self.balanced else mass * torch.where(mass == 0, 0.0, inner)
        between = self.between * _kl(log_p, log_q).sum(-1)
        if not isinstance(self.within, tuple):
            return between + self.within * weighted.sum(-1)
        if len(self.within) < inner.shape[-1]:
            raise ValueError(f"within must have a weight for each of {inner.shape[-1]} groups, got {len(self.within)}")
        within = inner.new_tensor(self.within[: inner.shape[-1]])
        return between + (within * torch.where(within == 0, 0.0, weighted)).sum(-1)

    def _by_kernels(self, kernels, rows, args, weight, divisor):
        labels, ignore = rows.labels, self.ignore_index
        if rows.weight is not None:  # a row that counts nothing passes nothing on, whatever it holds
            labels = torch.where(rows.weight == 0, ignore, ELSEWHERE if labels is None else labels)
        groups, count = None, 2
        if not isinstance(self.groups, str):
            groups = self._groups_of(args.new_empty(1, rows.vocab), args.new_empty(1, rows.vocab), None)[0].contiguous()
            count = self._count
        moments = GroupMoments.apply(rows.student, rows.teacher, kernels, labels, rows.mask, args, groups, count,
                                     rows.vocab, ignore)  # fmt: skip
        log_q, log_p, mean = moments.unbind(-1)
        empty = log_p == -math.inf
        lost = torch.where(log_q == -math.inf, 0.0, log_q)  # where the mean is infinite, or there is nothing to lose
        inner = torch.where(empty, 0.0, mean - torch.where(empty, 0.0, log_p) + lost)
        log_q, log_p = (x - x.logsumexp(-1, keepdim=True) for x in (log_q, log_p))
        value = self._of_groups(log_q, log_p, inner) * self.kd_weight
        value = value * args[:, 2] ** 2 if self.t_squared else value
        return call.reduced(value, rows.student, rows.labels, weight, divisor, ignore, self.reduction == "none")

    def _groups_of(self, log_q: Tensor, log_p: Tensor, labels: Tensor | None) -> Tensor:
        """(n, V) int64."""
        shape = log_q.shape
        if self.groups is None:
            return torch.zeros(1, dtype=torch.int64, device=log_q.device).expand(shape)
        if isinstance(self.groups, str):
            assert labels is not None
            return (torch.arange(shape[-1], device=labels.device) == labels[:, None]).long()
        if isinstance(self.groups, Tensor):
            if len(self.groups) < shape[-1]:
                raise ValueError(f"groups must have a group for each of {shape[-1]} classes, got {len(self.groups)}")
            return self.groups[: shape[-1]].to(log_q.device, torch.int64).expand(shape)
        found = self.groups(log_q, log_p, **({"labels": labels} if self._asks_labels else {}))
        if not isinstance(found, Tensor) or found.shape != shape:
            raise ValueError(f"groups must return a tensor of shape {tuple(shape)}, "
                             f"got {tuple(getattr(found, 'shape', ())) or type(found).__name__}")  # fmt: skip
        if found.numel():
            _check_groups("what groups returns", found)
        return found.to(log_q.device, torch.int64)


def _check_groups(name: str, groups: Tensor) -> None:
    if groups.is_floating_point() or groups.dtype == torch.bool or groups.is_complex():
        raise TypeError(f"{name} must be integers, got {groups.dtype}")
    if not groups.numel() or int(groups.min()) < 0:
        raise ValueError(f"{name} must be >= 0, got {'none' if not groups.numel() else int(groups.min())}")


def _grouped(log_p: Tensor, at: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """log P_g (N, G), and the log of what is left of each class (N, V): log p - log P_g."""
    top = log_p.new_full((len(log_p), count), -math.inf).scatter_reduce(-1, at, log_p.detach(), "amax")
    top = torch.where(top == -math.inf, 0.0, top)
    total = torch.zeros_like(top).scatter_add(-1, at, (log_p - top.gather(-1, at)).exp())
    mass = torch.where(total > 0, torch.where(total > 0, total, 1.0).log() + top, -math.inf)
    return mass, log_p - torch.where(mass == -math.inf, 0.0, mass).gather(-1, at)
