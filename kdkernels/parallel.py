"""Losses of logits cut into vocabulary shards: every rank of a process group holds some of the columns of all rows.

Row statistics are a monoid: each rank reduces its columns, one all_gather brings the ranks' statistics together, every
rank merges them in float64, and value and gradient follow as for whole rows. The sums over the classes of a separable
loss, which need the log-partitions, are gathered after them. Another small all_gather goes ahead, of
what has to be known first: that the ranks hold the same rows and make the same call, and how many columns each has.
The backward needs none: a rank's gradient is a function of its own columns and the merged statistics.
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
from .ops import Once, points_of, with_sums
from .options import ELSEWHERE, check_count, readable
from .out import check_out, handed_over

_NOT_AGAIN = "kdkernels: the gradient of a loss on vocabulary shards is not itself differentiable"
IGNORED, STRANGE = ELSEWHERE + 1, ELSEWHERE - 1  # labels of a row left out; of a class that no rank has


class Shards:
    """Who holds which columns: rank r those from sum(widths[:r]) on, the first classes[r] of which are no padding."""

    def __init__(self, group, widths: list[int], classes: list[int]):
        self.group, self.rank = group, dist.get_rank(group)
        self.classes = classes[self.rank]
        starts = [sum(widths[:r]) for r in range(len(widths))]
        self.spans = [(start, start + count) for start, count in zip(starts, classes, strict=True)]

    def gather(self, x: Tensor) -> Tensor:
        """(...) -> (ranks, ...), the same on every rank."""
        return _gather(self.group, x)

    def add_up(self, x: Tensor) -> None:
        """x becomes the sum over the ranks, added up in float32 at least."""
        total = x.to(torch.promote_types(x.dtype, torch.float32))
        dist.all_reduce(total, group=self.group)
        x.copy_(total)

    def local(self, labels: Tensor | None, ignore: int, validate: bool = False) -> Tensor | None:
        """(N,) numbers of classes -> of this rank's columns, ELSEWHERE, IGNORED or STRANGE."""
        if labels is None:
            return None
        kept = labels != ignore
        known = torch.stack([(labels >= start) & (labels < end) for start, end in self.spans])
        if (validate or readable(labels)) and (bad := kept & ~known.any(0)).any():
            first = labels[bad][0].item()
            raise ValueError(f"labels must be in {self._classes()} or ignore_index={ignore}, got {first}")
        local = torch.where(known[self.rank], labels - self.spans[self.rank][0], ELSEWHERE)
        return torch.where(kept, torch.where(known.any(0), local, STRANGE), IGNORED)

    def _classes(self) -> str:
        gaps = any(end < start for (_, end), (start, _) in zip(self.spans, self.spans[1:], strict=False))
        return " or ".join(f"[{a}, {b})" for a, b in self.spans if a < b) if gaps else f"[0, {self.spans[-1][1]})"

    def operators(self, base):
        """Those of a backend on this rank's columns, with statistics of the whole rows."""

        def reduce(student, teacher, labels, mask, args, program, vocab, ignore_index):
            rows, end = (student, teacher, labels, mask), (vocab, ignore_index)
            if not base.elements:
                return self.merge_stats(base.reduce(*rows, args, program, *end), args)
            points, sums = base.elements
            code, less = points_of(program, args)
            stats = self.merge_stats(points(*rows, less, code, *end), less)
            return with_sums(stats, self.gather(sums(*rows, args, program, stats, *end)).sum(0))

        return base._replace(reduce=reduce, step=None, step_out=None, step_add=None)

    def merge_stats(self, stats: Tensor, args: Tensor) -> Tensor:
        """(N, K + 1, 7) of this rank's columns -> of the rows (`kdkernels.ops`)."""
        parts = self.gather(stats)
        points, last = parts[:, :, :-1], parts[:, :, -1]
        moments = torch.stack(merge(*points.unbind(-1)), -1)
        coefs, top = args.to(stats.device)[:, 3:], []
        for side in (0, 1):
            # A maximum of 0 may stand for none, as of a shard that is all padding: then points there are empty.
            own = last[..., 2 + side]
            there = (own != 0) | ((coefs[:, side::2] != 0) & (points[..., 1] != 0)).any(-1)
            best = torch.where(there, own, -math.inf).amax(0)
            top.append(torch.where(best == -math.inf, 0.0, best))
        label, kept, special = last[..., :2].sum(0), last[..., 4].amin(0), last[..., 5].amax(0)
        end = torch.stack((*label.unbind(-1), *top, kept, special, torch.zeros_like(kept)), -1)
        return torch.cat((moments, end[:, None]), 1)

    def shared(self, args: Tensor) -> Tensor:
        """What the statistics of all ranks depend on, where autograd sees one's own: its gradient is summed."""
        return _Shared.apply(args, self.group) if args.requires_grad else args

    def merge_sums(self, total: Tensor, slopes: list[Tensor], lse: list[Tensor]) -> Tensor:
        """(N,) sums over this rank's classes -> over all, differentiable by this rank's part of them and of lse.

        slopes: of this rank's sum, by each of the log-partitions lse.
        """
        parts = self.gather(torch.stack((total.detach(), *slopes), -1))
        parts[self.rank] = 0.0
        others, *slopes = parts.sum(0).unbind(-1)
        for x, slope in zip(lse, slopes, strict=True):
            total = total + torch.where(slope.isfinite(), slope, 0.0) * (x - x.detach())
        return total + others

    def merge_moments(self, moments, empty, at):
        """The same for the reference, differentiable by this rank's part: K x (lse, s, t, ss, st, tt), K x whether the
        point has no class, and the label's logits, each (N,)."""
        K = len(moments)
        own = torch.stack([*(x for m in moments for x in m), *(e.double() for e in empty), *at], -1)
        parts = list(self.gather(own.detach()))
        parts[self.rank] = own
        all_ = torch.stack(parts)
        lse, *means = all_[..., : 6 * K].unflatten(-1, (K, 6)).unbind(-1)
        finite = lse.isfinite()
        z = torch.where(finite, (lse - torch.where(finite, lse, 0.0).detach()).exp(), (lse != -math.inf).double())
        m, z, *means = merge(lse.detach(), z, *means)
        lse = torch.where(z == 0, -math.inf, m + torch.where(z == 0, 1.0, z).log())
        found = [tuple(x[:, k] for x in (lse, *means)) for k in range(K)]
        return found, all_[..., 6 * K : 7 * K].amin(0).bool().unbind(-1), all_[..., 7 * K :].sum(0).unbind(-1)


def merge(m: Tensor, z: Tensor, s: Tensor, t: Tensor, ss: Tensor, st: Tensor, tt: Tensor):
    """The monoid of `csrc/moments.h` over the first dimension: max, mass relative to it, means, central covariances."""
    top = torch.where(z == 0, -math.inf, m).amax(0)
    mass = z * torch.where((z == 0) | (m == top), 0.0, m - top).exp()
    total = mass.sum(0)
    f = mass / torch.where(total == 0, 1.0, total)
    s, t, ss, st, tt = (torch.where(f == 0, 0.0, x) for x in (s, t, ss, st, tt))
    mean_s, mean_t = (f * s).sum(0), (f * t).sum(0)
    # What has no weight, and what is infinitely far away (the mean already says so), has no distance.
    d, e = (torch.where((f == 0) | mean.isinf(), 0.0, x - mean) for x, mean in ((s, mean_s), (t, mean_t)))
    return top, total, mean_s, mean_t, *((f * x).sum(0) for x in (ss + d * d, st + d * e, tt + e * e))


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
            _gather(group, torch.zeros(5, dtype=torch.int64, device=getattr(like, "device", None)))
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
    entries = _gather(group, own).tolist()
    if refused := [r for r, entry in enumerate(entries) if not entry[0]]:
        raise ValueError(f"ranks {refused} of the group have refused their arguments; see their errors")
    _, counts, widths, spans, codes = map(list, zip(*entries, strict=True))
    if len(set(counts)) > 1:
        raise ValueError(f"the ranks of the group must hold the same rows, got {counts} of them")
    if len(set(codes)) > 1:
        raise ValueError("the ranks of the group must call the same loss, with the same options, backend and labels or "
                         f"none, got different calls (checksums {codes})")  # fmt: skip
    return Shards(group, widths, spans)


def _gather(group, x: Tensor) -> Tensor:
    x = x.contiguous()
    out = x.new_empty((dist.get_world_size(group), *x.shape))
    dist.all_gather(list(out.unbind(0)), x, group=group)
    return out


def _padded(x):
    """A rank without columns gets one that is padding."""
    empty = isinstance(x, Tensor) and x.dim() > 0 and x.shape[-1] == 0
    return torch.nn.functional.pad(x, (0, 1), value=-math.inf) if empty else x


def vocab_shards(group, columns: int, vocab_size: int | None = None, *, device: Any = None) -> Shards:
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


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        total = grad.detach().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
