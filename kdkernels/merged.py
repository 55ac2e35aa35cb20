"""Losses of a student and a teacher of outcomes (`buckets.Merged`): checks, both rows of outcomes, what is added."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import backends, call, parallel
from .buckets import Merged, Outcomes, Part, blocks, full_copy, gone, inverse_of, or_last, wide_of
from .ops import rescale
from .options import readable
from .out import check_out, handed_over

if TYPE_CHECKING:
    from .base import BaseLoss


def run(loss: BaseLoss, student: Tensor, teacher: Merged, labels=None, **given) -> Tensor:
    """The loss as called with such a teacher. A loss that knows no teacher is not given one."""
    function: Any = torch.compiler.disable(_run) if torch.compiler.is_compiling() else _run
    return function(loss, student, teacher, labels, None, **given)


def _run(loss: Any, student: Tensor, teacher: Merged, labels, seen: dict | None, **given) -> Tensor:
    call.check_logits("student_logits", student)
    if hasattr(loss, "terms"):
        return _of_terms(loss, student, teacher, labels, **given)
    if not loss._uses.teacher:
        return loss(student, None, labels, **given | {"vocab_size": teacher.vocab(given.get("vocab_size"), student)})
    return evaluate(loss, student, teacher, labels, seen=seen, **given)


def _of_terms(loss: Any, student: Tensor, teacher: Merged, labels, **given) -> Tensor:
    """A sum: its terms one by one, for a cross-entropy is that of whole rows and a divergence that of the outcomes,
    which terms of one temperature share."""
    terms = loss.weighed(given.get("temperature"))
    if teacher.sparse_gradient and not all(term._uses.teacher for term in loss.terms):
        raise ValueError("sparse_gradient needs losses that look at the teacher: the gradient of others is dense")
    seen: dict = {}
    each: list[Tensor] = [weight * _run(term, student, teacher, labels, seen, **given) for weight, term in terms]
    return sum(each[1:], each[0])


def check_whole(student, teacher: Merged, group) -> None:
    if group is not None or parallel.is_sharded(student):
        raise ValueError(f"a {type(teacher).__name__} needs student_logits of the whole vocabulary, not shards of it")


def value_and_grad(loss: BaseLoss, student: Tensor, teacher: Merged, labels, out: Tensor | None, accumulate: bool,
                   **given) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(value, gradient of student), the gradient in `out` if there is one."""
    call.check_logits("student_logits", student)
    check_out(loss, out, accumulate, student, None)
    with torch.enable_grad():
        leaf = student.detach().requires_grad_()
        value = run(loss, leaf, teacher, labels, **given)
        (gradient,) = torch.autograd.grad(value, leaf)
    if out is None:
        return value.detach(), gradient
    return value.detach(), handed_over(gradient.to_dense() if gradient.is_sparse else gradient, out, accumulate)


def evaluate(loss: BaseLoss, student: Tensor, teacher: Merged, labels=None, *, row_weight=None, num_items=None,
             temperature=None, vocab_size=None, vocab_mask=None, seen=None) -> Tensor:  # fmt: skip
    """The loss of student (..., V) and a teacher of outcomes: of both rows of outcomes, and of the student's own
    logits what is added to it, the cross-entropy. seen: outcomes of other losses of the same call, by temperatures."""
    vocab = teacher.vocab(vocab_size, student)
    labels, mask, weight = call.check_rows(loss, student, vocab, labels, row_weight, temperature, vocab_mask)
    own = loss.temperature if temperature is None else temperature
    other = loss.teacher_temperature or own
    teacher.check(student, vocab)
    teacher.check_temperature(other)
    if why := refusal(loss, teacher.tail):
        raise ValueError(why)
    _check_labels(loss, teacher, labels, vocab)
    rows = call.Rows(student, None, labels, mask, weight, vocab)
    if teacher.tail == "spread":
        return _spread(loss, teacher, rows, num_items, own, other)
    wide = wide_of(student)
    parts = [Part(teacher.classes(), inverse_of(own, student) if teacher.tail == "bucket" else None)]
    apart = bool(loss.ce_weight and not loss.label_smoothing)
    if apart:
        assert labels is not None  # check_rows has asked for them
        kept = (labels >= 0) & (labels < vocab) & (labels != loss.ignore_index)
        parts.append(Part(torch.where(kept, labels, -1)[:, None], inverse_of(1.0, student)))
        first = torch.where(labels == loss.ignore_index, labels, torch.where(kept, 0, 2))
    seen = {} if seen is None else seen
    key = id(own) if isinstance(own, Tensor) else own, loss.teacher_temperature, apart
    if key not in seen:
        s, *more = Outcomes.apply(student, vocab, mask, wide, teacher.sparse_gradient, *parts)
        t = teacher.outcomes(inverse_of(other, student), wide)
        if mask is not None:
            k = parts[0].classes.shape[1]
            t = torch.cat((t[:, :k].masked_fill(gone(parts[0].classes, mask), -math.inf), t[:, k:]), -1)
        seen[key] = s, more, t
    s, more, t = seen[key]
    term, entropy = split(loss)
    at = _positions(loss, teacher, labels, t.shape[1])
    value = _value(term, s, t, at, rows, num_items, temperature)
    if apart:
        value = value + _value(entropy, more[0], None, first, rows, num_items, None)
    elif loss.ce_weight:
        value = value + entropy._evaluate(rows, student, num_items, None)
    return value.to(call.result_dtype(student))


def _value(loss: BaseLoss, s: Tensor, t: Tensor | None, labels, rows: call.Rows, num_items, temperature) -> Tensor:
    lead = rows.student.shape[:-1]
    s = s.view(*lead, s.shape[1])
    t = t if t is None else t.view(s.shape)
    return loss._evaluate(call.Rows(s, t, labels, None, rows.weight, s.shape[-1]), s, num_items, temperature)


def prepare(loss: Any) -> None:
    """Makes what `split` keeps, once for all chunks of a call."""
    for term in getattr(loss, "terms", (loss,)):
        split(term)


def split(loss: BaseLoss) -> tuple[BaseLoss, BaseLoss]:
    """The distillation term and the cross-entropy of a loss, as two losses; kept until an option of it changes."""
    from .logpartition import ForwardKLLoss

    if "_split" not in vars(loss):
        term, extra = copy.copy(loss), ("ce_weight", "label_smoothing", "z_loss")
        vars(term).update(dict.fromkeys(extra, 0.0))
        term._prepare()
        shared = {name: getattr(loss, name) for name in (*extra, "reduction", "ignore_index")}
        vars(loss)["_split"] = term, ForwardKLLoss(kd_weight=0.0, **shared)
    return vars(loss)["_split"]


def refusal(loss: BaseLoss, tail: str = "bucket") -> str:
    """Why the loss does not take a teacher with this tail; "" if it does.

    A point weighs the classes by q_i^b p_i^a. With b + a = 1 the sum over several classes in which q and p are
    proportional is that of the one class they make; so are the f-divergences, which are made of such sums, and it is
    smallest where q = p, whatever the tail hides. Sums of other powers are neither.
    """
    name = type(loss).__name__
    if not loss.rowwise:
        return f"{name} compares a class in all rows, and the classes of this teacher differ: it needs teacher_logits"
    if loss.numbered:
        return f"{name} has a group for each class by its number, and this teacher's outcomes have others"
    if tail == "renormalise":
        return ""
    if not loss.merges:
        why = "compares classes one by one, and the tail of this teacher is many"
    elif loss.standardize:
        why = "z-scores its rows, and the tail of this teacher is many classes"
    elif tail == "bucket" and any(p.raw or not _is_one(p.student + p.teacher) for p in _points(loss)):
        why = "sums powers of the probabilities that a bucket does not know: take tail='spread'"
    else:
        return ""
    return f"{name} {why}; or leave the tail out, tail='renormalise'"


def _points(loss: Any) -> tuple:
    return loss.points() if hasattr(loss, "points") else ()


def _is_one(power) -> bool:
    close = abs(power - 1) < 1e-12
    return bool(close.all()) if isinstance(close, Tensor) else close


def _check_labels(loss: BaseLoss, teacher: Merged, labels: Tensor | None, vocab: int) -> None:
    if teacher.sparse_gradient and loss.ce_weight:
        raise ValueError("sparse_gradient needs ce_weight=0: the gradient of a cross-entropy is dense")
    if labels is None or not loss._uses.labels or not readable(labels):
        return
    call.check_labels(labels, vocab, loss.ignore_index)
    if loss.needs_labels and teacher.tail == "renormalise":
        bad = (labels != loss.ignore_index) & (teacher.place(labels) >= teacher.classes().shape[1])
        if bad.any():
            row = int(bad.nonzero()[0, 0])
            raise ValueError(f"{type(loss).__name__} needs the label's class among those of a teacher without a tail; "
                             f"{labels[row].item()} at row {row} is none of them")  # fmt: skip


def _positions(loss: BaseLoss, teacher: Merged, labels: Tensor | None, width: int) -> Tensor | None:
    """Labels of the outcomes. A label in the bucket is the bucket."""
    if labels is None:
        return None
    at = teacher.place(labels) if loss.needs_labels else torch.zeros_like(labels)
    return torch.where(labels == loss.ignore_index, labels, at)


def _spread(loss: BaseLoss, teacher: Any, rows: call.Rows, num_items, own, other) -> Tensor:
    from .parts import reducing

    student, per_row = rows.student, loss.reduction == "none"
    count = student.shape[:-1].numel()
    factor = call.factor(*call.weighting(loss, rows, num_items), rows.labels, loss.ignore_index, student)
    backend = backends.pick(student).__name__.rpartition(".")[-1]
    part = reducing(loss, "none" if per_row else "sum")
    own = own.reshape(-1).expand(count) if isinstance(own, Tensor) else own
    state = _Chunks(part, teacher.reshape(count), rows, factor.expand(count), own, inverse_of(other, student), backend)
    value = _Spread.apply(student, state, torch.is_grad_enabled())
    return value.view(student.shape[:-1]) if per_row else value


class _Chunks(NamedTuple):
    """What is needed to make the rows of a spread teacher, a chunk at a time."""

    loss: BaseLoss
    teacher: Any
    rows: call.Rows
    factor: Tensor  # (N,) what a row's loss is multiplied with
    own: Any  # temperature of the student, a number or (N,)
    other: Tensor  # 1 / T of the teacher
    backend: str

    def call(self, at: slice, s: Tensor, factor: Tensor) -> tuple[BaseLoss, tuple, dict]:
        """The loss of the rows `at`, and what it is called with beside s (n, vocab)."""
        from .parts import part_of

        one, x = part_of(self.loss, at, len(factor)), self.rows
        labels = None if x.labels is None else x.labels[at]
        T = self.own[at] if isinstance(self.own, Tensor) else self.own
        return one, (self.dense(at, s), labels), dict(row_weight=factor[at], vocab_mask=x.mask, temperature=T)

    @torch.no_grad()
    def dense(self, at: slice, s: Tensor) -> Tensor:
        """The teacher's logits (n, vocab): a constant."""
        wide, vocab, mask = wide_of(s), self.rows.vocab, self.rows.mask
        part = Part(self.teacher.classes(), self.other).rows(at, wide)
        bucket = Outcomes.apply(s, vocab, mask, wide, False, part)[0][:, -1:]
        t, full = self.teacher[at].outcomes(self.other, wide), full_copy(s, vocab, mask, wide)
        full.add_(t[:, -1:] - torch.where(bucket == -math.inf, 0.0, bucket))
        return full.scatter_(1, or_last(part.classes, vocab), t[:, :-1])[:, :vocab]


class _Spread(torch.autograd.Function):
    """The loss of student (..., W), and of each row with reduction "none". The gradient is made in the forward, except
    for a loss of each row and in float16, where it has to know the incoming one."""

    @staticmethod
    def forward(ctx, student, chunks, enabled):
        ctx.chunks, ctx.ready, loss = chunks, None, chunks.loss
        ctx.save_for_backward(student)
        now = enabled and ctx.needs_input_grad[0] and loss.reduction != "none" and student.dtype != torch.float16
        out = ctx.ready = student.new_zeros(student.shape) if now else None
        values = []
        for at, s in blocks(student):
            one, given, options = chunks.call(at, s[:, : chunks.rows.vocab], chunks.factor)
            if out is None:
                values.append(one(s[:, : chunks.rows.vocab], *given, **options))
                continue
            value, gradient = one.value_and_grad(s[:, : chunks.rows.vocab], *given, **options)
            out.view(-1, student.shape[-1])[at, : chunks.rows.vocab] = gradient
            values.append(value)
        if loss.reduction == "none":
            return torch.cat(values)
        return torch.stack(values).sum(dtype=torch.float64).to(values[0].dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        ready, ctx.ready = ctx.ready, None  # it is the caller's from here on, who may write to it
        if ready is not None:
            scaled = rescale(ready, grad) if grad.is_cpu else ready.mul_(grad)  # nothing waits for a GPU
            if scaled is not None:
                return scaled, None, None
        (student,), chunks = ctx.saved_tensors, ctx.chunks
        out, factor = student.new_zeros(student.shape), chunks.factor * grad.to(torch.float64)
        for at, s in blocks(student):
            with torch.enable_grad(), backends.use_backend(chunks.backend):
                leaf = s[:, : chunks.rows.vocab].detach().requires_grad_()
                one, given, options = chunks.call(at, leaf, factor)
                gradient = torch.autograd.grad(one(leaf, *given, **options).sum(), leaf)[0]
            out.view(-1, student.shape[-1])[at, : chunks.rows.vocab] = gradient
        return out, None, None
