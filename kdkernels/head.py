"""A head on its own: logits of a chunk of hidden states, and the way back through their soft-cap."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

QUANTISED = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


class Head(NamedTuple):
    """Makes logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap) of chunks of hidden states."""

    weight: Tensor  # (vocab, H)
    bias: Tensor | None
    quantum: Tensor | None  # () or (vocab, G)
    scale: float
    softcap: float | None
    scratch: int

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """hidden (n, H) -> out (n, vocab)."""
        size = len(self.weight) if self.quantum is None else fitting(self.weight.shape[1], hidden.dtype, self.scratch)
        for at in slices(len(self.weight), size):
            weight, to = self._dequantized(at, hidden.dtype), out[:, at]
            bias, beta = (to, 0.0) if self.bias is None else (self.bias[at], self.scale)
            torch.addmm(bias, hidden, weight.T, beta=beta, alpha=self.scale, out=to)
        return out if self.softcap is None else out.div_(self.softcap).tanh_().mul_(self.softcap)

    def uncap(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """From the gradient of the capped logits, which are lost, to that of the uncapped ones, in place."""
        if self.softcap is None:
            return gradient
        return torch.ops.aten.tanh_backward.grad_input(gradient, logits.div_(self.softcap), grad_input=gradient)

    def _dequantized(self, at: slice, dtype: torch.dtype) -> Tensor:
        weight = self.weight[at]
        if self.quantum is None:
            return weight
        unit = self.quantum[at] if self.quantum.dim() else self.quantum
        groups = weight.to(unit.dtype).view(len(weight), unit.shape[1] if unit.dim() else 1, -1)
        return groups.mul_(unit[..., None]).view(weight.shape).to(dtype)


def slices(count: int, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, count)) for i in range(0, count, size))


def fitting(width: int, dtype: torch.dtype, scratch: int) -> int:
    """Rows of a (., width) matrix that fit into `scratch` bytes."""
    return max(1, scratch // (width * dtype.itemsize))


def checked_scale(head: Any, scale: Any) -> Tensor | None:
    """The unit of a quantised teacher_head, () or (V, G); None of another."""
    quantised = isinstance(head, Tensor) and head.dtype in QUANTISED
    if scale is None or not quantised:
        if quantised or scale is not None:
            got = f"{getattr(head, 'dtype', type(head).__name__)} and {'no ' if scale is None else 'a '}scale"
            raise ValueError(f"teacher_head_scale belongs to a teacher_head in int8 or float8, got {got}")
        return None
    if not isinstance(scale, Tensor) or not scale.is_floating_point():
        raise TypeError(f"teacher_head_scale must be a floating-point tensor, got {getattr(scale, 'dtype', scale)!r}")
    if scale.device != head.device:
        raise ValueError(f"teacher_head_scale must be on teacher_head's device {head.device}, got {scale.device}")
    shaped = scale.reshape(()) if scale.numel() == 1 else scale[:, None] if scale.dim() == 1 else scale
    if shaped.dim() and (shaped.dim() != 2 or len(shaped) != len(head) or head.shape[-1] % max(shaped.shape[1], 1)):
        raise ValueError(f"teacher_head_scale must be a scalar, (V,) or (V, G) with G groups of columns of "
                         f"teacher_head {tuple(head.shape)}, got {tuple(scale.shape)}")  # fmt: skip
    return shaped.to(torch.promote_types(shaped.dtype, torch.float32))
