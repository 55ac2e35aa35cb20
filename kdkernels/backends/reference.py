"""The definition: plain torch in float64, O(K N V) memory, differentiable as often as one likes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..options import ELSEWHERE
from . import calls

if TYPE_CHECKING:
    from ..call import Rows
    from ..loss import Loss, Program

DEVICES = ("any",)
FLOAT64 = True
OPERATORS = None  # not built from row operations: torch's autograd goes through the whole of it


def unavailable() -> str | None:
    return None


class _Finite(torch.autograd.Function):
    """x with -inf replaced by 0, and the gradient of x: d(mean of x)/dx_i is the weight whatever x_i is."""

    @staticmethod
    def forward(ctx, x):
        return torch.where(x == -math.inf, 0.0, x)

    @staticmethod
    def backward(ctx, grad):
        return grad


def row_losses(loss: Loss, rows: Rows, program: Program, args: Tensor) -> Tensor:
    """(N,) float64 losses; 0 at rows that are not kept."""
    from ..loss import MOMENTS, Label, Moment
    from ..rowwise import is_sums

    if not torch.compiler.is_compiling():
        calls["reference", "row_losses"] += 1
    labels = rows.labels
    keep = None if labels is None else labels != loss.ignore_index
    if rows.weight is not None:  # a row that counts nothing passes nothing on, whatever it holds
        keep = rows.weight != 0 if keep is None else keep & (rows.weight != 0)
    s = _prepare(rows.student, rows, keep)
    t = torch.zeros_like(s) if rows.teacher is None else _prepare(rows.teacher, rows, keep)
    gone_s, gone_t = s == -math.inf, t == -math.inf
    dead = gone_s if rows.teacher is None else gone_s & gone_t
    s, t = _Finite.apply(s), _Finite.apply(t)
    y = labels if labels is None else labels[:, None]
    here = torch.zeros_like(dead[:, :1]) if y is None else (y != loss.ignore_index) & (y != ELSEWHERE)
    y = torch.zeros_like(here, dtype=torch.int64) if y is None else torch.where(here, y, 0)
    if bool(((y < 0) | (y >= rows.vocab)).any()):
        raise ValueError(f"labels must be in [0, {rows.vocab}) or ignore_index={loss.ignore_index}")
    args = args.to(s.device)
    moments: list = []
    empty, apart = [], []
    points = loss.all_points()
    with_sums = bool(points) and is_sums(points[-1])
    tilts = points[:-1] if with_sums else points
    for k, point in enumerate(tilts):
        scale_s, scale_t = (1.0, 1.0) if point.raw else (args[:, :1], args[:, 1:2])
        b, a = args[:, 3 + 2 * k : 4 + 2 * k], args[:, 4 + 2 * k : 5 + 2 * k]
        out = dead | (gone_s & (b != 0)) | (gone_t & (a != 0))
        left_out = out.scatter(1, y, out.gather(1, y) | here) if point.exclude_label else out
        wanted = {j for j in range(MOMENTS) if int(program.code[4 + k]) & (0, 8, 16, 32, 32, 32)[j]}
        moments.append(_moments(s * scale_s, t * scale_t, b, a, left_out, gone_s, gone_t, point, wanted))
        empty.append(out.all(-1))
        apart.append(((b != 0) & (a != 0) & (not point.frozen))[:, 0])  # two rows may have no class in common
    own = ((s * args[:, :1], gone_s), (t * args[:, 1:2], gone_t), (s, gone_s))
    at = [_at(x, gone, y, here) for x, gone in own]
    if rows.shards is not None:
        moments, empty, at = rows.shards.merge_moments(moments, empty, at, tilts, args, loss.standardize)
    if with_sums:
        summed: Any = loss
        log_q, log_p = _log_probabilities((s, t), (gone_s, gone_t), args, moments)
        given = y[:, 0] if loss.needs_labels else None
        moments.append(summed._sums(log_q, log_p, dead, rows.shards, [m[0] for m in moments[:2]], args, given))
    nothing = torch.zeros(s.shape[0], dtype=torch.bool, device=s.device)
    for no_class, mixture in zip(empty, apart, strict=True):
        nothing = nothing | (no_class & ~mixture)
    moments = [Moment(*m) for m in moments]
    for k in (k for k, point in enumerate(points) if point.given):
        moments[k] = moments[k]._replace(ss=args[:, 3 + 2 * k], st=args[:, 4 + 2 * k])
    value = loss.row_value(moments, Label(*at[:2]), at[2], args[:, 2])
    value = torch.as_tensor(value, dtype=torch.float64, device=s.device).expand(s.shape[0])
    value = torch.where(nothing, math.nan, value)
    damage = torch.where(nothing, math.nan, 0.0)[:, None]
    value = value + ((s + t) * damage).sum(-1)  # NaN for the gradient as well
    return value if keep is None else torch.where(keep, value, 0.0)


def _prepare(x: Tensor | None, rows: Rows, keep: Tensor | None) -> Tensor:
    assert x is not None
    x = x.reshape(-1, x.shape[-1])[:, : rows.vocab].to(torch.float64)
    if rows.mask is not None:
        x = torch.where(rows.mask, x, -math.inf)
    return x if keep is None else torch.where(keep[:, None], x, 0.0)


def _at(x: Tensor, gone: Tensor, y: Tensor, here: Tensor) -> Tensor:
    at = x.gather(1, y) + torch.where(gone.gather(1, y), -math.inf, 0.0)
    return torch.where(here, at, 0.0)[:, 0]


def _log_probabilities(logits, gone, args, moments):
    """log q and log p (N, V), from the log-partitions at the first two points."""
    for k in (0, 1):
        lse = torch.where(moments[k][0] == -math.inf, 0.0, moments[k][0])
        scale = args[:, k] * args[:, 3 + 3 * k]  # the student's coefficient at q, the teacher's at p
        yield logits[k] * scale[:, None] - lse[:, None] + torch.where(gone[k], -math.inf, 0.0)


def _moments(s, t, b, a, out, gone_s, gone_t, point, wanted):
    """(lse, s, t, ss, st, tt) of x = b s + a t over the classes that are not `out`, each (N,)."""
    # A coefficient of 0 passes no slope on, be it infinite.
    x = b * torch.where(b != 0, s, 0.0) + a * torch.where(a != 0, t, 0.0)
    x = torch.where(out, -math.inf, x)
    if point.frozen:
        x = x.detach()
    top = x.detach().amax(-1, keepdim=True)
    top = torch.where(top == -math.inf, 0.0, top)
    w = torch.where(out, 0.0, (x - top).exp())
    z = w.sum(-1)
    empty = z == 0
    w = w / torch.where(empty, 1.0, z)[:, None]
    lse = torch.where(empty, -math.inf, top[:, 0] + torch.where(empty, 1.0, z).log())
    # A negative power of a class that is impossible in one row only.
    blown = ((gone_s & (b < 0)) | (gone_t & (a < 0))) & ~(gone_s & gone_t)
    lse = torch.where(blown.any(-1), math.inf, lse)
    zero = torch.zeros_like(lse)

    def mean(f: Tensor, gone: Tensor) -> Tensor:
        hit = ((w > 0) & gone).any(-1)
        near = (w * f).sum(-1).detach()  # relative to it, the slope by w does not drown that by lse where f is giant
        return near + (w * (f - near[:, None])).sum(-1) + torch.where(hit, -math.inf, 0.0)

    S = mean(s, gone_s) if wanted & {1, 3, 4, 5} else zero
    T = mean(t, gone_t) if wanted & {2, 3, 4, 5} else zero
    if not wanted & {3, 4, 5}:
        return lse, S, T, zero, zero, zero
    d, e = s - S[:, None], t - T[:, None]
    infinite = (S.isinf() | T.isinf())[:, None]  # the mean already says so
    return lse, S, T, *(torch.where(infinite, 0.0, w * f).sum(-1) for f in (d * d, d * e, e * e))
