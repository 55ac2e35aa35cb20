"""Value and gradients of a loss from hidden states, in one sweep over chunks of rows, and its autograd function.

For a chunk of n rows: logits (n, V) = hidden @ head.T, the loss's value and the gradient g (n, V) of those logits in
their place, then g @ head and the chunk's part of g.T @ hidden. The teacher's logits are there for a block of the
chunk's rows at a time. The buffers of a chunk serve the next one, and on a CPU the next call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends
from .base import BaseLoss
from .call import result_dtype
from .head import Head, fitting, slices
from .kept import Kept
from .ops import Once
from .options import readable
from .parts import part_of, reducing
from .sparse import SparseTeacher
from .vocab import SharedVocab

CACHED = 1 << 20  # bytes that are widened at a time on a CPU
BLOCK_CPU = 512  # rows with teacher's logits at a time: a product of fewer reads the head more often than it computes
_NOT_AGAIN = ("kdkernels: the gradient of LinearLoss is not itself differentiable; for double backward call its loss "
              "on the logits, under kdkernels.use_backend('reference')")  # fmt: skip


class Inputs(NamedTuple):
    """The tensors of a call. Any is a tensor or None; before it is checked, whatever a user passes."""

    student_hidden: Any  # (N, H)
    student_head: Any  # (V, H)
    student_bias: Any
    teacher_hidden: Any  # (N, H2)
    teacher_head: Any  # (V2, H2), once checked as wide as the loss wants them
    teacher_bias: Any
    teacher_head_scale: Any  # () or (V2, G): the unit of a quantised head, of groups of H2 / G columns
    teacher_logits: Any  # (N, V2)
    labels: Any  # (N,) int64
    factor: Any  # (1 or N,) float64: what a row's loss is multiplied with
    temperature: Any  # () or (N,)
    mask: Any  # (vocab,)

    def flat(self) -> Inputs:
        """With rows (N, .) from rows (..., .)."""
        wide = {n: getattr(self, n) for n in ("student_hidden", "teacher_hidden", "teacher_logits")}
        flat = {n: x.reshape(-1, x.shape[-1]) for n, x in wide.items() if x is not None}
        if self.temperature is not None and self.temperature.dim():
            flat["temperature"] = self.temperature.reshape(-1)
        return self._replace(**flat)


class Plan(NamedTuple):
    """What else there is to know about a call.

    Attributes:
        loss: a copy: its options may change before the backward.
        backend: the name of the one that runs, in the backward too.
        cast: what autocast makes of hidden states and heads, if it is on.
        chunk, block: rows of the student's logits and of the teacher's at a time.
        budget: bytes of logits at a time, and of a head's gradient whose memory is worth keeping.
        vocab: classes; rows of a head from here on are never looked at.
        scales, softcaps: of student and teacher.
        temperature: the call's, where it is a number.
        kept: what holds memory between calls.
        sparse: the teacher, where it is a SparseTeacher of rows (N, k).
        shared: what the vocabularies share, where they differ.
        shards: of the vocabulary (`kdkernels.parallel`), if these heads are only a part of it.
    """

    loss: BaseLoss
    backend: str
    cast: torch.dtype | None
    chunk: int
    block: int
    budget: int
    vocab: int
    scales: tuple[float, float]
    softcaps: tuple[float | None, float | None]
    temperature: float | None
    kept: Kept
    sparse: SparseTeacher | None
    shared: SharedVocab | None
    shards: Any

    @property
    def scratch(self) -> int:
        """Bytes that a product waiting to be added up, or a block of a dequantised head, may take."""
        return self.budget // 8


class Gradients(NamedTuple):
    """Of hidden (N, H), head (V, H) and bias (V,), or None. The sums over rows may be wider."""

    hidden: Tensor | None
    head: Tensor | None
    bias: Tensor | None


def sweep(plan: Plan, x: Inputs, factor: Tensor, wants: tuple[bool, bool, bool], per_row: bool = False):
    """-> value, the sum of factor * loss (or (N,), each for itself), and those `Gradients` of it that are wanted."""
    device = x.student_hidden.device.type
    with torch.no_grad(), torch.autocast(device, enabled=False), backends.use_backend(plan.backend):
        return _sweep(plan, x, factor.expand(len(x.student_hidden)), wants, per_row)


def _sweep(plan, x, factor, wants, per_row):
    rows, vocab = len(x.student_hidden), plan.vocab
    student, teacher = _heads(plan, x)
    dtype = student.weight.dtype
    chunk = max(min(plan.chunk, rows), 1)
    s_buffer = g_buffer = t_buffer = plan.kept.empty("student", x.student_hidden, (chunk, vocab), dtype)
    if student.softcap is not None and any(wants):
        g_buffer = plan.kept.empty("gradient", s_buffer, (chunk, vocab), dtype)
    t_dtype = dtype if teacher is None else cast_dtype(x.teacher_hidden, plan.cast)
    known = plan.sparse if x.teacher_logits is None else x.teacher_logits
    if teacher is not None:
        t_buffer = plan.kept.empty("teacher", s_buffer, (min(plan.block, chunk), len(teacher.weight)), t_dtype)
    whole = reducing(plan.loss, "none" if per_row else "sum")
    grads, values, product = _empty(plan, x, wants, rows > chunk), [], None
    if grads.head is not None and grads.head.dtype != dtype:
        width = x.student_head.shape[1]
        size = min(vocab, fitting(width, dtype, plan.scratch)), width
        product = plan.kept.empty("product", s_buffer, size, dtype)
    counts = factor != 0 if x.labels is None else (factor != 0) & (x.labels != plan.loss.ignore_index)
    for at in slices(rows, chunk):
        # Whatever a row holds that does not count: its gradient is 0, and 0 * NaN is not.
        hidden = torch.where(counts[at, None], x.student_hidden[at], 0.0).to(dtype)
        for own in slices(len(hidden), plan.block):
            now = slice(at.start + own.start, at.start + own.stop)
            s, t = student.logits(hidden[own], s_buffer[own]), None
            if teacher is not None:
                others = torch.where(counts[now, None], x.teacher_hidden[now], 0.0).to(t_dtype)
                t = teacher.logits(others, t_buffer[: len(others)])
            elif known is not None:
                t = known[now]
            loss = part_of(whole, now, rows)
            labels, temperature = (None if y is None else y[now] if y.dim() else y for y in (x.labels, x.temperature))
            given = dict(temperature=plan.temperature if temperature is None else temperature, vocab_mask=x.mask,
                         group=plan.shards, row_weight=factor[now])  # fmt: skip
            if plan.shared is not None:
                t, given["vocab_size"] = plan.shared(t), vocab
            if any(wants):
                value, g = _value_and_grad(loss, s, t, labels, g_buffer[own], **given)
                values.append(value)
                if (g := student.uncap(g, s)).data_ptr() != g_buffer[own].data_ptr():
                    g_buffer[own] = g
            else:
                values.append(loss(s, t, labels, **given))
        if any(wants):
            _add_up(grads, at, g_buffer[: len(hidden)], student, hidden, product)
    if plan.shards is not None and grads.hidden is not None:
        plan.shards.add_up(grads.hidden)
    values = values or [factor.new_zeros(0 if per_row else ())]
    value = torch.cat(values) if per_row else torch.stack(values).sum(dtype=torch.float64)
    return value.to(result_dtype(s_buffer)), grads


def cast_dtype(x: Tensor, cast: torch.dtype | None) -> torch.dtype:
    return x.dtype if cast is None or x.dtype == torch.float64 else cast


def _heads(plan: Plan, x: Inputs) -> tuple[Head, Head | None]:
    dtype = cast_dtype(x.student_hidden, plan.cast)
    bias = None if x.student_bias is None else x.student_bias[: plan.vocab].to(dtype)
    weight = x.student_head[: plan.vocab].to(dtype)
    student = Head(weight, bias, None, plan.scales[0], plan.softcaps[0], plan.scratch)
    if x.teacher_head is None:
        return student, None
    dtype, unit = cast_dtype(x.teacher_hidden, plan.cast), x.teacher_head_scale
    weight = x.teacher_head
    if unit is None:
        weight = weight.to(dtype)
    bias = None if x.teacher_bias is None else x.teacher_bias[: len(weight)].to(dtype)
    return student, Head(weight, bias, unit, plan.scales[1], plan.softcaps[1], plan.scratch)


def _value_and_grad(loss: BaseLoss, s: Tensor, t: Tensor | None, labels: Tensor | None, out: Tensor, **given):
    if not loss.standardize:
        return loss.value_and_grad(s, t, labels, out=out, **given)
    with torch.enable_grad():  # z-scores make the row's scale a function of its logits
        leaf = s.detach().requires_grad_()
        value = loss(leaf, t, labels, **given)
        return value.detach(), torch.autograd.grad(value, leaf)[0]


def _empty(plan: Plan, x: Inputs, wants: tuple[bool, bool, bool], several: bool) -> Gradients:
    """Where the gradients go. What is summed over several chunks is summed in float32 at least."""
    dtypes = [torch.promote_types(y.dtype, torch.float32) if several and y is not None else None for y in x[1:3]]
    hidden = torch.empty_like(x.student_hidden) if wants[0] else None
    head = _empty_head(plan, x.student_head, dtypes[0] or x.student_head.dtype) if wants[1] else None
    if head is not None:  # the first chunk writes the rest, if there is one
        head[plan.vocab if len(x.student_hidden) else 0 :] = 0
    return Gradients(hidden, head, torch.zeros_like(x.student_bias, dtype=dtypes[1]) if wants[2] else None)


def _empty_head(plan: Plan, head: Tensor, dtype: torch.dtype) -> Tensor:
    """As empty_like. Memory of no more than the budget is kept for the next call, once the gradient is gone."""
    if not head.is_contiguous() or head.numel() * dtype.itemsize > plan.budget:
        return torch.empty_like(head, dtype=dtype)
    return plan.kept.empty(f"head's {dtype}", head, head.shape, dtype)


def _add_up(grads: Gradients, at: slice, g: Tensor, head: Head, hidden: Tensor, product: Tensor | None) -> None:
    """Adds a chunk's part, from the gradient g (n, vocab) of its uncapped logits and its hidden states (n, H).

    product (., H) is where a part goes whose sum is of another dtype.
    """
    vocab, first = g.shape[1], at.start == 0
    if grads.hidden is not None:
        grads.hidden[at] = torch.addmm(hidden, g, head.weight, beta=0, alpha=head.scale)
    if grads.bias is not None:
        grads.bias[:vocab].add_(_column_sums(g, grads.bias.dtype), alpha=head.scale)
    if grads.head is None:
        return
    total = grads.head[:vocab]
    if product is None:
        torch.addmm(total, g.T, hidden, beta=0 if first else 1, alpha=head.scale, out=total)
        return
    for block in slices(vocab, len(product)):
        to = product[: block.stop - block.start]
        torch.addmm(to, g[:, block].T, hidden, beta=0, alpha=head.scale, out=to)
        if first:
            total[block].copy_(to)
        else:
            _widen_and_add(total[block], to)


def _column_sums(g: Tensor, dtype: torch.dtype) -> Tensor:
    if not g.is_cpu or g.dtype == dtype:
        return g.sum(0, dtype=dtype)
    blocks = slices(g.shape[1], fitting(len(g), dtype, CACHED))  # a wider sum of all of g would first widen all of it
    return torch.cat([g[:, block].sum(0, dtype=dtype) for block in blocks])


def _widen_and_add(total: Tensor, part: Tensor) -> None:
    if not total.is_cpu:
        total.add_(part)
        return
    for block in slices(len(total), fitting(total.shape[1], total.dtype, CACHED)):  # a mixed add_ takes 5 times as long
        total[block].add_(part[block].to(total.dtype))


class LinearRows(torch.autograd.Function):
    """`sweep`: gradients are made in the forward and handed over once; whatever is wanted later is made later."""

    @staticmethod
    def forward(ctx, plan, enabled, *tensors):
        x, per_row = Inputs(*tensors), plan.loss.reduction == "none"
        ctx.plan, ctx.wants = plan, tuple(wanted and enabled for wanted in ctx.needs_input_grad[2:5])
        # float16 would round what a GradScaler is about to multiply.
        now = any(ctx.wants) and not per_row and cast_dtype(x.student_hidden, plan.cast) != torch.float16
        value, grads = sweep(plan, x, x.factor, ctx.wants if now else (False, False, False), per_row)
        ctx.ready = grads if now else None
        ctx.save_for_backward(*tensors)
        return value

    @staticmethod
    def backward(ctx, grad):
        ready, ctx.ready = ctx.ready, None  # they are the caller's from here on, who may write to them
        x = Inputs(*ctx.saved_tensors)
        if ready is None:
            ready = sweep(ctx.plan, x, x.factor * grad.reshape(-1).to(torch.float64), ctx.wants)[1]
        elif not (readable(grad) and grad == 1):
            ready = Gradients(*(None if g is None else g.mul_(grad) for g in ready))
        if ready.head is not None and ready.head.dtype != x.student_head.dtype:
            rounded = _empty_head(ctx.plan, x.student_head, x.student_head.dtype)
            ready = ready._replace(head=rounded.copy_(ready.head))
        out = [None if g is None else g.to(like.dtype) for g, like in zip(ready, x[:3], strict=True)]
        if torch.is_grad_enabled():
            out = Once.apply(_NOT_AGAIN, lambda *them: tuple(g if g is None else g.view_as(g) for g in them[:3]), *out,
                             grad, *x[:3])  # fmt: skip
        return None, None, *out, *(None,) * (len(Inputs._fields) - 3)
