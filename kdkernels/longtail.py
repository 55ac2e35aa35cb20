"""The loss of long-tailed data: groups of classes, rebalanced over the batch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import call
from .buckets import blocks
from .distributions import GroupedKLLoss

__all__ = ["LTKDLoss"]


class LTKDLoss(GroupedKLLoss):
    """`T^2 [between KL(P' || Q) + within sum_g KL(p_g || q_g)], P'_g ~ P_g / S_g`. [Kim 2026, LTKD, CVPR]

    P_g, Q_g are the masses of the groups and p_g, q_g the distributions within them, at temperature T. S_g is the sum
    of P_g over the rows of the batch that count: a teacher of long-tailed data gives its head classes more than their
    share, and P' is normalised in each row. Within a group every group counts 1, whatever its mass. It is the
    `GroupedKLLoss` of the teacher's logits minus T log S_g, which are made in memory, in float32 for 16 bits. The
    factors of S are constants in the teacher's gradient. The paper adds the cross-entropy; its weights are not public.

    Args:
        groups: (V,) integers from 0, the group of each class: head, medium and tail in the paper, by the number of
            their training examples. None: one group.
        between, within: weights, the paper's alpha and beta.
        balanced: False weighs groups by P'_g within.
    """

    rowwise = False
    work = "5 w, 4 exp; the teacher's logits made again by torch: 1 exp"

    def __init__(self, groups: Any = None, between: float = 1.0, within: float = 1.0, balanced: bool = True, *,
                 t_squared: bool = True, **options: Any):  # fmt: skip
        super().__init__(groups, between, within, balanced, t_squared=t_squared, **options)

    def check(self):
        super().check()
        if not (self.groups is None or isinstance(self.groups, Tensor)):
            raise ValueError(f"groups must be integers, one for each class, got {self.groups!r}")
        if self.standardize:
            raise ValueError("standardize must be False: LTKDLoss rebalances the teacher's logits as they are")

    def minimizer(self, teacher_logits, labels=None):
        rows = call.check(self, teacher_logits, teacher_logits, labels, None, None, None, None)
        return super().minimizer(self._rebalanced(rows, None), labels)

    def with_metrics(self, *given, **more):
        """Refused: its value is not one of single rows."""
        raise TypeError("with_metrics is not for LTKDLoss, whose rows are related to each other")

    def _evaluate(self, rows, student_logits, num_items, temperature):
        if self.kd_weight:
            rows = rows._replace(teacher=self._rebalanced(rows, temperature))
        return super()._evaluate(rows, student_logits, num_items, temperature)

    def _rebalanced(self, rows: call.Rows, temperature) -> Tensor:
        """The teacher's logits with T log S_g taken from each."""
        teacher = rows.teacher
        assert teacher is not None
        with torch.no_grad():
            args = call.arguments(self, self._double, rows, temperature).to(teacher.device)
            inverse, groups = args[:, 1:2], self._groups_of(args.new_empty(1, rows.vocab), args, None)[0]
            counted = torch.ones(teacher.shape[:-1].numel(), dtype=torch.bool, device=teacher.device)
            for x, nothing in ((rows.labels, self.ignore_index), (rows.weight, 0)):
                counted = counted if x is None else counted & (x.reshape(-1) != nothing)
            total = args.new_zeros(self._count)
            for at, logits in blocks(teacher):
                scaled = logits[:, : rows.vocab].double() * (inverse if len(inverse) == 1 else inverse[at])
                scaled = scaled if rows.mask is None else torch.where(rows.mask, scaled, -math.inf)
                p = torch.where(counted[at, None], scaled.softmax(-1), 0.0)
                total.index_add_(0, groups, p.sum(0))
            shift = torch.where(total > 0, total, 1.0).log()[groups]  # a group that nobody has has no class to move
            shift = torch.nn.functional.pad(shift, (0, teacher.shape[-1] - rows.vocab)) / inverse
        least = torch.float64 if rows.student.dtype == torch.float64 else torch.float32
        wide = torch.promote_types(teacher.dtype, least)
        shift = shift.view(*(teacher.shape[:-1] if len(shift) > 1 else ()), -1)
        return teacher.to(wide) - shift.to(wide)
