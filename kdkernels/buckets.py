"""Rows of which some classes stay apart and the others are one outcome: what a teacher that knows only some classes of
the student's is compared on.

k classes of a row of logits x at temperature T make k + 1 outcomes: the k logits and the bucket
b = T log sum_{others j} exp(x_j / T). Their softmax at T has the probabilities of the k classes and the mass of the
others, which is summed without them: no difference of large numbers. Any loss takes such rows as it takes others, and
its gradient goes back by db / dx_j = exp((x_j - b) / T): one read of the logits on the way there, one on the way back.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import backends, call
from .options import readable

if TYPE_CHECKING:
    from .base import BaseLoss

TAILS = ("bucket", "renormalise", "spread")


class Part(NamedTuple):
    """Outcomes of each row: the classes index (1 or N, k) int64, -1 for none, and the bucket of all others.

    inverse: 1 / T (1 or N, 1) of the bucket; None: no bucket.
    """

    index: Tensor
    inverse: Tensor | None

    def rows(self, at: slice, wide: torch.dtype) -> Part:
        """Of the rows `at`."""
        index = self.index if len(self.index) == 1 else self.index[at]
        inverse = self.inverse
        if inverse is not None:
            inverse = (inverse if len(inverse) == 1 else inverse[at]).to(wide)
        return Part(index.expand(at.stop - at.start, -1), inverse)


def blocks(x: Tensor, memory: int | None = None) -> Iterator[tuple[slice, Tensor]]:
    """(which rows, these rows (n, W)) of x (..., W), a few at a time and in order."""
    x = call.dense(x)
    if x.dim() == 3 and (1 in x.shape[:2] or x.stride(0) == x.shape[1] * x.stride(1)):
        x = x.flatten(0, 1)
    memory = memory or (1 << 20 if x.is_cpu else 1 << 25)  # classes at a time
    step, first = max(1, memory // x.shape[-1]), 0
    for page in x if x.dim() == 3 else (x,):
        for part in page.split(step):
            yield slice(first, first + len(part)), part
            first += len(part)


class Outcomes(torch.autograd.Function):
    """logits (..., W) -> for each part (N, k) or (N, k + 1) outcomes in the dtype `wide`; -inf where a class is gone."""

    @staticmethod
    def forward(ctx, logits, vocab, mask, wide, sparse, *parts):
        ctx.vocab, ctx.mask, ctx.parts, ctx.sparse = vocab, mask, parts, sparse
        rows = logits.shape[:-1].numel()
        out = [logits.new_empty((rows, p.index.shape[1] + (p.inverse is not None)), dtype=wide) for p in parts]
        for at, x in blocks(logits):
            full = None if all(p.inverse is None for p in parts) else _full(x, vocab, mask, wide)
            for part, to in zip(parts, out, strict=True):
                index, inverse = part.rows(at, wide)
                count = index.shape[1]
                to[at, :count] = x.gather(1, index.clamp(min=0)).masked_fill(_gone(index, mask), -math.inf)
                if inverse is not None:
                    rest = full.scatter(1, _or_last(index, vocab), -math.inf).mul_(inverse)
                    to[at, count] = rest.logsumexp(-1) / inverse[:, 0]
        ctx.save_for_backward(logits, *(o[:, -1:] for o in out))
        return tuple(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        logits, *buckets = ctx.saved_tensors
        if ctx.sparse:
            return _sparse(logits, ctx.parts[0].index, grads[0]), *(None,) * (4 + len(ctx.parts))
        out, vocab = logits.new_empty(logits.shape), ctx.vocab
        flat = out.view(-1, logits.shape[-1])
        for at, x in blocks(logits):
            total = grads[0].new_zeros(len(x), vocab + 1)
            for part, b, g in zip(ctx.parts, buckets, grads, strict=True):
                index, inverse = part.rows(at, g.dtype)
                index = _or_last(index, vocab)
                if inverse is not None:
                    b, by_bucket = b[at], g[at, -1:]
                    rest = _full(x, vocab, ctx.mask, g.dtype).scatter_(1, index, -math.inf)
                    rest.sub_(torch.where(b == -math.inf, 0.0, b)).mul_(inverse).exp_().mul_(by_bucket)
                    total.add_(torch.where(by_bucket == 0, 0.0, rest))  # whatever a row holds that does not count
                total.scatter_(1, index, total.gather(1, index) + g[at, : index.shape[1]])
            flat[at, :vocab] = total[:, :vocab]
        flat[:, vocab:] = 0
        return out, *(None,) * (4 + len(ctx.parts))


def _full(x: Tensor, vocab: int, mask: Tensor | None, wide: torch.dtype) -> Tensor:
    """A copy (n, vocab + 1) of x; the last class is no class, for indices of none."""
    full = x.new_empty((len(x), vocab + 1), dtype=wide)
    full[:, :vocab] = x[:, :vocab]
    full[:, vocab] = -math.inf
    if mask is not None:
        full[:, :vocab].masked_fill_(~mask, -math.inf)
    return full


def _or_last(index: Tensor, vocab: int) -> Tensor:
    return torch.where(index < 0, vocab, index)


def _gone(index: Tensor, mask: Tensor | None) -> Tensor:
    return index < 0 if mask is None else (index < 0) | ~mask[index.clamp(min=0)]


def _sparse(logits: Tensor, index: Tensor, grad: Tensor) -> Tensor:
    """The gradient as a sparse tensor of logits' shape."""
    where, index = (index >= 0).expand_as(grad), index.expand_as(grad)
    row = torch.arange(len(grad), device=grad.device)[:, None].expand_as(grad)[where]
    at = torch.stack((*torch.unravel_index(row, logits.shape[:-1]), index[where]))
    return torch.sparse_coo_tensor(at, grad[where].to(logits.dtype), logits.shape, check_invariants=False)


class Merged:
    """Base class of what may stand in the teacher's place in a call: outcomes of which a class is one, or many.

    Attributes:
        tail: "bucket": the other classes are one outcome. "renormalise": they are left out of both distributions.
            "spread": the teacher's mass of the others lies on them in proportion to the student's probabilities.
        sparse_gradient: the student's gradient is a sparse tensor.
    """

    tail: str
    sparse_gradient = False

    def check(self, student: Tensor, vocab: int, temperature: Any) -> None:
        """Raises if it does not fit the student's logits, or the teacher's temperature."""
        raise NotImplementedError

    def vocab(self, vocab_size: int | None, student: Tensor) -> int:
        return call.check_vocab(vocab_size, student)

    def classes(self) -> Tensor:
        """(1 or N, k) int64: the student's classes, -1 for none."""
        raise NotImplementedError

    def outcomes(self, inverse: Tensor, wide: torch.dtype) -> Tensor:
        """(N, k) logits, or (N, k + 1) with the bucket, which the division by T of inverse = 1 / T (1 or N, 1) is to
        turn into log-probabilities but for a constant."""
        raise NotImplementedError

    def place(self, labels: Tensor) -> Tensor:
        """(N,): which of the k classes the label is, k if none."""
        raise NotImplementedError


def run(loss: BaseLoss, student: Tensor, teacher: Merged, labels=None, **given) -> Tensor:
    """The loss as called with such a teacher. A loss that knows no teacher is not given one."""
    if not loss._uses.teacher:
        return loss(student, None, labels, **given)
    function = torch.compiler.disable(evaluate) if torch.compiler.is_compiling() else evaluate
    return function(loss, student, teacher, labels, **given)


def value_and_grad(loss: BaseLoss, student: Tensor, teacher: Merged, labels, out: Tensor | None, **given):
    """(value, gradient of student), the gradient in `out` if there is one."""
    with torch.enable_grad():
        leaf = student.detach().requires_grad_()
        value = run(loss, leaf, teacher, labels, **given)
        (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient if out is None else out.copy_(gradient)


def evaluate(loss: BaseLoss, student: Tensor, teacher: Merged, labels=None, *, row_weight=None, num_items=None,
             temperature=None, vocab_size=None, vocab_mask=None) -> Tensor:  # fmt: skip
    """The loss of student (..., V) and a teacher of outcomes: of both rows of outcomes, and of the student's own
    logits what is added to it, the cross-entropy."""
    call.check_logits("student_logits", student)
    vocab = teacher.vocab(vocab_size, student)
    labels, mask, weight = call.check_rows(loss, student, vocab, labels, row_weight, temperature, vocab_mask)
    own = loss.temperature if temperature is None else temperature
    other = loss.teacher_temperature or own
    teacher.check(student, vocab, other)
    _check_loss(loss, teacher, own, other)
    _check_labels(loss, teacher, labels, vocab)
    rows = call.Rows(student, None, labels, mask, weight, vocab)
    if teacher.tail == "spread":
        return _spread(loss, teacher, rows, num_items, own, other)
    wide = torch.float64 if _double(student) else torch.float32
    parts = [Part(teacher.classes(), _inverse(own, student) if teacher.tail == "bucket" else None)]
    apart = bool(loss.ce_weight and not loss.label_smoothing)
    if apart:
        kept = (labels >= 0) & (labels < vocab) & (labels != loss.ignore_index)
        parts.append(Part(torch.where(kept, labels, -1)[:, None], _inverse(1.0, student)))
    s, *more = Outcomes.apply(student, vocab, mask, wide, teacher.sparse_gradient, *parts)
    t = teacher.outcomes(_inverse(other, student), wide)
    if mask is not None:
        k = parts[0].index.shape[1]
        t = torch.cat((t[:, :k].masked_fill(_gone(parts[0].index, mask), -math.inf), t[:, k:]), -1)
    term, entropy = split(loss)
    at = _positions(loss, teacher, labels, t.shape[1])
    value = _value(term, s, t, at, rows, num_items, temperature)
    if apart:
        first = torch.where(labels == loss.ignore_index, labels, torch.where(kept, 0, 2))
        value = value + _value(entropy, more[0], None, first, rows, num_items, None)
    elif loss.ce_weight:
        value = value + entropy._evaluate(rows, student, num_items, None)
    return value.to(call.result_dtype(student))


def _value(loss: BaseLoss, s: Tensor, t: Tensor | None, labels, rows: call.Rows, num_items, temperature) -> Tensor:
    lead = rows.student.shape[:-1]
    s, t = s.view(*lead, s.shape[1]), None if t is None else t.expand(len(s), -1).reshape(*lead, t.shape[1])
    return loss._evaluate(call.Rows(s, t, labels, None, rows.weight, s.shape[-1]), s, num_items, temperature)


def split(loss: BaseLoss) -> tuple[BaseLoss, BaseLoss]:
    """The distillation term and the cross-entropy of a loss, as two losses; kept until an option of it changes."""
    from .logpartition import ForwardKLLoss

    if "_split" not in vars(loss):
        term, extra = copy.copy(loss), ("ce_weight", "label_smoothing", "z_loss")
        term.__dict__.update(dict.fromkeys(extra, 0.0))
        term._prepare()
        shared = {name: getattr(loss, name) for name in (*extra, "reduction", "ignore_index")}
        loss.__dict__["_split"] = term, ForwardKLLoss(kd_weight=0.0, **shared)
    return vars(loss)["_split"]


def _double(student: Tensor) -> bool:
    return student.dtype == torch.float64 or backends.pick(student).__name__.endswith(".reference")


def _inverse(temperature, like: Tensor) -> Tensor:
    """1 / T, (1 or N, 1) float64 on the device of `like`."""
    if not isinstance(temperature, Tensor):
        return torch.full((1, 1), 1 / float(temperature), dtype=torch.float64, device=like.device)
    return 1 / temperature.reshape(-1, 1).to(like.device, torch.float64)


def _check_loss(loss: BaseLoss, teacher: Merged, own, other) -> None:
    name = type(loss).__name__
    if not loss.rowwise:
        raise ValueError(f"{name} compares a class in all rows, and the classes of a teacher of outcomes differ: "
                         "pass it teacher_logits of all classes")  # fmt: skip
    if teacher.tail == "renormalise":
        return
    why = "" if loss.merges else "compares classes one by one"
    why = why or ("z-scores its rows" if loss.standardize else "")
    plain = not isinstance(own, Tensor) and not isinstance(other, Tensor) and own == other == 1
    if not why and teacher.tail == "bucket" and not plain and any(p.raw for p in getattr(loss, "points", tuple)()):
        why = "looks at logits at temperature 1"
    if why:
        raise ValueError(f"{name} {why}, and the tail of this teacher is many classes; a teacher without a tail, "
                         "tail='renormalise', leaves them out")  # fmt: skip


def _check_labels(loss: BaseLoss, teacher: Merged, labels: Tensor | None, vocab: int) -> None:
    if teacher.sparse_gradient and loss.ce_weight:
        raise ValueError("sparse_gradient needs ce_weight=0: the gradient of a cross-entropy is dense")
    if labels is None or not loss._uses.labels or not readable(labels):
        return
    bad = (labels != loss.ignore_index) & ((labels < 0) | (labels >= vocab))
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        raise ValueError(f"labels must be in [0, {vocab}) or ignore_index={loss.ignore_index}, "
                         f"got {labels[row].item()} at row {row}")  # fmt: skip
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
    factor = call.factor(*call.weighting(loss, rows, num_items), rows.labels, loss.ignore_index, rows.student)
    count = rows.student.shape[:-1].numel()
    state = _Chunks(loss, teacher, rows._replace(student=None), factor.expand(count), own, other)  # type: ignore[arg-type]
    value = _Spread.apply(rows.student, state)
    return value.view(rows.student.shape[:-1]) if loss.reduction == "none" else value.sum(dtype=value.dtype)


class _Chunks(NamedTuple):
    """What is needed to make the rows of a spread teacher, a chunk at a time."""

    loss: BaseLoss
    teacher: Any
    rows: call.Rows
    factor: Tensor
    own: Any
    other: Any

    def value(self, at: slice, s: Tensor, factor: Tensor) -> Tensor:
        """(n,) losses of the rows `at`, s (n, W), times factor (N,)."""
        from .loss import Loss
        from .sweep import _part

        one, x = copy.copy(self.loss), self.rows
        if isinstance(one, Loss):
            one = _part(one, at, len(factor), "none")
        one.__dict__["reduction"] = "none"
        T = self.own.reshape(-1) if isinstance(self.own, Tensor) else self.own
        T = T[at] if isinstance(T, Tensor) and len(T) > 1 else T
        labels = None if x.labels is None else x.labels[at]
        return one(s, self.dense(at, s.detach()), labels, row_weight=factor[at], vocab_mask=x.mask,
                   temperature=T.expand(len(s)) if isinstance(T, Tensor) else T)  # fmt: skip

    def dense(self, at: slice, s: Tensor) -> Tensor:
        """The teacher's logits (n, vocab): a constant."""
        wide = torch.float64 if _double(s) else torch.float32
        own, other = _inverse(self.own, s), _inverse(self.other, s)
        part = Part(self.teacher.classes(), own).rows(at, wide)
        o = Outcomes.apply(s, self.rows.vocab, self.rows.mask, wide, False, part)[0]
        t = self.teacher[at].outcomes(other[at] if len(other) > 1 else other, wide)
        full, bucket = _full(s, self.rows.vocab, self.rows.mask, wide), o[:, -1:]
        moved = (full - bucket) * (part.inverse / (other[at] if len(other) > 1 else other)) + t[:, -1:]
        full = torch.where(full == -math.inf, full, moved.to(wide))
        return full.scatter_(1, _or_last(part.index, self.rows.vocab), t[:, :-1])[:, : self.rows.vocab]


class _Spread(torch.autograd.Function):
    """(N,) weighted losses of student (..., W); the backward makes the chunks again, knowing its gradient."""

    @staticmethod
    def forward(ctx, student, chunks):
        ctx.chunks = chunks
        ctx.save_for_backward(student)
        vocab, factor = chunks.rows.vocab, chunks.factor
        values = [chunks.value(at, s[:, :vocab], factor) for at, s in blocks(student)]
        return torch.cat(values) if values else student.new_zeros(0, dtype=call.result_dtype(student))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (student,), chunks = ctx.saved_tensors, ctx.chunks
        out, vocab = student.new_zeros(student.shape), chunks.rows.vocab
        factor = chunks.factor * grad.to(torch.float64)
        for at, s in blocks(student):
            with torch.enable_grad():
                leaf = s[:, :vocab].detach().requires_grad_()
                value = chunks.value(at, leaf, factor).sum()
                out.view(-1, student.shape[-1])[at, :vocab] = torch.autograd.grad(value, leaf)[0]
        return out, None
