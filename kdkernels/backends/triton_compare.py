"""Operators of the rank losses on Triton: shapes, scratch and launches. Formats: `kdkernels.rankops`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .. import rankops
from ..rankops import PEARSON, PLACKETT_LUCE, SPEARMAN
from . import triton as base
from .triton_orders import kendall_kernel, plackett_kernel
from .triton_pearson import pearson_kernel
from .triton_ranks import CELLS, spearman_kernel
from .triton_sorted import spearman_sorted_kernel, top_kernel
from .triton_uld import uld_kernel

SCRATCH = 1 << 29  # bytes, of all programs of a launch
SORTED = 4096  # live classes at most, of rows that are sorted
MOST = 1 << 20  # classes: sums of ranks are packed with counts
LEAST_TAU = 0.02  # of wide rows that are not sorted: cells are 1/2048 deviation there where most classes are
# Tiles, with so many warps without spills; the interpreter takes as long for a small tile as for a large one.
TILES = {"spearman": (512, 8), "spearman_sorted": (256, 8), "plackett": (256, 4), "kendall": (128, 2), "top": (512, 4),
         "uld": (512, 8)}  # fmt: skip
if base.INTERPRETED:
    TILES = dict.fromkeys(TILES, (1024, 8))


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


def _tile(name: str, width: int) -> dict:
    block, warps = TILES[name]
    return {"BLOCK": min(block, triton.next_power_of_2(width)), "num_warps": warps}


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
        top_kernel[(N,)](s, t, base._given(s, None, mask)[1], out, *strides, B, vocab, k, lowest,
                         mask is not None, **_tile("top", vocab))  # fmt: skip
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
    pointers = (s, t, *base._given(s, labels, mask),
                s if top is None else top, value if grad is None else grad)  # fmt: skip
    return Rows(pointers, (s_a, s_b, t_a, t_b), 0 if grad is None else grad.stride(0) * (len(grad) > 1),
                (B, N, vocab, own.shape[-1], ignore), (labels is not None, top is not None, mask is not None,
                                                       grad is not None), value, out, top)  # fmt: skip


def _gathered(name, kernel, x: Rows, room: int, longs: int, floats: int, ints: int, *more) -> Rows:
    """Launches a kernel whose programs have room for so many live classes of a row, in so many arrays."""
    device = x.value.device
    some = _programs(len(x.value), device, (8 * longs + 4 * floats + 4 * ints) * room)
    new = lambda count, dtype: torch.empty((some, count, room), dtype=dtype, device=device)  # noqa: E731
    scratch = new(longs, torch.int64), new(floats, torch.float32), new(ints, torch.int32)
    with base._launch(name, device):
        kernel[(some,)](*x.pointers, *scratch, x.value, x.out, *x.strides, x.grad_row, *x.shape, room, *more, *x.flags,
                        **_tile(name, room))  # fmt: skip
    return x


def _by_bits(s: Tensor, t: Tensor) -> bool:
    return s.element_size() == 2 and t.element_size() == 2


def counted(s: Tensor, t: Tensor, vocab: int, tau: float, k: float, exact: float) -> bool:
    """Whether Spearman's loss of these rows goes by histograms."""
    return min(vocab, int(k) or vocab) > SORTED and (_by_bits(s, t) or not (exact or tau < LEAST_TAU))


def _spearman(x: Rows, s: Tensor, t: Tensor, args: Tensor, room: int) -> Rows:
    tau = args[0, 2].item()
    if not counted(s, t, x.shape[2], *args[0, 2:5].tolist()):
        return _gathered("spearman_sorted", spearman_sorted_kernel, x, room, 3, 4, 3, tau, None)
    return by_histograms("spearman", x, s, t, tau)


def tile_of(by_bits: bool, also: bool) -> tuple[int, int, int]:
    """The widest tile of `spearman_kernel` that needs no more registers than there are; bins at a time, and warps."""
    bins, warps = TILES["spearman"]
    if by_bits:
        return 1024 if also else 2048, bins, warps
    return (256, bins // 2, warps // 2) if also else (512, bins, warps)


def by_histograms(name: str, x: Rows, s: Tensor, t: Tensor, tau: float, *also) -> Rows:
    """Spearman's loss; `also` is the kernel's. Wide rows of a loss near 0 or 2 are sorted by a second launch, which
    looks for them itself: the host does not wait."""
    cells, by_bits = CELLS.value, _by_bits(s, t)
    block, bins, warps = tile_of(by_bits, bool(also))
    block = min(block, triton.next_power_of_2(x.shape[2]))
    some = _programs(len(x.value), s.device, 44 * cells)
    new, shape = s.new_empty, (some, cells)
    scratch = (s.new_zeros((some, 2, cells), dtype=torch.int64), new(shape, dtype=torch.int64),
               new((some, 4, cells), dtype=torch.float32), new(shape, dtype=torch.int32))  # fmt: skip
    half = (s.dtype == torch.float16, t.dtype == torch.float16)
    near = None if by_bits else new(len(x.value), dtype=torch.int8)
    with base._launch(name, s.device):
        spearman_kernel[(some,)](*x.pointers, *scratch, x.value, x.out, *x.strides, x.grad_row, *x.shape, tau,
                                 by_bits, half, *x.flags, block, bins, near, *also, num_warps=warps)  # fmt: skip
    del scratch  # the next launch may take its memory
    return x if near is None else _gathered("spearman_sorted", spearman_sorted_kernel, x, x.shape[2], 3, 4, 3, tau,
                                            near)  # fmt: skip


def _pearson(x: Rows, s: Tensor, t: Tensor, args: Tensor, side: int) -> Rows:
    B, N, vocab, *rest = x.shape
    (s, t, label, masked, _top, g), there = x.pointers, base._there(args, s.device)
    has_label, _has_top, has_mask, gradient = x.flags
    block = min(2048, triton.next_power_of_2(vocab))
    with base._launch("pearson", s.device):
        pearson_kernel[(N,)](s, t, label, masked, g, there, x.value, x.out, *x.strides, x.grad_row,
                             args.shape[1] * (len(args) > 1), B, vocab, *rest, bool(args[0, 4]), side, has_label,
                             has_mask, gradient, block, num_warps=max(1, block // 256))  # fmt: skip
    return x


def _uld(grad, student, teacher, labels, mask, args, vocab, ignore, side) -> Rows:
    own, there = (teacher, student) if side else (student, teacher), base._there(args, student.device)
    x = _rows(grad, *own, labels, mask, vocab, ignore, 0, 0)
    stride = args.shape[1] * (len(args) > 1)
    return _gathered("uld", uld_kernel, x, vocab, 2, 2, 3, there, stride, side) if len(x.value) else x


def check_width(vocab: int) -> None:
    if vocab > MOST:
        raise ValueError(f"vocab_size must be <= {MOST} for a rank loss on backend 'triton', got {vocab}")


def _run(grad, student, teacher, labels, mask, args, kind, vocab, ignore, side) -> Rows:
    if kind == rankops.ULD:
        return _uld(grad, student, teacher, labels, mask, args, vocab, ignore, side)
    check_width(vocab)
    tau, k, switch = args[0, 2:5].tolist()
    x = _rows(grad, student, teacher, labels, mask, vocab, ignore, side, 0 if kind == PEARSON else int(k))
    room = min(vocab, int(k) or vocab)
    if not len(x.value):
        return x
    if kind == PEARSON:
        return _pearson(x, student, teacher, args, side)
    if kind == SPEARMAN:
        return _spearman(x, student, teacher, args, room)
    there, stride = base._there(args, student.device), args.shape[1] * (len(args) > 1)
    if kind == PLACKETT_LUCE:
        return _gathered("plackett", plackett_kernel, x, room, 2, 4, 2, there, stride, bool(switch))
    shifts = args.shape[1] - 5
    return _gathered("kendall", kendall_kernel, x, room, 1, 3, 1, tau, there[0, 5:], shifts, not shifts)


@torch.library.custom_op("kdkernels::triton_compare", mutates_args=())
def compare(student: Tensor, teacher: Tensor, labels: Tensor | None, mask: Tensor | None, args: Tensor, kind: int,
            vocab: int, ignore_index: int) -> Tensor:  # fmt: skip
    """The losses (N,) of the rows."""
    return _run(None, student, teacher, labels, mask, args, kind, vocab, ignore_index, 0).value


@torch.library.custom_op("kdkernels::triton_compare_step", mutates_args=())
def compare_step(grad: Tensor, student: Tensor, teacher: Tensor, labels: Tensor | None, mask: Tensor | None,
                 args: Tensor, kind: int, vocab: int, ignore_index: int,
                 side: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The losses, and grad times the gradient of the side's logits."""
    x = _run(grad, student, teacher, labels, mask, args, kind, vocab, ignore_index, side)
    return x.value, x.out.to((teacher if side else student).dtype)


rankops.register("triton_")


ULD = (compare, compare_step)


def COMPARE(*_loss):
    return ULD
