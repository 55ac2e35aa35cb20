"""Moments of both rows by groups of classes, with gradients: what a loss of groups is a function of.

Operators (`csrc/cpu/groups.cpp`):

    group_moments(student (N, W) or (A, B, W), teacher, labels (N,)?, mask (V,)?, args (1 or N, 2 or more),
                  groups (V,)?, count, vocab, ignore_index) -> (N, count, 3) float64: of the classes of a group
                  log sum_i exp(b s_i), log sum_i exp(a t_i) and the mean of a t - b s under softmax(a t); b, a = the
                  first two of args
    group_spread(slopes (N, count, 3), moments, ...the same..., side) -> the gradient of that side's logits

Without groups the label's class is group 1 and the others are group 0. Of a group without a class the moments are
-inf, -inf and 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .call import dense
from .ops import NOT_AGAIN, Once, refuse


def register(prefix: str) -> None:
    """Shape rules and a loud refusal of double backward."""

    @torch.library.register_fake(f"kdkernels::{prefix}group_moments")
    def _(student, teacher, labels, mask, args, groups, count, vocab, ignore_index):
        return student.new_empty((student.shape[:-1].numel(), count, 3), dtype=torch.float64)

    @torch.library.register_fake(f"kdkernels::{prefix}group_spread")
    def _(slopes, moments, student, teacher, *rest):
        logits = teacher if rest[-1] else student
        return logits.new_empty(logits.shape)

    for name in ("group_moments", "group_spread"):
        torch.library.register_autograd(f"kdkernels::{prefix}{name}", refuse)


class GroupMoments(torch.autograd.Function):
    """student (..., W), teacher (..., W2) -> (N, count, 3), by the operators of a backend."""

    @staticmethod
    def forward(ctx, student, teacher, operators, *inputs):
        moments = operators[0](dense(student), dense(teacher), *inputs)
        ctx.save_for_backward(student, teacher, moments)
        ctx.spread, ctx.inputs = operators[1], inputs
        return moments

    @staticmethod
    def backward(ctx, slopes):
        student, teacher, moments = ctx.saved_tensors
        out: list[Tensor | None] = [None, None]
        again = torch.is_grad_enabled()
        for side, logits in enumerate((student, teacher)):
            if ctx.needs_input_grad[side]:
                inputs = (slopes.contiguous(), moments, dense(student), dense(teacher), *ctx.inputs, side)
                slope = Once.apply(NOT_AGAIN, ctx.spread, *inputs) if again else ctx.spread(*inputs)
                out[side] = slope.view(logits.shape)
        return *out, *(None,) * (len(ctx.inputs) + 1)
