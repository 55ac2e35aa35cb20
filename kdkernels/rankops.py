"""The autograd function behind the losses that compare orders, and the shape rules of their operators.

Operators (`csrc/cpu/ranks.cpp`, `csrc/cuda/ranks.cu`, `backends/triton_compare.py`). `kdkernels.ranks` says what a
kind's columns of `args` are, which are on the host unless rows have temperatures of their own.

    compare(student (N, W) or (A, B, W), teacher, labels (N,)?, mask (V,)?, args (1 or N, 5 + shifts), kind, vocab,
            ignore_index) -> value (N,) float64
    compare_step(grad (N or 1,), ...the same..., side) -> value (N,), grad times the gradient of that side's logits
    class_correlation(student, teacher, labels?, mask?, args (1 or N, 2) = 1/T of both, vocab, ignore_index,
            sides: 0, 1 or 2 that will want a gradient)
            -> [mean over the live classes of 1 - rho over the rows, 1 / their number] (2,), and what the next takes:
            means (2, vocab) float64, terms (7, vocab), rows (N, 8) float64
    class_spread(grad (1,), student, teacher, labels?, mask?, means, terms, rows, vocab, ignore_index, side)
            -> grad times the gradient, by that side's logits, of the sum over the classes
    together_step(...): see `kdkernels.together`
    agreement(student, teacher, labels?, mask?, args (1 or N, 2 or more) = 1/T of both, ..., lse (2, N), vocab, ignore)
            -> (N, 5) float64: the largest logit and its class, of both sides; sum_i min(p_i, q_i)
    row_distances(x (N, V), y (M, V)) -> (N, M) float64, sum_k |x_ik - y_jk|; row_distances_slopes(grad (N, M), x, y)
            -> the gradient by x
    rankdata(a (N, V)) -> ranks (N, V) float64;  spearman(a, b), kendall_tau(a, b) -> (N,) float64
"""

from __future__ import annotations

import torch
from torch import Tensor

from .call import apply_factor, dense, factor, result_dtype
from .ops import refuse, rescale

PEARSON, SPEARMAN, PLACKETT_LUCE, KENDALL, ULD = range(5)  # csrc/cpu/ranks.cpp reads the same numbers
METRICS = ("rankdata", "spearman", "kendall_tau")
NARROW = 32  # classes or fewer: computed in float64 (csrc/cpu/parallel.h)


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

    @torch.library.register_fake("kdkernels::class_correlation")
    def _(student, teacher, labels, mask, args, vocab, ignore_index, sides):
        double = vocab <= NARROW or torch.float64 in (student.dtype, teacher.dtype)
        terms = student.new_empty((7, vocab), dtype=torch.float64 if double else torch.float32)
        shapes = (2,), (2, vocab), (student.shape[:-1].numel(), 8)
        value, means, rows = (student.new_empty(shape, dtype=torch.float64) for shape in shapes)
        return value, means, terms, rows

    @torch.library.register_fake("kdkernels::agreement")
    def _(student, *rest):
        return student.new_empty((student.shape[:-1].numel(), 5), dtype=torch.float64)

    @torch.library.register_fake("kdkernels::class_spread")
    def _(grad, student, teacher, labels, mask, means, terms, rows, vocab, ignore_index, side):
        logits = teacher if side else student
        return logits.new_empty(logits.shape)

    @torch.library.register_fake("kdkernels::row_distances")
    def _(x, y):
        return x.new_empty((len(x), len(y)), dtype=torch.float64)

    @torch.library.register_fake("kdkernels::row_distances_slopes")
    def _(grad, x, y):
        return x.new_empty(x.shape)

    own = ("together_step", "class_correlation", "class_spread", "agreement", "row_distances", "row_distances_slopes")
    for name in (*own, *METRICS):
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


class OverRows(torch.autograd.Function):
    """Mean over the classes of 1 - rho of their probabilities in the rows, by a backend's two operators."""

    @staticmethod
    def forward(ctx, student, teacher, args, labels, mask, operators, vocab, ignore):
        ctx.spread, ctx.vocab, ctx.ignore = operators[1], vocab, ignore
        sides = 2 if ctx.needs_input_grad[1] else int(ctx.needs_input_grad[0])
        value, *found = operators[0](dense(student), dense(teacher), labels, mask, args, vocab, ignore, sides)
        ctx.save_for_backward(student, teacher, labels, mask, value, *found)
        return value[0]

    @staticmethod
    def backward(ctx, grad):
        student, teacher, labels, mask, value, *found = ctx.saved_tensors
        s, t, by = dense(student), dense(teacher), grad.reshape(1) * value[1]
        inputs = (by, s, t, labels, mask, *found, ctx.vocab, ctx.ignore)
        out: list[Tensor | None] = [None, None]
        for side, logits in enumerate((student, teacher)):
            if ctx.needs_input_grad[side]:
                out[side] = ctx.spread(*inputs, side).view(logits.shape)
        return *out, *(None,) * 6
