"""Triton backend: any GPU that Triton compiles for, and its interpreter on CPU tensors (TRITON_INTERPRET=1).

    reduce  one program a row: reads s and t once (2 w bytes a class at w bytes a logit), writes 56 (K + 1) bytes a row
    rows    32 rows a program: nothing a class; 56 (K + 1) + 80 (K + 1) sides bytes a row
    spread  one program a row and tile: reads s and t, writes one gradient (3 w bytes a class)
    step    the three in one launch, and one before and one after it (triton_step.py)

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
from ..ops import COEFS, STATS, Operators, points_of, register, rows_of_sums
from . import calls
from .triton_elements import reduce_kernel
from .triton_rows import rows_kernel
from .triton_separable import compiled, sums_kernel
from .triton_slopes import spread_kernel
from .triton_step import begin_kernel, rescale_kernel, step_kernel
from .triton_tape import compiled as tape

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


def _given(s: Tensor, labels: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Labels and mask, or any pointer in the place of one that is not there and not read."""
    return s if labels is None else labels.contiguous(), s if mask is None else mask.view(torch.uint8)


def _config(width: int, *multiples: int, each: int = 256) -> dict:
    """Tile and warps, one for `each` of its classes, from the width alone; ALIGN promises that masks are constant over
    16 classes (wide loads)."""
    block = min(MAX_BLOCK, triton.next_power_of_2(width))
    return {"ALIGN": math.gcd(16, width, *multiples), "BLOCK": block, "num_warps": max(1, block // each)}


@torch.library.custom_op("kdkernels::triton_reduce", mutates_args=())
def reduce(student: Tensor, teacher: Tensor | None, labels: Tensor | None, mask: Tensor | None, args: Tensor,
           program: Tensor, vocab: int, ignore_index: int) -> Tensor:  # fmt: skip
    """Statistics (N, K + 1, 7) of student (A, B, W) and teacher (A, B, W2); NaN where a row holds NaN or +inf."""
    (s, s_a, s_b), (t, t_a, t_b) = _rows(student, student), _rows(teacher, student)
    B, K, N = s.shape[-2], int(program[0]), s.shape[:-1].numel()
    stats = student.new_zeros((N, K + 1, STATS), dtype=torch.float64)
    args = _there(args, s.device)
    if N:
        with _launch("reduce", s.device):
            reduce_kernel[(N,)](
                s, t, *_given(s, labels, mask), args, _there(program, s.device), stats, s_a, s_b, t_a, t_b,
                args.shape[1] * (len(args) > 1), B, vocab, ignore_index, K, triton.next_power_of_2(max(K, 1)),
                teacher is not None, labels is not None, mask is not None, _second(program), **_config(vocab),
            )  # fmt: skip
    return stats


@torch.library.custom_op("kdkernels::triton_rows", mutates_args=())
def rows(stats: Tensor, args: Tensor, program: Tensor, sides: int) -> tuple[Tensor, Tensor]:
    """value (N,) and coef (sides, N, K + 1, 10) of the rows' statistics."""
    N, K = len(stats), int(program[0])
    value, coef = stats.new_zeros(N), stats.new_zeros((sides, N, K + 1, COEFS))
    args = _there(args, stats.device)
    if N:
        with _launch("rows", stats.device):
            rows_kernel[(triton.cdiv(N, ROWS),)](
                stats.contiguous(), args, _there(program, stats.device), value, coef, args.shape[1] * (len(args) > 1),
                N, tape(program.numpy().tobytes()), K, sides, ROWS, num_warps=1,
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
                grad, s, t, *_given(s, labels, mask), coef.contiguous(), constants, out, s_a, s_b, t_a, t_b, B, vocab,
                W, grad.stride(0) * (len(grad) > 1), K, teacher is not None, labels is not None, mask is not None, phi,
                side if phi else 0, **config,
            )  # fmt: skip
    return out.to(own.dtype)


@torch.library.custom_op("kdkernels::triton_step", mutates_args=())
def step(student: Tensor, teacher: Tensor | None, labels: Tensor | None, mask: Tensor | None, args: Tensor,
         program: Tensor, weight: Tensor | None, divisor: float, vocab: int,
         ignore_index: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sum of weight / divisor * value of all rows, and its gradient by the student's logits."""
    out = torch.empty(student.shape, dtype=torch.float32 if INTERPRETED else student.dtype, device=student.device)
    total = _step(student, teacher, labels, mask, args, program, weight, divisor, vocab, ignore_index, out, False)
    return total, out.to(student.dtype)


@torch.library.custom_op("kdkernels::triton_step_out", mutates_args=("out",))
def step_out(student: Tensor, teacher: Tensor | None, labels: Tensor | None, mask: Tensor | None, args: Tensor,
             program: Tensor, weight: Tensor | None, divisor: float, vocab: int, ignore_index: int, out: Tensor,
             accumulate: bool) -> Tensor:  # fmt: skip
    """The same; the gradient goes to out, which may be the student's logits, or is added to it."""
    to = out.float() if INTERPRETED else out
    total = _step(student, teacher, labels, mask, args, program, weight, divisor, vocab, ignore_index, to, accumulate)
    if to is not out:
        out.copy_(to)
    return total


def _step(student, teacher, labels, mask, args, program, weight, divisor, vocab, ignore, out, accumulate):
    (s, s_a, s_b), (t, t_a, t_b) = _rows(student, student), _rows(teacher, student)
    (B, W), K, N, new = s.shape[-2:], int(program[0]), s.shape[:-1].numel(), s.new_empty
    double, args, config = torch.float64, _there(args, s.device), _config(W, vocab)
    over, values, done = new((), dtype=double), new(N, dtype=double), new((), dtype=torch.int32)
    by_row = int(weight is not None and len(weight) > 1)
    stats, coef = new((N, K + 1, STATS), dtype=double), new((N, K + 1, COEFS), dtype=double)
    total, high = new((), dtype=torch.float32), np.float32(divisor).item()
    y, masked = _given(s, labels, mask)
    with _launch("begin", s.device):
        begin_kernel[(1,)](y, over, done, total, N, ignore, high, divisor - high, labels is not None, 1024)
    if N:
        with _launch("step", s.device):
            step_kernel[(N,)](
                s, t, y, masked, args, _there(program, s.device),
                over if weight is None else weight.contiguous(), over, done, stats, coef, values, total, out, s_a, s_b,
                t_a, t_b, args.shape[1] * (len(args) > 1), B, vocab, W, ignore, by_row, N,
                tape(program.numpy().tobytes()), K, triton.next_power_of_2(max(K, 1)), teacher is not None,
                labels is not None, mask is not None, weight is not None, _second(program), accumulate, **config,
            )  # fmt: skip
    return total


def _step_add(*inputs):
    return step_out(*inputs, True)


def _step_to(*inputs):
    return step_out(*inputs, False)


def _rescaled(gradient: Tensor, grad: Tensor) -> Tensor:
    """grad * gradient, in place, without waiting for grad: the kernel leaves at once where it is 1."""
    x = gradient.float() if INTERPRETED else gradient
    if count := x.numel():
        with _launch("rescale", x.device):
            rescale_kernel[(triton.cdiv(count, MAX_BLOCK),)](x, grad, count, MAX_BLOCK, num_warps=8)
    return x if x is gradient else gradient.copy_(x)


def _each_of_sums(device: torch.device) -> int:
    """Classes of a warp: ptxas spills some registers at 256 for Ampere, and at 128 for Hopper."""
    return 128 if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 9 else 256


def _second(program: Tensor) -> bool:
    return any(int(flags) & 32 for flags in program[4 : 4 + int(program[0])])


def _phi(elements: Tensor, device: torch.device):
    """The Triton function of a separable loss, and its constants on the device."""
    numbers = elements.tolist()
    constants = elements[HEADER : HEADER + int(numbers[3])].contiguous()
    return compiled(numbers), _there(constants, device)


@torch.library.custom_op("kdkernels::triton_separable_reduce", mutates_args=())
def separable_reduce(student: Tensor, teacher: Tensor, labels: Tensor | None, mask: Tensor | None, args: Tensor,
                     program: Tensor, vocab: int, ignore_index: int) -> Tensor:  # fmt: skip
    """Statistics (N, K + 1, 7), the sums over the classes in the place of the last point."""
    head, less = points_of(program, args)
    stats = reduce(student, teacher, labels, mask, less, head, vocab, ignore_index)
    sums = _sums(student, teacher, mask, args, program, stats, vocab, True)
    last = torch.cat((stats[:, -1, : STATS - 1], sums[:, STATS:]), 1)
    return torch.cat((stats[:, :-1], sums[:, None, :STATS], last[:, None]), 1)


def _sums(student, teacher, mask, args, program, stats, vocab, whole):
    (s, s_a, s_b), (t, t_a, t_b) = _rows(student, student), _rows(teacher, student)
    B, K, N = s.shape[-2], int(program[0]) - 1, s.shape[:-1].numel()
    args, sums = _there(args, s.device), stats.new_zeros((N, STATS + 1))
    if N:
        phi, constants = _phi(_elements(program), s.device)
        with _launch("sums", s.device):
            sums_kernel[(N,)](
                s, t, _given(s, None, mask)[1], args, stats, constants, sums, s_a, s_b, t_a, t_b,
                args.shape[1] * (len(args) > 1), B, vocab, K, phi, whole, mask is not None,
                **_config(min(vocab, 1024), vocab, each=_each_of_sums(s.device)),
            )  # fmt: skip
    return sums


def separable_sums(student, teacher, labels, mask, args, program, stats, vocab, ignore_index):
    """(N, 7) sums over these classes, from the statistics of the whole rows (`kdkernels.ops.with_sums`)."""
    return _sums(student, teacher, mask, args, program, stats.contiguous(), vocab, False)[:, :STATS]


@torch.library.custom_op("kdkernels::triton_separable_spread", mutates_args=())
def separable_spread(grad: Tensor, student: Tensor, teacher: Tensor, labels: Tensor | None, mask: Tensor | None,
                     coef: Tensor, program: Tensor, vocab: int, ignore_index: int, side: int) -> Tensor:  # fmt: skip
    """`spread` of a separable loss."""
    return _spread(grad, student, teacher, labels, mask, coef, vocab, side, _elements(program))


def _elements(program: Tensor) -> Tensor:
    return program[4 + int(program[0]) + 5 * int(program[1]) :]


register("triton_")
register("triton_separable_", elements=True)
OPERATORS = Operators(reduce, rows, spread, step, _step_to, _step_add, _rescaled)
SEPARABLE = Operators(separable_reduce, rows_of_sums(rows), separable_spread, elements=(reduce, separable_sums))

from . import triton_buckets, triton_compare, triton_groups, triton_together  # noqa: E402  (which are made of the above)

BUCKET: tuple = triton_buckets.BUCKET
COMPARE, TOGETHER = triton_compare.COMPARE, triton_together.TOGETHER
GROUPED, ULD = triton_groups.GROUPED, triton_compare.ULD
