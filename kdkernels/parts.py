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
        vars(part)["reduction"] = reduction
        if "_cross_entropy" in vars(loss):
            vars(part)["_cross_entropy"] = reducing(vars(loss)["_cross_entropy"], reduction)
    else:
        part.reduction = reduction
    if "_split" in vars(part):  # of a SparseTeacher's loss
        vars(part)["_split"] = tuple(reducing(one, reduction) for one in vars(part)["_split"])
    return part


def fixed(loss: Any) -> Any:
    """A copy for all of a call: later options do not reach it, and what it draws at random is drawn."""
    part = copy.copy(loss)
    part._draw()
    if "_split" in vars(loss):
        vars(part)["_split"] = tuple(fixed(one) for one in vars(loss)["_split"])
    return with_terms(part, fixed) if hasattr(loss, "terms") else part


def part_of(loss: Any, at: slice, rows: int) -> Any:
    """The loss of some of the rows; its points may have coefficients of each."""
    part = copy.copy(loss)
    for name in ("_single", "_double"):
        code, args = vars(loss).get(name, (None, ()))
        if 1 < len(args) != rows:
            raise ValueError(f"{type(loss).__name__} has {len(args)} rows of point coefficients, student_hidden {rows}")
        if len(args) == rows > 1:
            vars(part)[name] = Program(code, args[at])
    if "_split" in vars(loss):
        vars(part)["_split"] = tuple(part_of(one, at, rows) for one in vars(loss)["_split"])
    return with_terms(part, lambda term: part_of(term, at, rows)) if hasattr(loss, "terms") else part


def with_terms(part: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of a sum, which is changed, with its terms changed."""
    part._uses  # noqa: B018  (prepares a sum again if an option of a term has changed)
    new = {id(term): change(term) for term in part.terms}
    vars(part)["_modules"] = {**part._modules, "terms": nn.ModuleList(new[id(term)] for term in part.terms)}
    if "_others" in vars(part):  # of a MixedSumLoss
        first = vars(part)["_first"]
        vars(part)["_first"] = None if first is None else change(first)
        vars(part)["_others"] = [(weight, new[id(term)]) for weight, term in vars(part)["_others"]]
    return part
