"""Operators of the rank losses on Triton: shapes, scratch and launches. Formats: `kdkernels.rankops`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import triton as base
from .triton_pearson import pearson_kernel
from .triton_ranks import CELLS, spearman_kernel
from .triton_sorted import spearman_sorted_kernel, top_kernel

SCRATCH = 1 << 29  # bytes, of all programs of a launch
SORTED = 4096  # live classes at most, of rows that are sorted
MOST = 1 << 20  # classes: sums of ranks are packed with counts
LEAST_TAU = 0.02  # of wide rows that are not sorted: cells are 1/4096 deviation and more
# Tiles of sorts and of scans; the interpreter takes as long for a small one as for a large one.
SORT, BINS = (1024, 1024) if base.INTERPRETED else (256, 512)


class Rows(NamedTuple):
    """What kernels are told of a call: pointers, strides and flags in the order of their arguments."""

    pointers: tuple
    strides: tuple
    grad_row: int
    shape: tuple  # B, N, vocab, width, ignore
    flags: tuple
    value: Tensor
    out: Tensor
    top: Tensor | None


def _programs(rows: int, device: torch.device, bytes_each: int) -> int:
    """How many programs share the rows: what the device holds at once and the scratch allows."""
    held = 2
    if device.type != "cpu":
        held *= torch.get_device_module(device).get_device_properties(device).multi_processor_count
    return max(1, min(rows, held, SCRATCH // bytes_each))


def _top(s, t, mask, strides, B, N, vocab, k):
    """(N, 2) of `top_kernel`."""
    out = torch.empty((N, 2), dtype=torch.int64, device=s.device)
    lowest = {torch.bfloat16: 16, torch.float16: 12}.get(t.dtype, 0)
    with base._launch("top", s.device):
        top_kernel[(N,)](s, t, s if mask is None else mask.view(torch.uint8), out, *strides, B, vocab, k, lowest,
                         mask is not None, min(2 * SORT, triton.next_power_of_2(vocab)), num_warps=8)  # fmt: skip
    return out


def _rows(grad, student, teacher, labels, mask, vocab, ignore, side, k) -> Rows:
    (s, s_a, s_b), (t, t_a, t_b) = base._rows(student, student), base._rows(teacher, student)
    own, B, N = t if side else s, s.shape[-2], s.shape[:-1].numel()
    value = s.new_empty(N, dtype=torch.float64)
    # The interpreter truncates when it stores bfloat16, where hardware rounds.
    shape = own.shape if grad is not None else (0,)
    out = torch.empty(shape, dtype=torch.float32 if base.INTERPRETED else own.dtype, device=s.device)
    top = None
    if 0 < k < vocab and N:
        top = _top(s, t, mask, (s_a, s_b, t_a, t_b), B, N, vocab, k)
    pointers = (s, t, s if labels is None else labels.contiguous(), s if mask is None else mask.view(torch.uint8),
                s if top is None else top, value if grad is None else grad)  # fmt: skip
    return Rows(pointers, (s_a, s_b, t_a, t_b), 0 if grad is None else grad.stride(0) * (len(grad) > 1),
                (B, N, vocab, own.shape[-1], ignore), (labels is not None, top is not None, mask is not None,
                                                       grad is not None), value, out, top)  # fmt: skip


def spearman(grad, student, teacher, labels, mask, args, vocab, ignore, side):
    tau, k, exact = args[0, 2:5].tolist()
    room = min(vocab, int(k) or vocab)
    x = _rows(grad, student, teacher, labels, mask, vocab, ignore, side, int(k))
    by_bits = student.element_size() == 2 and teacher.element_size() == 2
    N, device, empty = len(x.value), student.device, student.new_empty
    if not N:
        return x
    if room <= SORTED or (not by_bits and (exact or tau < LEAST_TAU)):
        some, block = _programs(N, device, 52 * room), min(SORT, triton.next_power_of_2(room))
        scratch = (empty((some, 3, room), dtype=torch.int64), empty((some, 4, room), dtype=torch.float32),
                   empty((some, 3, room), dtype=torch.int32))  # fmt: skip
        with base._launch("spearman_sorted", device):
            spearman_sorted_kernel[(some,)](*x.pointers, *scratch, x.value, x.out, *x.strides, x.grad_row, *x.shape,
                                            room, tau, *x.flags, block, num_warps=8)  # fmt: skip
        return x
    cells = CELLS.value
    some, block = _programs(N, device, 44 * cells), min(2048, triton.next_power_of_2(vocab))
    scratch = (student.new_zeros((some, 2, cells), dtype=torch.int64), empty((some, cells), dtype=torch.int64),
               empty((some, 4, cells), dtype=torch.float32), empty((some, cells), dtype=torch.int32))  # fmt: skip
    half = (student.dtype == torch.float16, teacher.dtype == torch.float16)
    with base._launch("spearman", device):
        spearman_kernel[(some,)](*x.pointers, *scratch, x.value, x.out, *x.strides, x.grad_row, *x.shape, tau, by_bits,
                                 half, *x.flags, block, BINS, num_warps=8)  # fmt: skip
    return x


def pearson(grad, student, teacher, labels, mask, args, vocab, ignore, side):
    x = _rows(grad, student, teacher, labels, mask, vocab, ignore, side, 0)
    probs, (B, N, *rest) = bool(args[0, 4]), x.shape
    there, block = base._there(args, student.device), min(2048, triton.next_power_of_2(vocab))
    if N:
        s, t, label, masked, _top, g = x.pointers
        with base._launch("pearson", student.device):
            pearson_kernel[(N,)](s, t, label, masked, g, there, x.value, x.out, *x.strides, x.grad_row,
                                 args.shape[1] * (len(args) > 1), B, *rest, probs, side, labels is not None,
                                 mask is not None, grad is not None, block, num_warps=max(1, block // 256))  # fmt: skip
    return x
