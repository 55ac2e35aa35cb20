"""What torch's CPU allocator is asked for while a function runs."""

from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


class Allocations(NamedTuple):
    largest: int  # bytes
    peak: int  # most bytes held at a time, beyond those at the start


def allocations(function) -> Allocations:
    """Of every tensor and scratch buffer there is, those inside operators too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = largest = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        largest, peak = max(largest, event.nbytes()), max(peak, held)
    return Allocations(largest, peak)


class Widest(TorchDispatchMode):
    """The most elements of any tensor that an operator takes or gives."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves((args, kwargs, out)):
            self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out
