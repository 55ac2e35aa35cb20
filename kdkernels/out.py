"""Where `value_and_grad` may write its gradient to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from .base import BaseLoss


def check_out(loss: BaseLoss, out, accumulate: bool, student: Tensor, teacher: Tensor | None) -> None:
    """What value_and_grad asks for beside a call's."""
    if loss.reduction == "none":
        raise ValueError("value_and_grad needs a reduction other than 'none'")
    if loss.standardize:
        raise ValueError("value_and_grad needs standardize=False")
    if out is None:
        if accumulate:
            raise ValueError("accumulate=True needs out, the tensor that the gradient is added to")
        return
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor, got {type(out).__name__}")
    if out.shape != student.shape or out.dtype != student.dtype or out.device != student.device:
        raise ValueError(f"out must be like student_logits {tuple(student.shape)} {student.dtype} on {student.device}, "
                         f"got {tuple(out.shape)} {out.dtype} on {out.device}")  # fmt: skip
    if out.requires_grad and out.is_leaf:
        raise ValueError("out is a leaf that requires grad; pass out.detach()")
    for name, x in (("student_logits", student), ("teacher_logits", teacher)):
        if x is None or torch.compiler.is_compiling() or not _overlaps(out, x, accumulate):
            continue
        but = "" if accumulate else f"; only {name} itself may be out"
        raise ValueError(f"out shares memory with {name}, which is read meanwhile{but}")


def _overlaps(out: Tensor, x: Tensor, at_all: bool) -> bool:
    """Whether they share memory, `at_all` or not element by element."""
    if out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
        return False
    same = (out.data_ptr(), out.shape, out.stride()) == (x.data_ptr(), x.shape, x.stride())
    return (at_all or not (same and out.dtype == x.dtype)) and np.shares_memory(_footprint(out), _footprint(x))


def _footprint(x: Tensor) -> np.ndarray:
    """An array at x's addresses, on whatever device they are: numpy compares them and reads nothing."""
    strides = tuple(n * x.itemsize for n in x.stride())
    place = dict(data=(x.data_ptr(), True), shape=tuple(x.shape), strides=strides, typestr=f"|V{x.itemsize}", version=3)
    return np.asarray(SimpleNamespace(__array_interface__=place))


def handed_over(gradient: Tensor, out: Tensor | None, accumulate: bool) -> Tensor:
    """A gradient made elsewhere, in the tensor it was wanted in."""
    if out is None:
        return gradient
    return out.add_(gradient) if accumulate else out.copy_(gradient)
