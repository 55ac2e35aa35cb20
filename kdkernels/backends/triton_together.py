"""Spearman's loss by histograms and one of the log-partition in one Triton kernel: no sweep is the latter's alone.

One read of the logits means this: a row comes from memory once and is swept from L2, where it holds the rows at work,
for Spearman's loss, which has to count before it ranks and to rank before it has a slope. The sweep that counts takes
the statistics of the points as well, and the one that writes adds both gradients from the logits it has loaded. Of rows
of 16 bits, of w bytes a logit:

                    sweeps over both rows    bytes a class
    one by one      2 + 3                    4 w + w, 6 w + w, and the sum of two gradients 3 w: 15 w
    in one kernel   3                        6 w + w: 7 w

Wider rows are swept once more, for their moments: 6 and 17 w, 4 and 9 w. From memory, where L2 holds what is swept
again, 9 w become 3 w. A second launch sorts those of a Spearman's loss near 0 or 2 and adds its gradient.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..call import apply_factor, factor
from ..ops import COEFS, STATS, refuse
from ..rankops import SPEARMAN
from . import triton as base
from . import triton_compare as ranks
from .triton_tape import compiled as tape


@torch.library.custom_op("kdkernels::triton_together", mutates_args=())
def together(student: Tensor, teacher: Tensor, labels: Tensor | None, mask: Tensor | None, args: Tensor,
             program: Tensor, weight: Tensor, grad: Tensor, tau: float, vocab: int, ignore_index: int,
             alone: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Values (N,) of the log-partition's loss and of Spearman's; the gradient of the sum of weight and grad times
    them."""
    ranks.check_width(vocab)
    x = ranks._rows(grad, student, teacher, labels, mask, vocab, ignore_index, 0, 0)
    K, N, args = int(program[0]), len(x.value), base._there(args, student.device)
    stats, coef = x.value.new_empty((N, K + 1, STATS)), x.value.new_empty((N, K + 1, COEFS))
    value = torch.empty_like(x.value)
    if N:
        also = (args, base._there(program, student.device), weight, stats, coef, value,
                args.shape[1] * (len(args) > 1), int(len(weight) > 1))  # fmt: skip
        points = (K, triton.next_power_of_2(max(K, 1)), not alone, base._second(program))
        ranks.by_histograms("together", x, student, teacher, tau, also, points, tape(program.numpy().tobytes()))
    return value, x.value, x.out.to(student.dtype)


@together.register_fake
def _(student, *rest):
    value = student.new_empty(student.shape[:-1].numel(), dtype=torch.float64)
    return value, torch.empty_like(value), student.new_empty(student.shape)


torch.library.register_autograd("kdkernels::triton_together", refuse)


def step(student, teacher, labels, mask, args, program, weight, divisor, factors, comparisons, vocab, ignore, alone):
    """`kdkernels.together`: one comparison, which `ranks.counted` holds of."""
    weight, grad = factor(weight, divisor, labels, ignore, student), factors[0].contiguous()
    tau = comparisons[0, 0, 4].item()
    *values, gradient = together(student, teacher, labels, mask, args, program, weight.contiguous(), grad, tau, vocab,
                                 ignore, alone)  # fmt: skip
    own, rank = (apply_factor(v, by, labels, ignore) for v, by in zip(values, (weight, grad), strict=True))
    return (own + rank).sum().float(), gradient


def TOGETHER(student: Tensor, teacher: Tensor, vocab: int, losses: list):
    """`step`, and which one of these comparisons, pairs (kind, settings), it takes."""
    fits = [k for k, (kind, of) in enumerate(losses) if kind == SPEARMAN and not 0 < of[1] < vocab
            and ranks.counted(student, teacher, vocab, *of)]  # fmt: skip
    return step, fits[:1]
