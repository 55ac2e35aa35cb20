"""The autograd function behind every loss, and the shape rules of the operators it calls.

Operators (`csrc/cpu/ops.cpp` has the schemas; every backend implements the same three):

    reduce(student (N, W) or (A, B, W), teacher?, labels (N,)?, mask (V,)?, args, program, vocab, ignore_index)
        -> stats (N, K + 1, 7): [max, sum of exp(x - max), mean s, mean t, cov ss, st, tt] at each point, then
           [s_y, t_y, max s, max t, kept, whether there are special logits, 0]
    rows(stats, args, program, sides) -> value (N,), coef (sides, N, K + 1, 10)
    spread(grad (N or 1,), student, teacher?, labels?, mask?, coef (N, K + 1, 10), vocab, ignore_index, side)
        -> gradient of that side's logits

A backend may have two more, the three in one pass over the rows:

    step(student, teacher?, labels?, mask?, args, program, weight (N or 1,)?, divisor, vocab, ignore_index)
        -> sum of weight / divisor * value (), gradient of the student's logits
    step_out(..., out) -> sum of weight / divisor * value (); the gradient goes to out

All statistics are float64. `args` and `program` are described at `kdkernels.loss.Program`:
args (1 or N, 3 + 2K) = [1/T_student, 1/T_teacher, T], K x (student, teacher coefficient);
program = [K, R, E, output register], K flags, R instructions (op, a, b, c, constant), E numbers of a separable loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .call import apply_factor, dense, factor, result_dtype
from .out import handed_over

STATS, COEFS = 7, 10


class Operators(NamedTuple):
    """What a backend offers.

    `step_add` adds the gradient to `out`. `rescale(gradient, factor)`: factor * gradient in place, or None: make it
    again.
    """

    reduce: Callable
    rows: Callable
    spread: Callable
    step: Callable | None = None
    step_out: Callable | None = None
    step_add: Callable | None = None
    rescale: Callable | None = None
    # The loss is separable: `spread` takes the program as well, behind coef. Its `reduce` in two steps, between which
    # vocabulary shards meet: that of its points, and (..., program, stats, vocab, ignore) -> sums (N, 5 or 7).
    elements: tuple[Callable, Callable] | None = None


NOT_AGAIN = ("kdkernels: this gradient is not itself differentiable; for double backward run the loss under "
             "kdkernels.use_backend('reference')")  # fmt: skip


def refuse(ctx, *grads):
    raise NotImplementedError(NOT_AGAIN)


def register(prefix: str, elements: bool = False) -> None:
    """Shape rules and a loud refusal of double backward for the operators `kdkernels::{prefix}...`.

    elements: they are those of the separable losses, which share `rows` with the others.
    """

    @torch.library.register_fake(f"kdkernels::{prefix}reduce")
    def _(student, teacher, labels, mask, args, program, vocab, ignore_index):
        points = (args.shape[1] - 3) // 2
        return student.new_empty((student.shape[:-1].numel(), points + 1, STATS), dtype=torch.float64)

    if not elements:

        @torch.library.register_fake(f"kdkernels::{prefix}rows")
        def rows(stats, args, program, sides):
            return stats.new_empty(stats.shape[0]), stats.new_empty((sides, *stats.shape[:2], COEFS))

    @torch.library.register_fake(f"kdkernels::{prefix}spread")
    def _(grad, student, teacher, *rest):
        side_logits = teacher if rest[-1] else student
        return side_logits.new_empty(side_logits.shape)

    names = ["reduce", "spread"] if elements else ["reduce", "rows", "spread"]
    if elements and hasattr(torch.ops.kdkernels, f"{prefix}sums"):
        names.append("sums")

        @torch.library.register_fake(f"kdkernels::{prefix}sums")
        def _(student, *args):
            return student.new_empty((student.shape[:-1].numel(), 5), dtype=torch.float64)

    if hasattr(torch.ops.kdkernels, f"{prefix}step"):
        names.append("step")

        @torch.library.register_fake(f"kdkernels::{prefix}step")
        def _(student, *args):
            return student.new_empty((), dtype=result_dtype(student)), student.new_empty(student.shape)

        @torch.library.register_fake(f"kdkernels::{prefix}step_out")
        def _(student, *args):
            return student.new_empty((), dtype=result_dtype(student))

    for name in names:
        torch.library.register_autograd(f"kdkernels::{prefix}{name}", refuse)


def rows_of_sums(rows: Callable) -> Callable:
    """`rows` of a separable loss: the logits' scale acts through phi as well, whatever a point's coefficients say."""

    def run(stats, args, program, sides):
        value, coef = rows(stats, args, program, sides)
        for side, by_scale in enumerate((stats[:, -2, 5], stats[:, -1, 6])[:sides]):
            slope = coef[side, :, -2, 4 + side]
            coef[side, :, -1, 4] += torch.where(slope == 0, 0.0, slope * by_scale)
        return value, coef

    return run


def points_of(program: Tensor, args: Tensor) -> tuple[Tensor, Tensor]:
    """The program and args of what of a separable loss is reduced first."""
    K = int(program[0]) - 1
    return torch.cat((program.new_tensor([K, 0, 0, 0]), program[4 : 4 + K])), args[:, : 3 + 2 * K].contiguous()


def with_sums(stats: Tensor, sums: Tensor) -> Tensor:
    """Statistics (N, K + 1, 7) of a separable loss, from those at its points (N, K, 7) and the sums over the classes:
    of phi, of its slopes in log q and log p, and of those times log q and log p; and of q and p, where those do not add
    up to 1."""
    total, *slopes = sums.unbind(-1)
    q, p, by_q, by_p = (torch.where(x.isfinite(), x, 0.0) for x in slopes[:4])
    if mass := slopes[4:]:
        q, p = (x / torch.where(z > 0, z, 1.0) for x, z in zip((q, p), mass, strict=True))
    log_q, log_p = (stats[:, k, 0] + stats[:, k, 1].log() for k in (0, 1))
    by_q, by_p = (y + torch.where(x == 0, 0.0, x * lse) for x, y, lse in ((q, by_q, log_q), (p, by_p, log_p)))
    one, end = torch.ones_like(total), stats[:, -1].clone()
    end[:, 6] = by_p
    last = torch.stack((one * math.inf, one, q, p, total, by_q, total), -1)
    return torch.cat((stats[:, :-1], last[:, None], end[:, None]), 1)


def register_buckets(prefix: str = "") -> None:
    """The same for `bucket` and `bucket_spread` (see `kdkernels.buckets`)."""

    @torch.library.register_fake(f"kdkernels::{prefix}bucket")
    def _(student, mask, classes, inverse, labels, vocab):
        rows, k = classes.shape
        shapes = (rows, k + (inverse is not None)), (0 if labels is None else rows, 2), (rows, 3)
        return tuple(student.new_empty(shape, dtype=torch.float64) for shape in shapes)

    @torch.library.register_fake(f"kdkernels::{prefix}bucket_spread")
    def _(grad, by_entropy, student, *rest):
        return student.new_empty(student.shape)

    for name in ("bucket", "bucket_spread"):
        torch.library.register_autograd(f"kdkernels::{prefix}{name}", refuse)


class Once(torch.autograd.Function):
    """function(*inputs), a gradient under create_graph=True: right once, and `message` when differentiated again."""

    @staticmethod
    def forward(ctx, message, function, *inputs):
        ctx.message = message
        return function(*inputs)

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(ctx.message)


class RowLoss(torch.autograd.Function):
    """Reduced (or per-row) loss of student (..., W) and teacher (..., W2), by the operators of a backend.

    Where only the student wants a gradient of a reduced loss, `step` makes it together with the value, and backward
    hands it over once. Not in float16, which would round what a GradScaler is about to multiply, and not under
    torch.compile, which may not look at the incoming gradient.
    """

    @staticmethod
    def forward(ctx, student, teacher, args, labels, mask, weight, divisor, program, operators, vocab, ignore, per_row):
        ctx.operators, step = operators, operators.step
        wants, ctx.gradient, coef = ctx.needs_input_grad, None, None
        s, t = dense(student), None if teacher is None else dense(teacher)
        half = student.dtype == torch.float16
        if step and wants[0] and not (wants[1] or wants[2] or per_row or half or torch.compiler.is_compiling()):
            value, ctx.gradient = step(s, t, labels, mask, args, program, weight, divisor, vocab, ignore)
        else:
            stats = operators.reduce(s, t, labels, mask, args, program, vocab, ignore)
            value, coef = operators.rows(stats, args, program, 2 if wants[1] else 1)
            value = apply_factor(value, factor(weight, divisor, labels, ignore, student), labels, ignore)
            value = (value.view(student.shape[:-1]) if per_row else value.sum()).to(result_dtype(student))
        ctx.save_for_backward(student, teacher, args, labels, mask, weight, coef, program)
        ctx.divisor, ctx.vocab, ctx.ignore, ctx.shape = divisor, vocab, ignore, student.shape
        return value

    @staticmethod
    def backward(ctx, grad):
        ready, ctx.gradient = ctx.gradient, None  # it is the caller's from here on, who may write to it
        if ready is not None and not torch.is_grad_enabled():
            scaled = ctx.operators.rescale(ready, grad)
            if scaled is not None:
                return scaled if scaled.shape == ctx.shape else scaled.view(ctx.shape), *(None,) * 11
        student, teacher, args, labels, mask, weight, coef, program = ctx.saved_tensors
        reduce, rows, spread, *_ = ctx.operators
        grad = grad.reshape(-1).to(torch.float64) * factor(weight, ctx.divisor, labels, ctx.ignore, student)
        s, t = dense(student), None if teacher is None else dense(teacher)
        if coef is None:  # the gradient was made by `step`, and is wanted again
            coef = rows(reduce(s, t, labels, mask, args, program, ctx.vocab, ctx.ignore), args, program, 1)[1]
        out: list[Tensor | None] = [None, None, None]
        for side in (0, 1):
            if ctx.needs_input_grad[side]:
                told = (coef[side], program) if ctx.operators.elements else (coef[side],)
                inputs = (grad, s, t, labels, mask, *told, ctx.vocab, ctx.ignore, side)
                again = torch.is_grad_enabled()
                slope = Once.apply(NOT_AGAIN, spread, *inputs) if again else spread(*inputs)
                out[side] = slope.view(ctx.saved_tensors[side].shape)
        if ctx.needs_input_grad[2]:  # the scales 1/T of standardised rows: d value / d log scale stands in coef
            slopes = torch.where(grad[:, None] == 0, 0.0, coef[:, :, -1, 4].transpose(0, 1) * grad[:, None])
            by_args = torch.zeros_like(args)
            by_args[:, : len(coef)] = slopes / args[:, : len(coef)]
            out[2] = by_args
        return (*out, *(None,) * 9)


def rescale(gradient: Tensor, grad: Tensor) -> Tensor | None:
    """grad * gradient, in place; None where that would round a narrow dtype twice, or give rows left out inf * 0."""
    factor = grad.item()
    if factor == 1:
        return gradient
    if not math.isfinite(factor):
        return None
    exact = gradient.dtype in (torch.float32, torch.float64) or abs(math.frexp(factor)[0]) == 0.5
    return gradient.mul_(factor) if exact else None


def value_and_grad(operators, rows, args, weight, divisor, code, ignore, out, accumulate):
    """(sum of the weighted row losses, gradient of the student's logits), without a graph, by `step`."""
    step, step_out = operators.step, operators.step_add if accumulate else operators.step_out
    student, teacher = dense(rows.student), None if rows.teacher is None else dense(rows.teacher)
    inputs = (student, teacher, rows.labels, rows.mask, args, code, weight, divisor, rows.vocab, ignore)
    if out is None or step_out is None or not (to := dense(out)).is_contiguous():
        value, gradient = step(*inputs)
        return value, handed_over(gradient.view(rows.student.shape), out, accumulate)
    value = step_out(*inputs, to)
    if to.data_ptr() != out.data_ptr():
        return value, out.copy_(to.view(out.shape))
    torch.autograd.graph.increment_version(out)
    return value, out
