"""Teachers known by their most likely classes only: offline distillation from stored top-k logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .buckets import TAILS, Merged, Outcomes, Part, blocks, inverse_of
from .call import Shaped, check_logits, check_vocab
from .options import check_bool, check_choice, check_count, check_integers, check_number, readable


class SparseTeacher(Merged):
    """k classes of every row of a teacher, in the place of teacher_logits in a call of a loss.

        teacher = kdkernels.SparseTeacher.from_logits(teacher_logits, k=64, temperature=2.0)   # once, to be stored
        loss = kdkernels.ForwardKLLoss(temperature=2.0)
        loss(student_logits, teacher, labels)

    With tail="bucket" student and teacher are compared on k + 1 outcomes: the k classes, and all others as one. That is
    the exact loss of the merged distributions. For an f-divergence (KL, reverse KL, Jensen-Shannon, total variation,
    Hellinger, Renyi) it is a lower bound of the loss of the whole ones, as tight as student and teacher are
    proportional on the tail, and smallest where they agree. Losses of other powers of the probabilities (TTM, WTTM,
    alpha-beta but for alpha + beta = 1) need sums over the tail that a bucket does not know, and raise; TTM is
    `ForwardKLLoss(teacher_temperature=1 / gamma)`, of a teacher recorded at 1 / gamma. Losses that look at single
    classes (ranks, correlations, z-scores) raise. A temperature acts on the classes first, then they are merged.

    With tail="spread" the teacher's tail is the student's, in proportion to its probabilities at the teacher's
    temperature, as a constant: a guess, exact where the two agree. The loss is then that of two whole rows, of any
    power. For f-divergences at one temperature its value and gradient are those of the bucket. It makes the teacher's
    whole rows, a few at a time.

    With tail="renormalise" both distributions are those given that the outcome is one of the k classes; every row-wise
    loss takes it.

    The cross-entropy is that of the student's whole rows, its labels any class; with label smoothing it reads them once
    more, and its gradient is added in their dtype. A sum of losses is that of its terms apart. To a loss that needs the
    label's class (DKD) the bucket is that where it holds it; `from_logits(labels=)` keeps labels out of the bucket.

    The teacher is a constant. The student's logits are read once in the forward and once in the backward, beside the
    gradient nothing is as large as they are. Double backward raises; under torch.compile a call is a graph break.

    Args:
        indices: (..., k) integers, the classes of each row, in any order; -1 where a row has fewer than k.
        log_probs: (..., k) log-probabilities of those classes at `temperature`.
        log_tail: (...) log of the mass of all other classes at `temperature`; not of those that vocab_size or
            vocab_mask drop in the call.
        logits: (..., k) in place of log_probs: logits, to be divided by `temperature`; log_tail is then
            log sum_others exp(logit / temperature).  Both are free up to a constant for each row.
        temperature: at which log_probs and log_tail were taken. Without log_tail the loss may have any.
        tail: see above; None: "bucket" with a log_tail, else "renormalise".
        sparse_gradient: the gradient is a sparse tensor (COO); for tail="renormalise", without a cross-entropy.

    Raises:
        TypeError, ValueError: an argument is not of the dtype, shape or range it should be; a class is there twice.
            In a call: a class is outside the vocabulary; log_tail was taken at another temperature than the teacher's
            in the loss (a comparison of numbers on a GPU, where tensors are not looked at); a tensor requires grad.
    """

    def __init__(self, indices: Tensor, log_probs: Tensor | None = None, log_tail: Tensor | None = None, *,
                 logits: Tensor | None = None, temperature: float = 1.0, tail: str | None = None,
                 sparse_gradient: bool = False) -> None:  # fmt: skip
        self.indices = _indices(indices)
        if (log_probs is None) == (logits is None):
            raise TypeError("SparseTeacher needs log_probs or logits, one of them")
        name, values = ("log_probs", log_probs) if logits is None else ("logits", logits)
        self.temperature = float(check_number("temperature", temperature, above=0))
        self.values = _values(name, values, indices.shape, indices.device)
        self.log_tail = None if log_tail is None else _values("log_tail", log_tail, indices.shape[:-1], indices.device)
        self.scale = self.temperature if logits is None else 1.0  # values * scale are logits
        self.tail = tail or ("renormalise" if log_tail is None else "bucket")
        self.sparse_gradient = sparse_gradient
        check_choice("tail", self.tail, TAILS)
        if self.tail != "renormalise" and log_tail is None:
            raise ValueError(f"tail={tail!r} needs log_tail")
        check_bool("sparse_gradient", sparse_gradient)
        if sparse_gradient and self.tail != "renormalise":
            raise ValueError(f"sparse_gradient needs tail='renormalise': with {self.tail!r} every class has a gradient")

    @classmethod
    @torch.no_grad()
    def from_logits(cls, logits: Tensor, k: int, temperature: float = 1.0, *, labels: Tensor | None = None,
                    vocab_size: int | None = None, vocab_mask: Tensor | None = None,
                    **options: Any) -> SparseTeacher:  # fmt: skip
        """The k largest of logits (..., V), as log-probabilities at the temperature, and the rest of the mass.

        With k = V nothing is left, and the loss is that of the logits.

        Args:
            labels: (...) classes that are to be among the k, in place of the k-th; others than classes are passed over.
            vocab_size, vocab_mask: classes that are padding, as in the call of a loss.
            options: tail, sparse_gradient.
        """
        check_logits("logits", logits)
        vocab = check_vocab(vocab_size, logits)
        check_count("k", k, most=vocab)
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        if k == vocab:
            indices = torch.arange(k, device=logits.device).expand(*logits.shape[:-1], k)
            values = logits[..., :vocab].to(wide)
            values = values if vocab_mask is None else values.masked_fill(~vocab_mask[:vocab], -torch.inf)
            return cls(indices, logits=values, temperature=temperature, **options)
        indices = torch.cat([_largest(x[:, :vocab], k, vocab_mask) for _, x in blocks(logits)])
        if labels is not None:
            indices = _with_labels(indices, labels.reshape(-1).to(indices.device), vocab)
        inverse = inverse_of(temperature, logits)
        outcomes = Outcomes.apply(logits, vocab, vocab_mask, wide, False, Part(indices, inverse))[0]
        values = (outcomes * inverse).log_softmax(-1).to(wide).view(*logits.shape[:-1], k + 1)
        return cls(indices.view(*logits.shape[:-1], k), values[..., :k], values[..., k], temperature=temperature,
                   **options)  # fmt: skip

    @property
    def shape(self) -> torch.Size:
        """(..., k)."""
        return self.indices.shape

    def __len__(self) -> int:
        return len(self.indices)

    def __repr__(self) -> str:
        return (f"SparseTeacher({tuple(self.shape)}, temperature={self.temperature:g}, tail={self.tail!r}, "
                f"{self.values.dtype}, {self.indices.device})")  # fmt: skip

    def __getitem__(self, at: Any) -> SparseTeacher:
        """Of some of the rows: `at` indexes the leading dimensions."""
        tail = None if self.log_tail is None else self.log_tail[at]
        return self._with(self.indices[at], self.values[at], tail)

    def reshape(self, *lead: int) -> SparseTeacher:
        """With rows of another shape."""
        k = self.shape[-1]
        tail = None if self.log_tail is None else self.log_tail.reshape(*lead)
        return self._with(self.indices.reshape(*lead, k), self.values.reshape(*lead, k), tail)

    def to(self, *args: Any, **kwargs: Any) -> SparseTeacher:
        """On another device, or with values of another dtype, as `torch.Tensor.to`."""
        tail = None if self.log_tail is None else self.log_tail.to(*args, **kwargs)
        values = self.values.to(*args, **kwargs)
        return self._with(self.indices.to(values.device), values, tail)

    def _with(self, indices: Tensor, values: Tensor, log_tail: Tensor | None) -> SparseTeacher:
        """Of the same kind, its tensors taken as they are."""
        other = object.__new__(SparseTeacher)
        vars(other).update(vars(self), indices=indices, values=values, log_tail=log_tail)
        return other

    def check(self, student: Tensor | Shaped, vocab: int) -> None:
        if self.shape[:-1] != student.shape[:-1]:
            raise ValueError(f"a SparseTeacher must have the rows of student_logits {tuple(student.shape)}, got "
                             f"indices of shape {tuple(self.shape)}")  # fmt: skip
        if self.indices.device != student.device:
            raise ValueError(f"a SparseTeacher must be on student_logits' device {student.device}, got "
                             f"{self.indices.device}")  # fmt: skip
        if readable(self.indices) and self.indices.numel() and int(self.indices.max()) >= vocab:
            raise ValueError(f"indices of a SparseTeacher must be in [0, {vocab}), the student's classes, or -1, got "
                             f"{int(self.indices.max())}")  # fmt: skip
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (self.values, self.log_tail)):
            raise ValueError("a SparseTeacher requires grad, but no gradient flows to it; detach its tensors")

    def check_temperature(self, temperature: Any) -> None:
        if self.tail == "renormalise" or (isinstance(temperature, Tensor) and not readable(temperature)):
            return
        numbers = temperature.detach() if isinstance(temperature, Tensor) else torch.tensor([temperature])
        differs = (numbers.double() / self.temperature - 1).abs() > 1e-6
        if differs.any():
            raise ValueError(f"log_tail of a SparseTeacher is the tail at temperature {self.temperature:g}, and the "
                             f"loss has a teacher at {numbers[differs][0].item():g}: only the tail of that temperature "
                             "tells its mass; record it there, or take tail='renormalise'")  # fmt: skip

    def classes(self) -> Tensor:
        return self.indices.reshape(-1, self.shape[-1])

    def log_outcomes(self, wide: torch.dtype = torch.float64) -> Tensor:
        """(N, k) log-probabilities, or (N, k + 1) with that of a tail, up to a constant for each row."""
        values = self.values.reshape(-1, self.shape[-1]).to(wide) * (self.scale / self.temperature)
        values = values.masked_fill(self.classes() < 0, -torch.inf)
        return values if self.log_tail is None else torch.cat((values, self.log_tail.reshape(-1, 1).to(wide)), -1)

    def outcomes(self, inverse: Tensor, wide: torch.dtype) -> Tensor:
        if self.scale == 1 and self.log_tail is None:  # as they were given
            return self.values.reshape(-1, self.shape[-1]).to(wide).masked_fill(self.classes() < 0, -torch.inf)
        outcomes = self.log_outcomes(wide) * self.temperature
        return outcomes[:, : self.shape[-1]] if self.tail == "renormalise" else outcomes

    def place(self, labels: Tensor) -> Tensor:
        found = self.classes() == labels[:, None]
        return torch.where(found.any(-1), found.to(torch.uint8).argmax(-1), self.shape[-1])


def _indices(x) -> Tensor:
    check_integers("indices", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"indices must have shape (..., k) with k >= 1, got {tuple(x.shape)}")
    x = x.to(torch.int64)
    if readable(x) and x.numel():
        if int(x.min()) < -1:
            raise ValueError(f"indices must be classes, or -1 for none, got {int(x.min())}")
        ordered = x.sort(-1).values
        twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
        if twice.any():
            one = int(ordered[..., 1:][twice][0])
            raise ValueError(f"indices must be different classes in each row, got {one} twice")
    return x


def _values(name: str, x, shape: torch.Size, device: torch.device) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)} like indices, got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} must be on the device of indices, {device}, got {x.device}")
    return x


def _largest(x: Tensor, k: int, mask: Tensor | None) -> Tensor:
    x = x if mask is None else x.masked_fill(~mask[: x.shape[1]], -torch.inf)
    return x.topk(k, -1).indices


def _with_labels(indices: Tensor, labels: Tensor, vocab: int) -> Tensor:
    missing = (labels >= 0) & (labels < vocab) & ~(indices == labels[:, None]).any(-1)
    last = torch.where(missing, labels, indices[:, -1])
    return torch.cat((indices[:, :-1], last[:, None]), -1)
