"""Losses of logits cut into vocabulary shards: every rank of a process group holds some of the columns of all rows.

Row statistics are a monoid: each rank reduces its columns, one all_gather brings the ranks' statistics together, every
rank merges them in float64, and value and gradient follow as for whole rows. The sums over the classes of a separable
loss, which need the log-partitions, are gathered after them; the deviations of standardised rows, of both sides
together, before. Another small all_gather goes ahead, of what has to be known first: that the ranks hold the same rows
and make the same call, and how many columns each has. It cannot ride with the statistics, whose size is what ranks may
disagree about: gloo ends a process that is sent another size than it waits for. `vocab_shards` leaves it out. The
backward needs none: a rank's gradient is a function of its own columns and the merged statistics.
"""

from __future__ import annotations

import contextlib
import copy
import math
import zlib
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from . import call
from .dtensor import is_sharded as is_sharded  # of what a call is given
from .dtensor import unwrapped
from .ops import Once
from .options import check_count
from .out import check_out, handed_over
from .shards import IGNORED, Shards, gather

_NOT_AGAIN = "kdkernels: the gradient of a loss on vocabulary shards is not itself differentiable"


def forward(loss, group, num_items, *given):
    """A call of the loss with `group` or DTensors. Under torch.compile a graph break."""
    run: Any = torch.compiler.disable(_forward) if torch.compiler.is_compiling() else _forward
    return run(loss, group, num_items, *given)


def _forward(loss, group, num_items, *given):
    check_loss(loss)
    if loss.in_turn:
        values = [weight * _forward(term, group, num_items, *given) for weight, term in loss.weighed(given[4])]
        return sum(values[1:], values[0])
    loss, rows = split(loss, group, *given)
    return loss._evaluate(rows, rows.student, num_items, given[4])


def value_and_grad(loss, group, num_items, out, accumulate, *given) -> Any:
    """(the reduced loss, the gradient of this rank's student logits)."""
    check_loss(loss)
    if loss.in_turn:
        _, student, teacher, _ = unwrapped(group, *given[:3])
        check_out(loss, out, accumulate, student, teacher)
        terms = [(w, *value_and_grad(x, group, num_items, None, False, *given)) for w, x in loss.weighed(given[4])]
        value, gradient = (sum(weight * found[k] for weight, *found in terms) for k in (0, 1))
        return value, handed_over(cast(Tensor, gradient), out, accumulate)
    loss, rows = split(loss, group, *given)
    check_out(loss, out, accumulate, rows.student, rows.teacher)
    return loss._value_and_grad(rows, rows.student.detach(), num_items, given[4], out, accumulate)


def split(loss, group, student, teacher, labels, row_weight, temperature, vocab_size, vocab_mask):
    """-> the loss and the `Rows` of this rank's columns, once all ranks agree.

    Raises:
        TypeError, ValueError: as in a call, on the rank with the argument at fault and (another) on all others; the
            loss cannot be cut into shards; the ranks hold different rows or make different calls.
    """
    loss = loss.on_shards()
    group, student, teacher, labels = unwrapped(group, student, teacher, labels)
    check_group(group)
    with refusing(group, student):
        width = student.shape[-1] if isinstance(student, Tensor) and student.dim() else 0
        given = (_padded(student), _padded(teacher), labels, row_weight, temperature, vocab_size, None)
        rows = call.check(unvalidated(loss), *given)
        if vocab_mask is not None:
            rows = rows._replace(mask=call.check_mask(vocab_mask, rows.student, rows.vocab, least=0))
        code = _checksum(loss, rows)
    shards = join(group, rows.student, width, min(rows.vocab, width), code)
    labels = shards.local(rows.labels, loss.ignore_index, loss.validate)
    loss = copy.copy(loss)
    vars(loss)["ignore_index"] = IGNORED
    teacher = None if rows.teacher is None else _Guard.apply(rows.teacher)
    return loss, rows._replace(student=_Guard.apply(rows.student), teacher=teacher, labels=labels, shards=shards)


def unvalidated(loss):
    """The loss, for checks that do not know of the other ranks' classes."""
    loss = copy.copy(loss)
    vars(loss)["validate"] = False
    return loss


def check_loss(loss) -> None:
    if loss.unsharded:
        raise ValueError(f"{type(loss).__name__} cannot be computed on vocabulary shards: {loss.unsharded}")


def check_group(group) -> None:
    if not isinstance(group, (dist.ProcessGroup, Shards)):
        raise TypeError(f"group must be a process group of torch.distributed, got {group!r}")


@contextlib.contextmanager
def refusing(group, like):
    """A rank that refuses its arguments says so: the others would wait for it."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError):
        if group is not None and not isinstance(group, Shards):
            gather(group, torch.zeros(5, dtype=torch.int64, device=getattr(like, "device", None)))
        raise


def _checksum(loss, rows: call.Rows) -> int:
    backend, _ = loss._pick(rows.student, rows.teacher)
    return checksum(loss, rows.labels is None, backend.__name__)


def checksum(loss, *kind) -> int:
    """Of what has to be the same on all ranks for what they exchange to fit together."""
    kind = (type(loss).__name__, loss.reduction, loss.standardize, loss.ignore_index,
            vars(loss).get("_exchanges"), *kind)  # fmt: skip
    program = vars(loss).get("_double")
    return zlib.crc32(repr(kind).encode() + (b"" if program is None else program.code.numpy().tobytes()))


def join(group, like: Tensor, width: int, classes: int, code: int) -> Shards:
    """The group's shards, once all ranks have as many rows as `like` (..., W) and the same checksum."""
    if isinstance(group, Shards):
        if group.classes != classes:
            raise ValueError(f"group is one where this rank has {group.classes} classes, got logits of {classes}")
        return group
    own = torch.tensor([1, like.shape[:-1].numel(), width, classes, code], device=like.device)
    entries = gather(group, own).tolist()
    if refused := [r for r, entry in enumerate(entries) if not entry[0]]:
        raise ValueError(f"ranks {refused} of the group have refused their arguments; see their errors")
    _, counts, widths, spans, codes = map(list, zip(*entries, strict=True))
    if len(set(counts)) > 1:
        raise ValueError(f"the ranks of the group must hold the same rows, got {counts} of them")
    if len(set(codes)) > 1:
        raise ValueError("the ranks of the group must call the same loss, with the same options, backend and labels or "
                         f"none, got different calls (checksums {codes})")  # fmt: skip
    return Shards(group, widths, spans)


def _padded(x):
    """A rank without columns gets one that is padding."""
    empty = isinstance(x, Tensor) and x.dim() > 0 and x.shape[-1] == 0
    return torch.nn.functional.pad(x, (0, 1), value=-math.inf) if empty else x


def vocab_shards(group: Any, columns: int, vocab_size: int | None = None, *, device: Any = None) -> Shards:
    """Who holds which columns of a vocabulary, found out once for all calls: `group=` of a loss takes it.

    A call with it leaves out the all_gather in which ranks make sure that they hold the same rows and make the same
    call: one that does not, or refuses its arguments, leaves the others to the group's timeout.

    Args:
        group: a torch.distributed process group, every rank of which calls this.
        columns: of this rank's logits, vocab_size of them classes (all if None).
        device: the logits'; the host if None.

    Raises:
        TypeError, ValueError: the arguments are not that; on the other ranks, too.
    """
    check_group(group)
    like = torch.empty(0, 0, device=device)
    with refusing(group, like):
        classes = columns if vocab_size is None else vocab_size
        check_count("columns", columns, 0)
        check_count("vocab_size", classes, 0, columns)
    return join(group, like, columns, classes, 0)


class _Guard(torch.autograd.Function):
    """The same logits, of whose gradient there is none: it would need what the other ranks' logits do to it."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return Once.apply(_NOT_AGAIN, lambda g: g.view_as(g), grad) if torch.is_grad_enabled() else grad
