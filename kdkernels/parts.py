"""A loss as a sweep over chunks of rows needs it: with another reduction, of some of the rows."""

from __future__ import annotations

import copy
from typing import Any

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
    return part
