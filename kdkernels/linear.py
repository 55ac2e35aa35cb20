"""Fused linear: a loss from hidden states and heads, whose logits exist only a chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import call, compiled, merged, parallel
from .base import BaseLoss
from .kept import Kept
from .linearcall import autocast, check_head, check_shared, check_teacher
from .options import check_number
from .parts import fixed
from .sparse import SparseTeacher
from .sweep import BLOCK_CPU, Inputs, LinearRows, Plan, cast_dtype
from .vocab import SharedVocab

BUDGET_CPU, BUDGET = 256 << 20, 1 << 30


class LinearLoss(nn.Module):
    """`loss` of the logits student_hidden @ student_head.T and teacher_hidden @ teacher_head.T, neither ever whole.

        loss = kdkernels.LinearLoss(kdkernels.ForwardKLLoss(temperature=2.0))
        loss(hidden, lm_head.weight, teacher_hidden, teacher_lm_head.weight.detach(), labels).backward()

    One sweep over chunks of rows makes a chunk's logits, softcap * tanh(scale * (hidden @ head.T + bias) / softcap),
    the value, and the gradients of hidden, head and bias. Beside the gradients that takes the memory of a chunk,
    whatever the number of rows. With reduction "none", in float16, and for a second backward, which all need to know
    the incoming gradient first, the sweep is made again in the backward.

    The gradients of head and bias are summed over the chunks in float32 (float64 in float64) and rounded once, after
    the incoming gradient has multiplied them. Under torch.compile a call is one operator of the graph; a graph break
    with reduction "none", in float16, with a `SparseTeacher`, with `shared_vocab` and with `group`. Double backward
    raises.

    Args:
        loss: any loss of the library, or of one's own, whose rows do not depend on each other; its options may change.
        chunk: rows of logits at a time, or "auto": as many as the budget holds, all of them if they fit.
        memory_budget: bytes of logits at a time for chunk="auto": the student's, the teacher's, and their gradient
            where it does not take the student's place (not the float64 copies of the reference backend). An eighth of
            it may go to a product waiting to be added up, or to a block of a dequantised head. None: 256 MiB on a CPU,
            1 GiB elsewhere. On a CPU the module keeps a chunk's memory for the next call, and, once they are free, that
            of the head's gradient and of its float32 sum over chunks, if each is no more than the budget.
        student_logit_scale, teacher_logit_scale: factor of the logits, in front of the cap.
        student_softcap, teacher_softcap: c > 0 of a soft-cap c * tanh(x / c), or None.

    Raises:
        TypeError, ValueError: an option is not of its kind or out of its range; the loss is not row-wise.
    """
    __call__: Callable[..., Tensor]  # torch's own says Any

    def __init__(
        self,
        loss: BaseLoss,
        chunk: int | str = "auto",
        *,
        memory_budget: int | None = None,
        student_logit_scale: float = 1.0,
        teacher_logit_scale: float = 1.0,
        student_softcap: float | None = None,
        teacher_softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.loss, self.chunk, self.memory_budget = loss, chunk, memory_budget
        self.student_logit_scale, self.teacher_logit_scale = student_logit_scale, teacher_logit_scale
        self.student_softcap, self.teacher_softcap = student_softcap, teacher_softcap
        self._kept = Kept()
        self._name = compiled.named(self)
        self._check_options()

    def extra_repr(self) -> str:
        names = "chunk memory_budget student_logit_scale teacher_logit_scale student_softcap teacher_softcap".split()
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def forward(
        self,
        student_hidden: Tensor,
        student_head: Tensor,
        teacher_hidden: Tensor | None = None,
        teacher_head: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        teacher_head_scale: Tensor | None = None,
        teacher_logits: Tensor | SparseTeacher | None = None,
        row_weight: Tensor | None = None,
        num_items: float | Tensor | None = None,
        temperature: float | Tensor | None = None,
        vocab_size: int | None = None,
        vocab_mask: Tensor | None = None,
        shared_vocab: SharedVocab | None = None,
        group: Any = None,
    ) -> Tensor:
        """The loss of student_hidden (..., H).

        Args:
            student_hidden: (..., H), float64, float32, float16 or bfloat16.
            student_head: (V, H), of student_hidden's dtype; under autocast both are cast, as by F.linear. Without
                requires_grad it costs no gradient.
            teacher_hidden, teacher_head: (..., H2) and (V, H2), constants. The student's own head may be given, and is
                a constant in this place. An int8 or float8 head is dequantised a block at a time.
            student_bias, teacher_bias: (V,).
            teacher_head_scale: of a quantised head, which stands for head * scale: a scalar, (V,), or (V, G): one for
                each G-th of a row's columns.
            teacher_logits: (..., V), a constant, in place of teacher_hidden and teacher_head; or a `SparseTeacher`.
            labels, row_weight, num_items, temperature, vocab_size, vocab_mask: as in a call of the loss. The mean is
                over the rows of all chunks. A head's rows from vocab_size on are not read.
            shared_vocab: where the teacher's vocabulary is another one: rows of its head, or columns of teacher_logits,
                are then classes of its own.
            group: a process group, each rank of which has its own rows of both heads and biases, its own columns of
                teacher_logits, and all hidden states (see `kdkernels.parallel`): the all_gathers of the loss for each
                chunk. The gradient of student_hidden is summed over the ranks here; add nothing up behind it. A
                backward that makes the sweep again (reduction "none", float16) makes all of these again: a rank that
                leaves it out leaves the others to the group's timeout.

        Returns:
            What the loss returns for those logits.

        Raises:
            TypeError, ValueError: an argument is missing, or not of the dtype, device, shape or range it should be; a
                tensor of the teacher's requires grad.
            NotImplementedError: in a double backward.
        """
        x = Inputs(student_hidden, student_head, student_bias, teacher_hidden, teacher_head, teacher_bias,
                   teacher_head_scale, teacher_logits, labels, row_weight, temperature, vocab_mask)  # fmt: skip
        breaks = torch.compiler.is_compiling() and not self._traceable(x, shared_vocab, group)
        run: Any = torch.compiler.disable(self._run) if breaks else self._run
        return run(x, num_items, vocab_size, shared_vocab, group)

    def _traceable(self, x: Inputs, shared, group) -> bool:
        """Whether a graph takes the call: tensors, and gradients that do not have to know the incoming one."""
        late = self.loss.reduction == "none" or torch.float16 in (getattr(x[0], "dtype", None), autocast(x[0]))
        return group is None and shared is None and not late and not isinstance(x.teacher_logits, SparseTeacher)

    def _run(self, x: Inputs, num_items, vocab_size: int | None, shared: SharedVocab | None, group) -> Tensor:
        self._check_options()
        if shared is not None:
            check_shared(shared, x, group)
        if group is not None:
            parallel.check_loss(self.loss)
            parallel.check_group(group)
        labels, shape = x.labels, getattr(x.student_hidden, "shape", ())[:-1]
        sparse = x.teacher_logits if isinstance(x.teacher_logits, SparseTeacher) and self.loss._uses.teacher else None
        with parallel.refusing(group, x.student_hidden):
            if sparse is not None:
                merged.check_whole(x.student_hidden, sparse, group)
            x, vocab, cast, number = self._checked(x, num_items, vocab_size, shared, group)
            wants = x.student_hidden.requires_grad and torch.is_grad_enabled()
            kind = (labels is None, wants, self.chunk, self.memory_budget, x.student_hidden.dtype, cast)
        if group is not None:
            code = parallel.checksum(self.loss, kind)
            group = parallel.join(group, x.student_hidden, len(x.student_head), vocab, code)
            group.local(x.labels, self.loss.ignore_index, self.loss.validate)  # raises on every rank
        shared = shared if self.loss._uses.teacher else None
        if sparse is not None or shared is not None:
            merged.prepare(self.loss)  # once, for all chunks
        if sparse is not None:
            sparse = sparse.reshape(len(x.student_hidden))
        if torch.compiler.is_compiling():
            if number is not None:
                x = x._replace(temperature=torch.ones((), dtype=torch.float64) * float(number))  # as in `call`
            return compiled.value_of(self, x, vocab, cast)
        value = LinearRows.apply(self._plan(x, vocab, cast, number, sparse, shared, group), torch.is_grad_enabled(), *x)
        return value.view(shape) if self.loss.reduction == "none" else value

    def _checked(self, x: Inputs, num_items, vocab_size: int | None, shared: SharedVocab | None, group):
        """The inputs in the shapes of a sweep, the number of classes, autocast's dtype and a temperature number."""
        loss = self.loss if group is None else parallel.unvalidated(self.loss)
        cast = autocast(x.student_hidden)
        check_head("student", x.student_hidden, x.student_head, x.student_bias, cast)
        logits = call.Shaped(torch.Size((*x.student_hidden.shape[:-1], len(x.student_head))), x.student_hidden.device)
        vocab = call.check_vocab(vocab_size, logits) if shared is None else shared.vocab(vocab_size, logits)
        x = check_teacher(loss, x, logits, vocab_size, shared, cast)
        given = x.mask if group is None else None
        labels, mask, weight = call.check_rows(loss, logits, vocab, x.labels, x.factor, x.temperature, given)
        if x.mask is not None and group is not None:
            mask = call.check_mask(x.mask, logits, vocab, least=0)
        rows = call.Rows(x.student_hidden, None, labels, mask, weight, vocab)
        factor = call.factor(*call.weighting(loss, rows, num_items), labels, loss.ignore_index, x.student_hidden)
        number = None if isinstance(x.temperature, Tensor) else x.temperature
        x = x._replace(labels=labels, factor=factor, mask=mask, temperature=x.temperature if number is None else None)
        return x.flat(), vocab, cast, number

    def _plan(self, x: Inputs, vocab: int, cast: torch.dtype | None, temperature: float | None = None, sparse=None,
              shared: SharedVocab | None = None, shards=None) -> Plan:  # fmt: skip
        teacher = x.teacher_logits if x.teacher_hidden is None else x.teacher_hidden
        backend, operators = self.loss._pick(x.student_hidden, teacher)
        budget = int(self.memory_budget or (BUDGET_CPU if x.student_hidden.is_cpu else BUDGET))
        block = BLOCK_CPU if x.student_hidden.is_cpu and shards is None else max(len(x.student_hidden), 1)
        if isinstance(self.chunk, int):
            chunk = self.chunk
        else:
            plain = not self.loss.standardize and sparse is None and shards is None and shared is None
            in_place = plain and operators and operators.step_out
            copies = 1 if in_place and self.student_softcap is None else 2
            widest = vocab if shards is None else max(end - start for start, end in shards.spans)
            own = widest * copies * cast_dtype(x.student_hidden, cast).itemsize
            second = vocab if x.teacher_head is None else len(x.teacher_head)
            if self.loss.any_width and second != vocab:  # the narrower rows are filled up, and have another gradient
                own += 2 * max(second, vocab) * cast_dtype(x.student_hidden, cast).itemsize
            second = widest if shards is not None else second
            other = 0 if x.teacher_hidden is None else second * cast_dtype(x.teacher_hidden, cast).itemsize
            if shared is not None:  # both rows of outcomes, and their gradients
                own += 4 * len(shared.student) * max(x.student_hidden.itemsize, 4)
            rows, chunk = max(len(x.student_hidden), 1), max(budget // (own + other), 1)
            chunk = max(chunk, (budget - block * other) // own)
            chunk = -(-rows // -(-rows // chunk))  # as many chunks, but of one size
        scales = (self.student_logit_scale, self.teacher_logit_scale)
        caps = (self.student_softcap, self.teacher_softcap)
        name = backend.__name__.rpartition(".")[-1]
        return Plan(fixed(self.loss), name, cast, chunk, block, budget, vocab, scales, caps, temperature,
                    self._kept, sparse, shared, shards)  # fmt: skip

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._name = compiled.named(self)

    def _check_options(self) -> None:
        if not isinstance(self.loss, BaseLoss):
            raise TypeError(f"loss must be a kdkernels loss, such as ForwardKLLoss(), got {self.loss!r}")
        if not self.loss.rowwise:
            raise ValueError(f"loss must be row-wise: {type(self.loss).__name__} relates rows to each other, and only "
                             "a chunk of them has logits at a time; call it on the logits")  # fmt: skip
        if self.chunk != "auto" and (isinstance(self.chunk, bool) or not isinstance(self.chunk, int) or self.chunk < 1):
            raise ValueError(f"chunk must be 'auto' or an int >= 1, got {self.chunk!r}")
        if self.memory_budget is not None:
            check_number("memory_budget", self.memory_budget, least=1)
        for side in ("student", "teacher"):
            check_number(f"{side}_logit_scale", getattr(self, f"{side}_logit_scale"))
            if getattr(self, f"{side}_softcap") is not None:
                check_number(f"{side}_softcap", getattr(self, f"{side}_softcap"), above=0)
