"""Who holds which columns of logits cut into vocabulary shards; statistics of whole rows from those of the ranks."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .ops import points_of, with_sums
from .options import ELSEWHERE, readable

IGNORED, STRANGE = ELSEWHERE + 1, ELSEWHERE - 1  # labels of a row left out; of a class that no rank has


class Shards:
    """Who holds which columns: rank r those from sum(widths[:r]) on, the first classes[r] of which are no padding."""

    def __init__(self, group, widths: list[int], classes: list[int]) -> None:
        self.group, self.rank = group, dist.get_rank(group)
        self.classes = classes[self.rank]
        starts = [sum(widths[:r]) for r in range(len(widths))]
        self.spans = [(start, start + count) for start, count in zip(starts, classes, strict=True)]

    def gather(self, x: Tensor) -> Tensor:
        """(...) -> (ranks, ...), the same on every rank."""
        return gather(self.group, x)

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

    def merge_sums(self, total: Tensor, slopes: list[Tensor], shared: list[Tensor]) -> Tensor:
        """(N,) sums over this rank's classes -> over all, differentiable by this rank's part of them and by `shared`.

        slopes: of this rank's sum, by each of what the sums of all ranks depend on, `shared`.
        """
        parts = self.gather(torch.stack((total.detach(), *slopes), -1))
        parts[self.rank] = 0.0
        others, *slopes = parts.sum(0).unbind(-1)
        return _slanted(total + others, slopes, shared)

    def merge_moments(self, moments, empty, at, points, args, scaled: bool):
        """The same for the reference, differentiable by this rank's part: K x (lse, s, t, ss, st, tt), K x whether the
        point has no class, and the label's logits, each (N,).

        scaled: the logits' scales are functions of the logits, and what the other ranks have depends on them, too.
        """
        K = len(moments)
        own = torch.stack([*(x for m in moments for x in m), *(e.double() for e in empty), *at], -1)
        slopes = _by_scales(moments, empty, at, points, args) if scaled else []
        others, *slopes = self.gather(torch.stack((own.detach(), *slopes))).unbind(1)
        parts = list(_slanted(others, slopes, [x[:, None] for x in args[:, :2].log().unbind(-1)][: len(slopes)]))
        parts[self.rank] = own
        all_ = torch.stack(parts)
        lse, *means = all_[..., : 6 * K].unflatten(-1, (K, 6)).unbind(-1)
        finite = lse.isfinite()
        z = torch.where(finite, (lse - torch.where(finite, lse, 0.0).detach()).exp(), (lse != -math.inf).double())
        m, z, *means = merge(lse.detach(), z, *means)
        lse = torch.where(z == 0, -math.inf, m + torch.where(z == 0, 1.0, z).log())
        found = [tuple(x[:, k] for x in (lse, *means)) for k in range(K)]
        return found, all_[..., 6 * K : 7 * K].amin(0).bool().unbind(-1), all_[..., 7 * K :].sum(0).unbind(-1)


class Known(NamedTuple):
    """In the place of shards, for a loss without sums over classes whose statistics of whole rows are there already."""

    stats: Tensor

    def operators(self, base):
        return base._replace(reduce=lambda *_: self.stats, step=None, step_out=None, step_add=None)


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


def gather(group, x: Tensor) -> Tensor:
    x = x.contiguous()
    out = x.new_empty((dist.get_world_size(group), *x.shape))
    dist.all_gather(list(out.unbind(0)), x, group=group)
    return out


def _slanted(x: Tensor, slopes, shared: list[Tensor]) -> Tensor:
    """x, with these slopes by `shared`."""
    for slope, y in zip(slopes, shared, strict=True):
        x = x + torch.where(slope.isfinite(), slope, 0.0) * (y - y.detach())
    return x


def _by_scales(moments, empty, at, points, args: Tensor) -> list[Tensor]:
    """Slopes of what `merge_moments` gathers by the logarithms of the student's scale and of the teacher's.

    Those of the covariances at a point that is tilted by them are none: `kdkernels.options.flags` refuses those.
    """
    columns: list[list[Tensor]] = [[], []]
    for k, (point, m) in enumerate(zip(points, moments, strict=True)):
        _, s, t, ss, st, tt = (0.0 * x if point.raw else x.detach() for x in m)
        b, a = (args[:, j].detach() * (not point.frozen) for j in (3 + 2 * k, 4 + 2 * k))
        zero = torch.zeros_like(ss)
        columns[0] += [b * s, s + b * ss, b * st, 2 * ss, st, zero]
        columns[1] += [a * t, a * st, t + a * tt, zero, st, 2 * tt]
    none = [torch.zeros_like(at[0])]
    ends = [at[0].detach(), *none, *none], [*none, at[1].detach(), *none]
    return [torch.stack((*own, *none * len(empty), *end), -1) for own, end in zip(columns, ends, strict=True)]
