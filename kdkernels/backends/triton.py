"""Triton backend: any GPU that Triton compiles for, and its interpreter on CPU tensors (TRITON_INTERPRET=1).

    reduce  one program a row: reads s and t once (2 w bytes a class at w bytes a logit), writes 56 (K + 1) bytes a row
    rows    32 rows a program: nothing a class; 56 (K + 1) + 80 (K + 1) sides bytes and the tape's registers a row
    spread  one program a row and tile: reads s and t, writes one gradient (3 w bytes a class)

Elements are float32, relative to their tile's or row's maximum; everything kept for a row is float64. Tile sizes depend
on the width and dtype only, and nothing is summed atomically: a call repeats to the bit. Formats: `kdkernels.ops`.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os

import numpy as np
import torch
import triton
from torch import Tensor

from ..elements import HEADER
from ..ops import COEFS, STATS, Operators, register, rows_of_sums
from . import calls
from .triton_elements import reduce_kernel, spread_kernel
from .triton_rows import rows_kernel
from .triton_separable import compiled, sums_kernel

INTERPRETED: bool = os.environ.get("TRITON_INTERPRET", "0") == "1"
DEVICES = ("cuda", "xpu", "cpu") if INTERPRETED else ("cuda", "xpu")
FLOAT64 = False
MAX_BLOCK, ROWS = 2048, 32


def unavailable() -> str | None:
    """Why this backend cannot run here, or None."""
    if INTERPRETED or torch.cuda.is_available() or torch.xpu.is_available():
        return None
    return "no GPU, and TRITON_INTERPRET=1 was not set when kdkernels was imported"


@functools.lru_cache(maxsize=256)
def _on_device(code: bytes, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(code), dtype=torch.float64).to(device)


def _there(numbers: Tensor, device: torch.device) -> Tensor:
    """A program or arguments on the device. The host's are the same call after call: copied once, for a copy waits."""
    if numbers.device.type == device.type:
        return numbers.contiguous()
    return _on_device(numbers.numpy().tobytes(), device).view(numbers.shape)


@contextlib.contextmanager
def _launch(name: str, device: torch.device):
    calls["triton", name] += 1
    there = contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
    with there, np.errstate(all="ignore"):  # the interpreter computes with numpy, inf and NaN included
        yield


def _rows(x: Tensor | None, other: Tensor):
    """A tensor and its leading strides, 0 where there is one row only: what a kernel is compiled for varies less."""
    x = other if x is None else x
    outer = x.stride(0) if x.dim() == 3 and x.shape[0] > 1 else 0
    return x, outer, x.stride(-2) if x.shape[-2] > 1 else 0


def _config(width: int, *multiples: int) -> dict:
    """Tile and warps from the width alone; ALIGN promises that masks are constant over 16 classes (wide loads)."""
    block = min(MAX_BLOCK, triton.next_power_of_2(width))
    return {"ALIGN": math.gcd(16, width, *multiples), "BLOCK": block, "num_warps": max(1, block // 256)}


@torch.library.custom_op("kdkernels::triton_reduce", mutates_args=())
def reduce(student: Tensor, teacher: Tensor | None, labels: Tensor | None, mask: Tensor | None, args: Tensor,
           program: Tensor, vocab: int, ignore_index: int) -> Tensor:  # fmt: skip
    """Statistics (N, K + 1, 7) of student (A, B, W) and teacher (A, B, W2); NaN where a row holds NaN or +inf."""
    (s, s_a, s_b), (t, t_a, t_b) = _rows(student, student), _rows(teacher, student)
    B, K, N = s.shape[-2], int(program[0]), s.shape[:-1].numel()
    stats = student.new_zeros((N, K + 1, STATS), dtype=torch.float64)
    second = any(int(flags) & 32 for flags in program[4 : 4 + K])
    args = _there(args, s.device)
    if N:
        with _launch("reduce", s.device):
            reduce_kernel[(N,)](
                s, t, s if labels is None else labels.contiguous(), s if mask is None else mask.view(torch.uint8), args,
                _there(program, s.device), stats, s_a, s_b, t_a, t_b, args.shape[1] * (len(args) > 1), B, vocab,
                ignore_index, K, triton.next_power_of_2(max(K, 1)), teacher is not None, labels is not None,
                mask is not None, second, **_config(vocab),
            )  # fmt: skip
    return stats


@torch.library.custom_op("kdkernels::triton_rows", mutates_args=())
def rows(stats: Tensor, args: Tensor, program: Tensor, sides: int) -> tuple[Tensor, Tensor]:
    """value (N,) and coef (sides, N, K + 1, 10) of the rows' statistics."""
    N, (K, R, _, out) = len(stats), map(int, program[:4])
    value, coef = stats.new_zeros(N), stats.new_zeros((sides, N, K + 1, COEFS))
    args = _there(args, stats.device)
    tape = stats.new_zeros((2, 6 * K + 4 + R, N))
    if N:
        with _launch("rows", stats.device):
            rows_kernel[(triton.cdiv(N, ROWS),)](
                stats.contiguous(), args, _there(program, stats.device), tape, value, coef,
                args.shape[1] * (len(args) > 1), N, K, R, out, sides, ROWS, num_warps=1,
            )  # fmt: skip
    return value, coef


@torch.library.custom_op("kdkernels::triton_spread", mutates_args=())
def spread(grad: Tensor, student: Tensor, teacher: Tensor | None, labels: Tensor | None, mask: Tensor | None,
           coef: Tensor, vocab: int, ignore_index: int, side: int) -> Tensor:  # fmt: skip
    """The gradient of the student's (side 0) or the teacher's (side 1) logits, contiguous, in their dtype."""
    return _spread(grad, student, teacher, labels, mask, coef, vocab, side, None)


def _spread(grad, student, teacher, labels, mask, coef, vocab, side, elements):
    (s, s_a, s_b), (t, t_a, t_b) = _rows(student, student), _rows(teacher, student)
    own = t if side else s
    # The interpreter truncates when it stores bfloat16, where hardware rounds.
    out = torch.empty(own.shape, dtype=torch.float32 if INTERPRETED else own.dtype, device=s.device)
    B, W, N, config, K = *out.shape[-2:], out.shape[:-1].numel(), _config(out.shape[-1], vocab), coef.shape[1] - 1
    if out.numel():
        phi, constants = (None, coef) if elements is None else _phi(elements, s.device)
        with _launch("spread", s.device):
            spread_kernel[(N, triton.cdiv(W, config["BLOCK"]))](
                grad, s, t, s if labels is None else labels.contiguous(), s if mask is None else mask.view(torch.uint8),
                coef.contiguous(), constants, out, s_a, s_b, t_a, t_b, B, vocab, W, grad.stride(0) * (len(grad) > 1), K,
                teacher is not None, labels is not None, mask is not None, phi, side if phi else 0, **config,
            )  # fmt: skip
    return out.to(own.dtype)


def _phi(elements: Tensor, device: torch.device):
    """The Triton function of a separable loss, and its constants on the device."""
    numbers = elements.tolist()
    constants = elements[HEADER : HEADER + int(numbers[3])].contiguous()
    return compiled(numbers), _there(constants, device)


@torch.library.custom_op("kdkernels::triton_separable_reduce", mutates_args=())
def separable_reduce(student: Tensor, teacher: Tensor, labels: Tensor | None, mask: Tensor | None, args: Tensor,
                     program: Tensor, vocab: int, ignore_index: int) -> Tensor:  # fmt: skip
    """Statistics (N, K + 1, 7), the sums over the classes in the place of the last point."""
    (s, s_a, s_b), (t, t_a, t_b) = _rows(student, student), _rows(teacher, student)
    B, K, N = s.shape[-2], int(program[0]) - 1, s.shape[:-1].numel()
    head = torch.cat((program.new_tensor([K, 0, 0, 0]), program[4 : 4 + K]))
    args = _there(args, s.device)
    stats = reduce(student, teacher, labels, mask, args[:, : 3 + 2 * K].contiguous(), head, vocab, ignore_index)
    sums = stats.new_zeros((N, STATS + 1))
    if N:
        phi, constants = _phi(_elements(program), s.device)
        with _launch("sums", s.device):
            sums_kernel[(N,)](
                s, t, s if mask is None else mask.view(torch.uint8), args, stats, constants, sums, s_a, s_b, t_a, t_b,
                args.shape[1] * (len(args) > 1), B, vocab, K, phi, mask is not None, **_config(min(vocab, 1024), vocab),
            )  # fmt: skip
    last = torch.cat((stats[:, -1, : STATS - 1], sums[:, STATS:]), 1)
    return torch.cat((stats[:, :-1], sums[:, None, :STATS], last[:, None]), 1)


@torch.library.custom_op("kdkernels::triton_separable_spread", mutates_args=())
def separable_spread(grad: Tensor, student: Tensor, teacher: Tensor, labels: Tensor | None, mask: Tensor | None,
                     coef: Tensor, program: Tensor, vocab: int, ignore_index: int, side: int) -> Tensor:  # fmt: skip
    """`spread` of a separable loss."""
    return _spread(grad, student, teacher, labels, mask, coef, vocab, side, _elements(program))


def _elements(program: Tensor) -> Tensor:
    return program[4 + int(program[0]) + 5 * int(program[1]) :]


register("triton_")
register("triton_separable_", elements=True)
OPERATORS = Operators(reduce, rows, spread)
SEPARABLE = Operators(separable_reduce, rows_of_sums(rows), separable_spread, elements=True)

from . import triton_compare  # noqa: E402  (which is made of the above)

COMPARE = triton_compare.COMPARE
