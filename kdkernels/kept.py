"""Memory on a CPU that serves one call after the other.

What is freed goes back to the system, which hands out new pages a fault at a time: for a head's gradient that takes as
long as reading a head.
"""

from __future__ import annotations

import ctypes
import math
import weakref

import torch
from torch import Tensor


class Kept:
    """Free memory, at most one piece for each purpose. Threads may share it; a copy of it is empty."""

    def __init__(self) -> None:
        self.free: dict[str, Tensor] = {}

    def empty(self, purpose: str, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor on like's device. Its memory comes back here when the last tensor on it is gone,
        whosever that is."""
        count = math.prod(shape)
        memory = self.free.pop(purpose, None) if like.is_cpu else None
        if memory is None or memory.nbytes < count * dtype.itemsize:
            memory = like.new_empty(count, dtype=dtype)
        if type(memory) is not Tensor or not memory.is_cpu or not count:
            return memory.view(shape)
        lent = (ctypes.c_char * (count * dtype.itemsize)).from_address(memory.data_ptr())
        weakref.finalize(lent, self.free.__setitem__, purpose, memory).atexit = False
        return torch.frombuffer(lent, dtype=dtype).view(shape)

    def __reduce__(self):
        return Kept, ()
