"""LinearLoss under torch.compile: an operator that a graph holds as one call, and runs as it is.

Traced through, the sweep's chunks would be unrolled and their memory left to the compiler. A graph holds tensors and
numbers only, so it names the module by a string.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .call import result_dtype
from .sweep import Inputs, sweep

SCHEMA = ("(str name, SymInt vocab, ScalarType? cast, bool[] wants, Tensor student_hidden, Tensor student_head, "
          "Tensor? student_bias, Tensor? teacher_hidden, Tensor? teacher_head, Tensor? teacher_bias, "
          "Tensor? teacher_head_scale, Tensor? teacher_logits, Tensor? labels, Tensor factor, Tensor? temperature, "
          "Tensor? mask) -> (Tensor, Tensor, Tensor, Tensor)")  # fmt: skip
_modules: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_names = itertools.count()


def named(module) -> str:
    """A name for a new LinearLoss, by which the operator finds it."""
    name = str(next(_names))
    _modules[name] = module
    return name


def value_of(module, x: Inputs, vocab: int, cast: torch.dtype | None) -> Tensor:
    """The reduced loss of checked inputs, differentiable by hidden states, head and bias."""
    wants = [y is not None and y.requires_grad and torch.is_grad_enabled() for y in x[:3]]
    return _Rows.apply(module._name, vocab, cast, wants, *x)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name, vocab, cast, wants, *x):
        value, *gradients = torch.ops.kdkernels.linear(name, vocab, cast, wants, *x)
        ctx.wants, ctx.dtypes = wants, [None if y is None else y.dtype for y in x[:3]]
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    def backward(ctx, grad):
        found = zip(ctx.saved_tensors, ctx.dtypes, ctx.wants, strict=True)
        slopes = [(g * grad).to(dtype) if wanted else None for g, dtype, wanted in found]
        return *(None,) * 4, *slopes, *(None,) * (len(Inputs._fields) - 3)


torch.library.define("kdkernels::linear", SCHEMA)


@torch.library.impl("kdkernels::linear", "CompositeExplicitAutograd")
@torch.compiler.disable
def _linear(name, vocab, cast, wants, *tensors):
    x, plan = Inputs(*tensors), _modules[name]._plan
    # A compiled graph hides autograd, which some losses need inside; outside of inference mode it is there.
    with torch.inference_mode(False) if any(wants) else contextlib.nullcontext():
        value, grads = sweep(plan(x, vocab, cast), x, x.factor, tuple(wants))
    return value, *_or_empty((None if g is None else g.to(_sum_dtype(k, g)) for k, g in enumerate(grads)), x)


@torch.library.register_fake("kdkernels::linear")
def _(name, vocab, cast, wants, *tensors):
    x = Inputs(*tensors)
    value = x.student_hidden.new_empty((), dtype=result_dtype(x.student_hidden))
    sides = enumerate(zip(x[:3], wants, strict=True))
    return value, *_or_empty((torch.empty_like(y, dtype=_sum_dtype(k, y)) if on else None for k, (y, on) in sides), x)


def _sum_dtype(side: int, like: Tensor) -> torch.dtype:
    """Of a gradient on its way: that of a sum over chunks, however many there are."""
    return torch.promote_types(like.dtype, torch.float32) if side else like.dtype


def _or_empty(found: Iterable, x: Inputs) -> list[Tensor]:
    """The gradients, and a tensor of nothing for none."""
    return [x.student_hidden.new_empty(0) if g is None else g for g in found]
