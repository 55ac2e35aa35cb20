"""A head on its own: logits of a chunk of hidden states, and the way back through their soft-cap."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


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
