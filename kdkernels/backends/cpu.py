"""C++ on the CPU: rows on threads, tiles of a row in vector registers (`csrc/cpu/`).

Bytes per class of a row of w-byte logits: reduce reads 2 w, spread reads 2 w and writes w; step does both while the
row is in cache: 2 w read from memory, w written, 2 K exponentials at K points.
"""

from __future__ import annotations

from pathlib import Path

import torch

from .. import groups, rankops
from ..ops import Operators, register, register_buckets, rescale, rows_of_sums
from . import calls

DEVICES = ("cpu",)
FLOAT64 = True
LIBRARY = Path(__file__).parent.parent / "_cpu.abi3.so"


def _load() -> str | None:
    if not LIBRARY.exists():
        return f"{LIBRARY} is not built; reinstall kdkernels (pip install .) with a C++ compiler"
    torch.ops.load_library(str(LIBRARY))
    register("")
    register("separable_", elements=True)
    register_buckets()
    rankops.register("", metrics=True)
    groups.register("")
    return None


_reason = _load()


def unavailable() -> str | None:
    """Why the backend cannot run, or None."""
    return _reason


def isa() -> str:
    """The instruction set the kernels run with on this processor."""
    names = "baseline", "AVX2", "AVX-512", "AVX-512 with bfloat16"
    return names[torch.ops.kdkernels.isa()] if _reason is None else "none"


def _counted(name: str):
    def launch(*args):
        operator = getattr(torch.ops.kdkernels, name).default
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return operator(*args)
        calls["cpu", name] += 1
        with torch._C._AutoDispatchBelowAutograd():  # the refusal of double backward there costs 15 us a call
            return operator(*args)

    return launch


def _checked(launch):
    def checked(*args):
        try:
            return launch(*args)
        except RuntimeError as error:  # the kernel is the first to read the labels
            message = str(error)
            if "labels must be in" not in message:
                raise
            raise ValueError(message[message.index("labels must be in") :].splitlines()[0]) from None

    return checked


OPERATORS = Operators(_checked(_counted("reduce")), _counted("rows"), _counted("spread"), _checked(_counted("step")),
                      _checked(_counted("step_out")), rescale=rescale)  # fmt: skip
SEPARABLE = Operators(
    _checked(_counted("separable_reduce")), rows_of_sums(_counted("rows")), _counted("separable_spread"),
    _checked(_counted("separable_step")), _checked(_counted("separable_step_out")), rescale=rescale,
    elements=(OPERATORS.reduce, _counted("separable_sums")),
)  # fmt: skip
_TOGETHER = _checked(_counted("together_step"))
GROUPED = (_checked(_counted("group_moments")), _counted("group_spread"))
OVER_ROWS = (_checked(_counted("class_correlation")), _counted("class_spread"))
AGREEMENT = _checked(_counted("agreement"))
DISTANCES = (_counted("row_distances"), _counted("row_distances_slopes"))
ULD = _COMPARE = (_checked(_counted("compare")), _checked(_counted("compare_step")))


def COMPARE(*_loss):
    return _COMPARE


def TOGETHER(_student, _teacher, _vocab, losses):
    return _TOGETHER, range(len(losses))


BUCKET = (_counted("bucket"), _counted("bucket_spread"))
METRICS = {name: _counted(name) for name in ("rankdata", "spearman", "kendall_tau")}
