"""A loss's value together with metrics of its rows, most of them from the statistics that the value is made of."""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, call, tape
from .buckets import Merged, blocks
from .compose import SumLoss, joins
from .logpartition import ForwardKLLoss
from .loss import Label, Loss, Moment, Point
from .options import check_bool

ELEMENTS = 1 << 22  # of a chunk of rows that is read again


class RowMetrics(NamedTuple):
    """Of each row, (...) float64, without a gradient; NaN where a label leaves the row out. q and p as the loss sees
    them: at its temperatures (at 1 for a sum of losses with different ones), over live classes.

    Attributes:
        student_lse, teacher_lse: log-partitions log sum_i exp(s_i / T), log sum_i exp(t_i / T).
        student_entropy, teacher_entropy: -sum_i q_i log q_i, -sum_i p_i log p_i.
        cross_entropy: -log q_y, where there are labels.
        top1_agreement: 1 where the largest logits of both are of the same class (the first of equals), else 0.
        acceptance: sum_i min(p_i, q_i) = 1 - TVD, the rate at which speculative decoding accepts the student's tokens.

    Those of the teacher are None for a loss that looks at none, and the last two without `agreement`.
    """

    student_lse: Tensor
    teacher_lse: Tensor | None
    student_entropy: Tensor
    teacher_entropy: Tensor | None
    cross_entropy: Tensor | None
    top1_agreement: Tensor | None
    acceptance: Tensor | None


class _Observed(SumLoss):
    """The loss, with q and p among its points whether it needs them or not; what it sees goes to a sink."""

    _sink: dict[str, Any]

    def _more_points(self):
        return [Point(student=1), *([Point(teacher=1)] if self.needs_teacher else [])]

    def _more(self) -> list[int]:
        place = {point: k for k, point in enumerate(self._points)}
        return [place[point] for point in self._more_points()]

    def row_value(self, moments: list[Moment], label: Label, raw_label: Any, temperature: Any) -> Any:
        own = [moments[k] for k in self._more()]
        # which asks the kernels for them
        means: list[Any] = [tape.detach(m.t if side else m.s) for side, m in enumerate(own)]
        if isinstance(means[0], Tensor):  # the reference
            self._sink.update(lse=torch.stack([m.lse.detach() for m in own]), mean=torch.stack(means),
                              label=torch.as_tensor(label.student).detach())  # fmt: skip
        return super().row_value(moments, label, raw_label, temperature)

    def _prepared(self, rows, num_items, temperature):
        prepared = super()._prepared(rows, num_items, temperature)
        self._sink.update(rows=rows, args=prepared[3].detach(), ignore=self.ignore_index)
        return prepared

    def _of_whole_rows(self, operators, rows):
        own = super()._of_whole_rows(operators, rows)

        def reduce(*inputs):
            stats = own.reduce(*inputs)
            more, scale = self._more(), self._sink["args"].to(stats.device).T
            means = [stats[:, k, 2 + side] * scale[side] for side, k in enumerate(more)]
            lse = [stats[:, k, 0] + stats[:, k, 1].log() for k in more]
            self._sink.update(lse=torch.stack(lse), mean=torch.stack(means), label=stats[:, -1, 0] * scale[0])
            return stats

        return own._replace(reduce=reduce, step=None, step_out=None, step_add=None)


def with_metrics(loss: Any, student, teacher, labels, agreement: bool, given: dict) -> tuple[Tensor, RowMetrics]:
    """The body of `BaseLoss.with_metrics`."""
    check_bool("agreement", agreement)
    if isinstance(teacher, Merged):
        raise ValueError(f"with_metrics needs teacher_logits of all classes, got a {type(teacher).__name__}: metrics "
                         "of merged outcomes are none of the rows'")  # fmt: skip
    if not joins(loss):
        value, more = loss(student, teacher, labels, **given), given.keys() - {"num_items", "row_weight"}
        if loss._uses.teacher and teacher.shape != student.shape and given.get("vocab_size") is None:  # ULDLoss
            raise ValueError(f"with_metrics needs teacher_logits of student_logits' shape {tuple(student.shape)}, got "
                             f"{tuple(teacher.shape)}")  # fmt: skip
        with torch.no_grad():
            own = _divergence(loss).with_metrics(
                student, teacher, labels, agreement=agreement, **{name: given[name] for name in more}
            )
        return value, own[1]
    observed = vars(loss).get("_observed")
    if observed is None:
        observed = vars(loss)["_observed"] = _Observed([(1, loss)])
    observed._uses  # noqa: B018  (prepares it again if an option of the loss has changed)
    observed = copy.copy(observed)
    vars(observed).update(_sink={}, reduction=loss.reduction, ignore_index=loss.ignore_index,
                             validate=loss.validate, _exchanges=agreement)  # fmt: skip
    value = observed(student, teacher, labels, **given)
    with torch.no_grad():
        return value, _metrics(observed._sink, agreement)


def _divergence(loss: Any) -> Loss:
    """One of the log-partitions that the loss is not made of, at its temperatures."""
    own = ("temperature", "teacher_temperature", "standardize", "ignore_index", "validate")
    options: dict[str, Any] = {name: getattr(loss, name) for name in own} | {"kd_weight": float(loss._uses.teacher)}
    kept = vars(loss).get("_observed")
    if kept is None or kept[0] != options:
        kept = vars(loss)["_observed"] = options, ForwardKLLoss(**options)
    return kept[1]


def _metrics(sink: dict[str, Any], agreement: bool) -> RowMetrics:
    rows, lse, ignore = sink["rows"], sink["lse"], sink["ignore"]
    shape, labels = rows.student.shape[:-1], rows.labels

    def of_rows(x):
        return (x if labels is None else torch.where(labels == ignore, math.nan, x)).view(shape)

    entropy = [of_rows(x) for x in lse - sink["mean"]]
    with_teacher = len(lse) == 2
    again = _read_again(rows, sink["args"], lse, ignore) if agreement and with_teacher else (None, None)
    return RowMetrics(
        student_lse=of_rows(lse[0]),
        teacher_lse=of_rows(lse[1]) if with_teacher else None,
        student_entropy=entropy[0],
        teacher_entropy=entropy[1] if with_teacher else None,
        cross_entropy=None if labels is None else of_rows(lse[0] - sink["label"]),
        top1_agreement=None if again[0] is None else of_rows(again[0]),
        acceptance=None if again[1] is None else of_rows(again[1]),
    )


def _read_again(rows: call.Rows, args: Tensor, lse: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    """(N,) whether the first choices agree, and sum_i min(p_i, q_i)."""
    assert rows.teacher is not None
    kernel = getattr(backends.pick(rows.student, rows.teacher), "AGREEMENT", None)
    if kernel is None:
        found = _in_torch(rows, args, lse)
    else:
        s, t = call.dense(rows.student.detach()), call.dense(rows.teacher.detach())
        found = kernel(s, t, rows.labels, rows.mask, args.contiguous(), lse.contiguous(), rows.vocab, ignore)
    if rows.shards is None:
        return (found[:, 1] == found[:, 3]).double(), found[:, 4]
    parts = rows.shards.gather(found)
    starts = parts.new_tensor([start for start, _ in rows.shards.spans])[:, None]
    first_of_all = [(parts[..., k + 1] + starts).gather(0, parts[..., k].argmax(0)[None])[0] for k in (0, 2)]
    return (first_of_all[0] == first_of_all[1]).double(), parts[..., 4].sum(0)


def _in_torch(rows: call.Rows, args: Tensor, lse: Tensor) -> Tensor:
    """(N, 5): the largest logit and its class, of both sides; sum_i min(p_i, q_i). A chunk of rows at a time."""
    scales = args.to(lse.device)[:, :2].expand(lse.shape[1], 2)
    found = [lse.new_empty(0, 5)]
    assert rows.teacher is not None
    for at, *pair in blocks(rows.student, rows.teacher, memory=ELEMENTS):
        logits = [x[:, : rows.vocab] for x in pair]
        if rows.mask is not None:
            logits = [torch.where(rows.mask, x, -math.inf) for x in logits]
        first = [y.double() for x in logits for y in x.max(-1)]
        q, p = ((x.double() * scales[at, k, None] - lse[k, at, None]).exp() for k, x in enumerate(logits))
        found.append(torch.stack((*first, torch.minimum(q, p).sum(-1)), -1))
    return torch.cat(found)
