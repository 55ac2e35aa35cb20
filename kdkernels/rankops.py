"""The autograd function behind the losses that compare orders, and the shape rules of their operators.

Operators (`csrc/cpu/ranks.cpp`, `csrc/cuda/ranks.cu`, `backends/triton_compare.py`). `kdkernels.ranks` says what a
kind's columns of `args` are, which are on the host unless rows have temperatures of their own.

    compare(student (N, W) or (A, B, W), teacher, labels (N,)?, mask (V,)?, args (1 or N, 5 + shifts), kind, vocab,
            ignore_index) -> value (N,) float64
    compare_step(grad (N or 1,), ...the same..., side) -> value (N,), grad times the gradient of that side's logits
    together_step(...): see `kdkernels.together`
    rankdata(a (N, V)) -> ranks (N, V) float64;  spearman(a, b), kendall_tau(a, b) -> (N,) float64
"""

from __future__ import annotations

import torch
from torch import Tensor

from .call import apply_factor, dense, factor, result_dtype
from .ops import refuse, rescale

PEARSON, SPEARMAN, PLACKETT_LUCE, KENDALL, ULD = range(5)  # csrc/cpu/ranks.cpp reads the same numbers
METRICS = ("rankdata", "spearman", "kendall_tau")


def register(prefix: str, metrics: bool = False) -> None:
    """Shape rules and a loud refusal of double backward. metrics: and what else only the cpu has."""

    @torch.library.register_fake(f"kdkernels::{prefix}compare")
    def _(student, *rest):
        return student.new_empty(student.shape[:-1].numel(), dtype=torch.float64)

    @torch.library.register_fake(f"kdkernels::{prefix}compare_step")
    def _(grad, student, teacher, labels, mask, args, kind, vocab, ignore_index, side, *form):
        logits = teacher if side else student
        return student.new_empty(student.shape[:-1].numel(), dtype=torch.float64), logits.new_empty(logits.shape)

    for name in ("compare", "compare_step"):
        torch.library.register_autograd(f"kdkernels::{prefix}{name}", refuse)
    if not metrics:
        return

    @torch.library.register_fake("kdkernels::rankdata")
    def _(a):
        return a.new_empty((a.shape[:-1].numel(), a.shape[-1]), dtype=torch.float64)

    for name in METRICS[1:]:

        @torch.library.register_fake(f"kdkernels::{name}")
        def _(a, b):
            return a.new_empty(a.shape[:-1].numel(), dtype=torch.float64)

    @torch.library.register_fake("kdkernels::together_step")
    def _(student, *rest):
        return student.new_empty((), dtype=result_dtype(student)), student.new_empty(student.shape)

    for name in ("together_step", *METRICS):
        torch.library.register_autograd(f"kdkernels::{name}", refuse)


class Compare(torch.autograd.Function):
    """Reduced (or per-row) value of a comparison of student (..., W) and teacher (..., W2) by a backend's operators.

    Where only the student wants a gradient of a reduced loss it is made together with the value, and backward hands it
    over once; not in float16, which would round what a GradScaler is about to multiply, and not under torch.compile,
    which may not look at the incoming gradient.
    """

    @staticmethod
    def forward(ctx, student, teacher, args, labels, mask, weight, divisor, kind, operators, vocab, ignore, per_row):
        compare, step = ctx.operators = operators
        s, t = dense(student), dense(teacher)
        scale = factor(weight, divisor, labels, ignore, student)
        wants, ctx.gradient = ctx.needs_input_grad, None
        half = student.dtype == torch.float16
        if wants[0] and not (wants[1] or per_row or half or torch.compiler.is_compiling()):
            value, ctx.gradient = step(scale, s, t, labels, mask, args, kind, vocab, ignore, 0)
        else:
            value = compare(s, t, labels, mask, args, kind, vocab, ignore)
        value = apply_factor(value, scale, labels, ignore)
        ctx.save_for_backward(student, teacher, args, labels, mask, scale)
        ctx.kind, ctx.vocab, ctx.ignore = kind, vocab, ignore
        return (value.view(student.shape[:-1]) if per_row else value.sum()).to(result_dtype(student))

    @staticmethod
    def backward(ctx, grad):
        ready, ctx.gradient = ctx.gradient, None  # it is the caller's from here on, who may write to it
        student, teacher, args, labels, mask, scale = ctx.saved_tensors
        if ready is not None and not torch.is_grad_enabled() and (scaled := rescale(ready, grad)) is not None:
            return scaled.view(student.shape), *(None,) * 11
        grad = grad.reshape(-1).to(torch.float64) * scale
        s, t = dense(student), dense(teacher)
        out: list[Tensor | None] = [None, None]
        for side, logits in enumerate((student, teacher)):
            if ctx.needs_input_grad[side]:
                slope = ctx.operators[1](grad, s, t, labels, mask, args, ctx.kind, ctx.vocab, ctx.ignore, side)[1]
                out[side] = slope.view(logits.shape)
        return *out, *(None,) * 10
