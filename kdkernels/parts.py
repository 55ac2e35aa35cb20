"""A loss as a sweep over chunks of rows needs it: with another reduction, of some of the rows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from .loss import Program


def reducing(loss: Any, reduction: str) -> Any:
    """The loss with another reduction."""
    part = copy.copy(loss)
    if "_double" in vars(loss):  # a log-partition loss is traced for any reduction
        part.__dict__["reduction"] = reduction
        if "_cross_entropy" in vars(loss):
            part.__dict__["_cross_entropy"] = reducing(vars(loss)["_cross_entropy"], reduction)
    else:
        part.reduction = reduction
    if "_split" in vars(part):  # of a SparseTeacher's loss
        part.__dict__["_split"] = tuple(reducing(one, reduction) for one in vars(part)["_split"])
    return part


def fixed(loss: Any) -> Any:
    """A copy for all of a call: later options do not reach it, and what it draws at random is drawn."""
    part = copy.copy(loss)
    part._draw()
    if "_split" in vars(loss):
        part.__dict__["_split"] = tuple(fixed(one) for one in vars(loss)["_split"])
    return with_terms(part, fixed) if hasattr(loss, "terms") else part


def part_of(loss: Any, at: slice, rows: int) -> Any:
    """The loss of some of the rows; its points may have coefficients of each."""
    part = copy.copy(loss)
    for name in ("_single", "_double"):
        code, args = vars(loss).get(name, (None, ()))
        if 1 < len(args) != rows:
            raise ValueError(f"{type(loss).__name__} has {len(args)} rows of point coefficients, student_hidden {rows}")
        if len(args) == rows > 1:
            part.__dict__[name] = Program(code, args[at])
    if "_split" in vars(loss):
        part.__dict__["_split"] = tuple(part_of(one, at, rows) for one in vars(loss)["_split"])
    return with_terms(part, lambda term: part_of(term, at, rows)) if hasattr(loss, "terms") else part


def with_terms(part: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of a sum, which is changed, with its terms changed."""
    part._uses  # noqa: B018  (prepares a sum again if an option of a term has changed)
    new = {id(term): change(term) for term in part.terms}
    part.__dict__["_modules"] = {**part._modules, "terms": nn.ModuleList(new[id(term)] for term in part.terms)}
    if "_others" in vars(part):  # of a MixedSumLoss
        first = vars(part)["_first"]
        part.__dict__["_first"] = None if first is None else change(first)
        part.__dict__["_others"] = [(weight, new[id(term)]) for weight, term in vars(part)["_others"]]
    return part
