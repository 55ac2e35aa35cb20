"""CUDA C++ (`csrc/cuda/`): NVIDIA GPUs from Ampere (sm_80) on, in float32, float16 and bfloat16.

Bytes per class of a row of w-byte logits: reduce reads 2 w, spread reads 2 w and writes w; step, where a cluster of
blocks holds the rows, reads 2 w and writes w, and in two sweeps reads 4 w (of the second 2 w what L2 has kept comes
from there). At K points K exponentials a sweep, less those of points twice another, whose weights are squares.
A training step is three launches (begin, step, rescale). Spearman's loss reads 6 w and writes w, where 2 w and w is the
least, the second and third reads from L2 where it holds the rows at work; two launches, the second for rows that the
window of the first does not hold. A call repeats to the bit; nothing waits for the device.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .. import rankops
from ..ops import Operators, register
from . import calls

DEVICES: tuple[str, ...] = ("cuda",)
FLOAT64 = False
LIBRARY = Path(__file__).parent.parent / "_cuda.abi3.so"
form = 0  # of a step: 0 picks, 1 two sweeps over memory, 2 a cluster of blocks that holds the rows, where one can


def unavailable() -> str | None:
    """Why the backend cannot run, or None. Loads the library."""
    if not LIBRARY.exists():
        return "not built; reinstall kdkernels with KDKERNELS_CUDA=1, which builds it or says what is missing"
    if "cuda" in DEVICES:
        if not torch.cuda.is_available():
            return "no NVIDIA GPU"
        if torch.cuda.get_device_capability() < (8, 0):
            return f"{torch.cuda.get_device_name()} is older than Ampere (compute capability 8.0)"
    torch.ops.load_library(str(LIBRARY))
    register("cuda_")
    rankops.register("cuda_")
    return None


def _counted(name: str):
    def launch(*args):
        operator = getattr(torch.ops.kdkernels, f"cuda_{name}").default
        if not torch.compiler.is_compiling():
            calls["cuda", name] += 1
        return operator(*args)

    return launch


def _formed(name: str, *more):
    launch = _counted(name)
    return lambda *args: launch(*args, *more, form)


def _rescaled(gradient: Tensor, grad: Tensor) -> Tensor:
    """grad * gradient, in place, without waiting for grad: the kernel leaves at once where it is 1."""
    torch.ops.kdkernels.cuda_rescale(gradient, grad)
    return gradient


OPERATORS = Operators(_counted("reduce"), _counted("rows"), _counted("spread"), _formed("step"),
                      _formed("step_out", False), _formed("step_out", True), _rescaled)  # fmt: skip
_COMPARE = (_formed("compare"), _formed("compare_step"))


def COMPARE(student: Tensor, teacher: Tensor, kind: int, vocab: int, top: int) -> tuple | None:
    """Operators of Spearman's loss of all classes of wide 16-bit rows; Triton has those of all others."""
    wide = 4096 <= vocab < 1 << 20 and student.element_size() == teacher.element_size() == 2
    return _COMPARE if kind == rankops.SPEARMAN and wide and (not top or top >= vocab) else None
