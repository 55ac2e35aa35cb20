"""What every loss is, whatever it computes: a module with checked options, one call, value and gradient."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import backends, call, merged, options, parallel
from .buckets import Merged
from .out import check_out, handed_over

if TYPE_CHECKING:
    from .observe import RowMetrics


class _PostInit(type):
    """Prepares a loss once its outermost __init__ is done, so that a subclass may set its options in any order."""

    def __call__(cls, *args, **kwargs):
        with options.explain_constructor(cls):
            loss = super().__call__(*args, **kwargs)
        options.check_new(loss)
        loss._prepare()
        return loss

    __signature__ = property(options.signature)


class BaseLoss(nn.Module, metaclass=_PostInit):
    """The call and the options of a loss. A family of losses (`Loss`, `RankLoss`) says how rows are evaluated."""

    needs_teacher = True
    needs_labels = False
    rowwise = True
    """Whether rows do not depend on each other, so that a chunk of them may be computed at a time."""
    merges = True
    """Whether several classes may be one outcome, as in a `SparseTeacher`: it compares distributions."""
    unsharded: str | None = "it looks at whole rows"
    """Why it cannot be computed on vocabulary shards, or None."""
    numbered = False
    """Whether it knows classes by their numbers."""
    any_width = False
    """Whether the teacher's rows may be of a width of their own, in a call without vocab_size and vocab_mask."""
    in_turn = False
    """Whether it is a sum whose terms are computed one after the other on vocabulary shards."""
    work = ""
    """What a step costs that its points or phi do not say; `kdkernels losses` prints it (w: the bytes of a logit)."""
    standardize = False
    teacher_temperature: float | None = None
    temperature: float
    t_squared: bool
    kd_weight: float
    ce_weight: float
    label_smoothing: float
    z_loss: float
    reduction: str
    ignore_index: int
    validate = False
    _uses: options.Uses
    __call__: Callable[..., Tensor]  # torch's own says Any

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        family = next(base for base in cls.__mro__ if BaseLoss in base.__bases__)
        if cls.__doc__ and family is not cls:
            shared = f"Shared options and the call: see `kdkernels.{family.__name__}`."
            cls.__doc__ = f"{inspect.cleandoc(cls.__doc__)}\n\n{shared}"

    def check(self) -> None:
        """Raises if an option is out of range; called whenever the loss is prepared: when made, and when one is set."""

    def on_shards(self) -> BaseLoss:
        """The same loss, as vocabulary shards compute it."""
        return self

    def minimizer(self, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
        """Student logits at which the distillation term is smallest. NotImplementedError if no formula gives them."""
        return teacher_logits

    def _prepare(self) -> None:
        options.check_options(self)
        self.check()
        vars(self)["_uses"] = options.uses(self)
        vars(self).pop("_split", None)

    def _draw(self) -> None:
        """Draws what a call draws at random, for the calls of this (a copy) that are to have the same."""

    def _pick(self, student: Tensor, teacher: Tensor | None):
        """The backend for these logits, and its operators; None for one that runs the definition."""
        backend = backends.pick(student, teacher)
        return backend, backend.OPERATORS

    def _evaluate(self, rows: call.Rows, student_logits: Tensor, num_items, temperature) -> Tensor:
        raise NotImplementedError

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | Merged | None = None,
        labels: Tensor | None = None,
        *,
        row_weight: Tensor | None = None,
        num_items: float | Tensor | None = None,
        temperature: float | Tensor | None = None,
        vocab_size: int | None = None,
        vocab_mask: Tensor | None = None,
        group: Any = None,
    ) -> Tensor:
        """The loss of student_logits (..., V).

        Args:
            student_logits: (..., V), float64, float32, float16 or bfloat16, any strides.
            teacher_logits: (..., V), logits or log-probabilities, a dtype of its own; or what stands in their place, a
                `SparseTeacher` or a `SharedVocab` of them. Losses that need none ignore it, and its gradient is 0.
            labels: (...) integers; rows at `ignore_index` are left out.
            row_weight: (...) factors of the rows.
            num_items: denominator of "mean", in place of the number of kept rows; 0 where there are none.
            temperature: in place of the constructor's, a number or one for each row (...).
            vocab_size: classes from here on are padding: probability 0 in both rows. The widths may then differ.
            vocab_mask: (V,) booleans, False where a class is padding.
            group: a torch.distributed process group, each rank of which calls this with its own columns of the same
                rows (see `kdkernels.parallel`). DTensors cut along the last dimension bring theirs.

        Returns:
            A scalar, or (...) with reduction "none"; float64 for float64 logits, else float32.

        Raises:
            TypeError, ValueError: an argument is missing, or not of the dtype, device, shape or range it should be.
        """
        given = (student_logits, teacher_logits, labels, row_weight, temperature, vocab_size, vocab_mask)
        if isinstance(teacher_logits, Merged):
            merged.check_whole(student_logits, teacher_logits, group)
            return merged.run(self, student_logits, teacher_logits, labels, row_weight=row_weight, num_items=num_items,
                               temperature=temperature, vocab_size=vocab_size, vocab_mask=vocab_mask)  # fmt: skip
        if group is not None or parallel.is_sharded(student_logits):
            value = parallel.forward(self, group, num_items, *given)
        else:
            value = self._evaluate(call.check(self, *given), student_logits, num_items, temperature)
        return value if self._uses.teacher else call.unused(value, teacher_logits)

    @torch.no_grad()
    def value_and_grad(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | Merged | None = None,
        labels: Tensor | None = None,
        *,
        out: Tensor | None = None,
        accumulate: bool = False,
        row_weight: Tensor | None = None,
        num_items: float | Tensor | None = None,
        temperature: float | Tensor | None = None,
        vocab_size: int | None = None,
        vocab_mask: Tensor | None = None,
        group: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """The reduced loss and its gradient by student_logits, in one pass and without a graph.

            logits = model(tokens)
            value, gradient = loss.value_and_grad(logits.detach(), teacher_logits, labels)
            logits.backward(gradient)

        Args:
            out: where the gradient goes: a tensor of student_logits' shape, dtype and device, student_logits itself
                included (its logits are then gone) but no part of it. Without it a new tensor.
            accumulate: add the gradient to what is in `out`, in place of writing it there.

        Raises:
            TypeError, ValueError: as in a call; `out` does not fit; the reduction is "none"; the loss standardises.
        """
        given = (student_logits, teacher_logits, labels, row_weight, temperature, vocab_size, vocab_mask)
        if isinstance(teacher_logits, Merged):
            merged.check_whole(student_logits, teacher_logits, group)
            return merged.value_and_grad(self, student_logits, teacher_logits, labels, out, accumulate,
                                          row_weight=row_weight, num_items=num_items, temperature=temperature,
                                          vocab_size=vocab_size, vocab_mask=vocab_mask)  # fmt: skip
        if group is not None or parallel.is_sharded(student_logits):
            return parallel.value_and_grad(self, group, num_items, out, accumulate, *given)
        rows = call.check(self, *given)
        check_out(self, out, accumulate, rows.student, rows.teacher)
        return self._value_and_grad(rows, student_logits.detach(), num_items, temperature, out, accumulate)

    def with_metrics(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | Merged | None = None,
        labels: Tensor | None = None,
        *,
        agreement: bool = True,
        **given: Any,
    ) -> tuple[Tensor, RowMetrics]:
        """What a call returns, and `RowMetrics` of its rows.

        Losses of the log-partition and separable ones make them of the statistics of the call, without another read;
        for the others the log-partitions are one more.

        Args:
            agreement: top-1 agreement and acceptance as well, for which the logits are read once more.
            given: the other keywords of a call. On vocabulary shards agreement costs one more all_gather.

        Raises:
            TypeError, ValueError: as in a call; the rows are not of the same classes, as with a `SparseTeacher`, a
                `SharedVocab`, or vocabularies of unrelated tokenizers.
        """
        from .observe import with_metrics

        return with_metrics(self, student_logits, teacher_logits, labels, agreement, given)

    def _value_and_grad(self, rows: call.Rows, student_logits: Tensor, num_items, temperature, out, accumulate):
        with torch.enable_grad():
            leaf = student_logits.requires_grad_()
            value = self._evaluate(rows._replace(student=leaf), leaf, num_items, temperature)
            (gradient,) = torch.autograd.grad(value, leaf)
        return value.detach(), handed_over(gradient, out, accumulate)

    def __mul__(self, weight: float) -> BaseLoss:
        return total((weight, self))

    __rmul__ = __mul__

    def __add__(self, other: BaseLoss) -> BaseLoss:
        return total((1, self), (1, other))

    def __radd__(self, other) -> BaseLoss:
        starts = isinstance(other, int) and other == 0  # as sum() does
        return self if starts else total((1, other), (1, self))

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_") and k not in _MODULE)

    def __setattr__(self, name: str, value) -> None:
        with options.all_or_nothing(vars(self)):  # a refused option leaves the loss as it was
            super().__setattr__(name, value)
            if "_uses" in vars(self) and not name.startswith("_") and name not in _MODULE:
                self._prepare()


_MODULE = {"training", "resolution"} | set(vars(nn.Module()))


def total(*terms) -> BaseLoss:
    """The sum of pairs (weight, loss)."""
    from .compose import SumLoss, fits
    from .together import MixedSumLoss

    return (SumLoss if fits(terms) else MixedSumLoss)(terms)
