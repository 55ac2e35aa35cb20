"""Rows of which some classes stay apart and the others are one outcome: what a teacher that knows only some classes of
the student's is compared on.

k classes of a row of logits x at temperature T make k + 1 outcomes: the k logits and the bucket
b = T log sum_{others j} exp(x_j / T). Their softmax at T has the probabilities of the k classes and the mass of the
others, which is summed without them: no difference of large numbers. Any loss takes such rows as it takes others, and
its gradient goes back by db / dx_j = exp((x_j - b) / T): one read of the logits on the way there, one on the way back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, call

TAILS = ("bucket", "renormalise", "spread")


class Part(NamedTuple):
    """Outcomes of each row: the classes (1 or N, k) int64, -1 for none, and the bucket of all others.

    inverse: 1 / T (1 or N, 1) of the bucket; None: no bucket.
    """

    classes: Tensor
    inverse: Tensor | None

    def rows(self, at: slice, wide: torch.dtype) -> Part:
        """Of the rows `at`."""
        index = self.classes if len(self.classes) == 1 else self.classes[at]
        inverse = self.inverse
        if inverse is not None:
            inverse = (inverse if len(inverse) == 1 else inverse[at]).to(wide)
        return Part(index.expand(at.stop - at.start, -1), inverse)


def blocks(*logits: Tensor, memory: int | None = None) -> Iterator[tuple]:
    """(which rows, these rows (n, W) of each) of logits (..., W), widths of their own, a few at a time and in order."""
    dense = [call.dense(x) for x in logits]
    if all(x.dim() == 3 and (1 in x.shape[:2] or x.stride(0) == x.shape[1] * x.stride(1)) for x in dense):
        dense = [x.flatten(0, 1) for x in dense]
    memory = memory or (1 << 20 if dense[0].is_cpu else 1 << 25)  # classes at a time
    step, first = max(1, memory // max(x.shape[-1] for x in dense)), 0
    for page in zip(*dense, strict=True) if dense[0].dim() == 3 else (dense,):
        for parts in zip(*(x.split(step) for x in page), strict=True):
            yield slice(first, first + len(parts[0])), *parts
            first += len(parts[0])


class Outcomes(torch.autograd.Function):
    """logits (..., W) -> (N, k) or (N, k + 1) outcomes of each part, in the dtype `wide`; -inf: there is no class."""

    @staticmethod
    def forward(ctx, logits, vocab, mask, wide, sparse, *parts):
        ctx.vocab, ctx.mask, ctx.parts, ctx.sparse = vocab, mask, parts, sparse
        ctx.kernel = _kernel(logits, vocab, parts)
        if ctx.kernel:
            *out, stats = ctx.kernel[0](call.dense(logits), mask, *_arguments(parts), vocab)
            ctx.save_for_backward(logits, stats)
            return tuple(x.to(wide) for x in out[: len(parts)])
        rows = logits.shape[:-1].numel()
        out = [logits.new_empty((rows, p.classes.shape[1] + (p.inverse is not None)), dtype=wide) for p in parts]
        for at, x in blocks(logits):
            full = full_copy(x, vocab, mask, wide) if any(p.inverse is not None for p in parts) else x
            for part, to in zip(parts, out, strict=True):
                index, inverse = part.rows(at, wide)
                count = index.shape[1]
                to[at, :count] = x.gather(1, index.clamp(min=0)).masked_fill(gone(index, mask), -math.inf)
                if inverse is not None:
                    rest = full.scatter(1, or_last(index, vocab), -math.inf).mul_(inverse)
                    to[at, count] = rest.logsumexp(-1) / inverse[:, 0]
        ctx.save_for_backward(logits, *(o[:, -1:] for o in out))
        return tuple(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        logits, *buckets = ctx.saved_tensors
        if ctx.sparse:
            return _sparse(logits, ctx.parts[0].classes, grads[0]), *(None,) * (4 + len(ctx.parts))
        if ctx.kernel:
            by, by_entropy = (*(g.to(torch.float64).contiguous() for g in grads), None)[:2]
            given = (call.dense(logits), ctx.mask, *_arguments(ctx.parts), *buckets, ctx.vocab)
            return ctx.kernel[1](by, by_entropy, *given).view(logits.shape), *(None,) * (4 + len(ctx.parts))
        if all(part.inverse is None for part in ctx.parts):
            return _scattered(logits, ctx.parts[0].classes, grads[0]), *(None,) * (4 + len(ctx.parts))
        out, vocab = logits.new_empty(logits.shape), ctx.vocab
        flat = out.view(-1, logits.shape[-1])
        for at, x in blocks(logits):
            total = grads[0].new_zeros(len(x), vocab + 1)
            for part, b, g in zip(ctx.parts, buckets, grads, strict=True):
                index, inverse = part.rows(at, g.dtype)
                index = or_last(index, vocab)
                if inverse is not None:
                    b, by_bucket = b[at], g[at, -1:]
                    rest = full_copy(x, vocab, ctx.mask, g.dtype).scatter_(1, index, -math.inf)
                    rest.sub_(torch.where(b == -math.inf, 0.0, b)).mul_(inverse).exp_().mul_(by_bucket)
                    total.add_(torch.where(by_bucket == 0, 0.0, rest))  # whatever a row holds that does not count
                total.scatter_(1, index, total.gather(1, index) + g[at, : index.shape[1]])
            flat[at, :vocab] = total[:, :vocab]
        flat[:, vocab:] = 0
        return out, *(None,) * (4 + len(ctx.parts))


def _kernel(logits: Tensor, vocab: int, parts: tuple[Part, ...]):
    """The operators (see csrc/cpu/buckets.cpp) that do the same, where they are made for it; else None.

        bucket(student, mask?, classes (N, k), inverse (1 or N,)?, labels (N,)?, vocab)
            -> outcomes (N, k + 1), outcomes of label and rest (N, 2), what bucket_spread wants to know (N, 3)
        bucket_spread(gradient of the first, of the second?, student, ..., the third, vocab) -> gradient of student
    """
    first = parts[0]
    few = len(first.classes) == logits.shape[:-1].numel() and 2 * first.classes.shape[1] <= vocab
    return backends.kernels("BUCKET", logits) if few else None


def _arguments(parts: tuple[Part, ...]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    first, *second = parts
    labels = second[0].classes[:, 0].contiguous() if second else None
    return first.classes.contiguous(), None if first.inverse is None else first.inverse[:, 0].double(), labels


def full_copy(x: Tensor, vocab: int, mask: Tensor | None, wide: torch.dtype) -> Tensor:
    """A copy (n, vocab + 1) of x; the last class is no class, for indices of none."""
    full = x.new_empty((len(x), vocab + 1), dtype=wide)
    full[:, :vocab] = x[:, :vocab]
    full[:, vocab] = -math.inf
    if mask is not None:
        full[:, :vocab].masked_fill_(~mask, -math.inf)
    return full


def or_last(index: Tensor, vocab: int) -> Tensor:
    return torch.where(index < 0, vocab, index)


def gone(index: Tensor, mask: Tensor | None) -> Tensor:
    return index < 0 if mask is None else (index < 0) | ~mask[index.clamp(min=0)]


def _scattered(logits: Tensor, index: Tensor, grad: Tensor) -> Tensor:
    """The gradient where nothing but the classes has one."""
    width = logits.shape[-1]
    row = torch.arange(len(grad), device=grad.device)[:, None] * width
    value = grad.masked_fill(index < 0, 0.0).to(logits.dtype)
    flat = logits.new_zeros(logits.numel())  # of one dimension: deterministic on a GPU as well
    return flat.scatter_add_(0, (row + index.clamp(min=0)).view(-1), value.view(-1)).view(logits.shape)


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

    def check(self, student: Tensor | call.Shaped, vocab: int) -> None:
        """Raises if it does not fit the student's logits."""
        raise NotImplementedError

    def check_temperature(self, temperature: Any) -> None:
        """Raises if its tail is not that of the teacher's temperature in the loss."""

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


def wide_of(student: Tensor) -> torch.dtype:
    """The dtype of its outcomes."""
    double = student.dtype == torch.float64 or backends.pick(student).__name__.endswith(".reference")
    return torch.float64 if double else torch.float32


def inverse_of(temperature, like: Tensor) -> Tensor:
    """1 / T, (1 or N, 1) float64 on the device of `like`."""
    if not isinstance(temperature, Tensor):
        return torch.full((1, 1), 1 / float(temperature), dtype=torch.float64, device=like.device)
    return 1 / temperature.reshape(-1, 1).to(like.device, torch.float64)
