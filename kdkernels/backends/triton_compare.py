"""Operators of the rank losses on Triton: shapes, scratch and launches. Formats: `kdkernels.rankops`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import triton as base
from .triton_ranks import CELLS, spearman_kernel

SCRATCH = 1 << 29  # bytes, of all programs of a launch


def programs(device: torch.device, rows: int, bytes_each: int) -> int:
    """How many programs share the rows: what the device holds at once, and the scratch allows."""
    held = 2 if device.type == "cpu" else 2 * torch.get_device_module(device).get_device_properties(device).multi_processor_count
    return max(1, min(rows, held, SCRATCH // bytes_each))


def spearman(grad, student, teacher, labels, mask, top, tau, vocab, ignore):
    """value (N,) and, where grad is a tensor, the gradient."""
    (s, s_a, s_b), (t, t_a, t_b) = base._rows(student, student), base._rows(teacher, student)
    N, cells = s.shape[:-1].numel(), CELLS.value
    value = s.new_empty(N, dtype=torch.float64)
    out = torch.empty(s.shape, dtype=torch.float32 if base.INTERPRETED else s.dtype, device=s.device)
    if not N:
        return value, out
    by_bits = s.element_size() == 2 and t.element_size() == 2
    some = programs(s.device, N, 44 * cells)
    tables = s.new_zeros((some, 2, cells), dtype=torch.int64)
    packed, floats = s.new_empty((some, cells), dtype=torch.int64), s.new_empty((some, 4, cells), dtype=torch.float32)
    places = s.new_empty((some, cells), dtype=torch.int32)
    with base._launch("spearman", s.device):
        spearman_kernel[(some,)](
            s, t, s if labels is None else labels.contiguous(), s if mask is None else mask.view(torch.uint8),
            s if top is None else top, value if grad is None else grad, tables, packed, floats, places, value, out, s_a,
            s_b, t_a, t_b, 0 if grad is None else grad.stride(0) * (len(grad) > 1), s.shape[-2], N, vocab, s.shape[-1],
            ignore, tau, by_bits, (s.dtype == torch.float16, t.dtype == torch.float16), labels is not None,
            top is not None, mask is not None, grad is not None, min(2048, triton.next_power_of_2(vocab)), 1024,
            num_warps=8,
        )  # fmt: skip
    return value, out.to(s.dtype)
