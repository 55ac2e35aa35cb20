"""Which kernels run. A backend is three row operations (reduce, rows, spread; step fuses them) and never sees a loss.

`reference` is plain torch: float64 throughout, differentiable as often as one likes, the definition of the rest.
`cpu` is C++, `triton` is Triton (any GPU it supports, or its interpreter), `cuda` is CUDA C++.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import threading
import warnings
from collections import Counter
from types import ModuleType

import torch
from torch import Tensor

NAMES = ("reference", "cpu", "triton", "cuda")
calls: Counter = Counter()
"""How often each kernel was launched, by (backend, operator): what a test looks at to see that nothing fell back."""


class BackendUnavailable(RuntimeError):
    """A backend was asked for that cannot run here."""


class _Choice(threading.local):
    name: str | None = None


_choice = _Choice()
_modules: dict[str, ModuleType | str] = {}


def _load(name: str) -> ModuleType | str:
    """The backend's module, or the reason why there is none. Tried once: a reason does not change within a process."""
    if name not in _modules:
        if name not in NAMES:
            raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
        try:
            module = importlib.import_module(f"{__name__}.{name}")
            _modules[name] = module.unavailable() or module
        except ModuleNotFoundError as error:
            missing = "no such kernels in this version of kdkernels"
            _modules[name] = missing if error.name == f"{__name__}.{name}" else f"needs the module {error.name}"
        except (ImportError, OSError) as error:
            _modules[name] = f"{type(error).__name__}: {error}"
    return _modules[name]


def load_defaults() -> None:
    """Loads what `pick` may choose by itself: an import in the middle of torch.compile would break its graph."""
    for name in ("reference", "cpu", *(("cuda", "triton") if torch.cuda.is_available() else ())):
        _load(name)


def available_backends() -> dict[str, str]:
    """Backend name -> "ok", or the reason why it cannot run here."""
    found = {name: _load(name) for name in NAMES}
    return {name: module if isinstance(module, str) else "ok" for name, module in found.items()}


def _checked(name: str) -> ModuleType:
    module = _load(name)
    if isinstance(module, str):
        raise BackendUnavailable(f"backend {name!r} is not available: {module}")
    return module


def use_backend(name: str) -> contextlib.AbstractContextManager[None]:
    """Within the context, every loss runs on this backend or raises.

    Args:
        name: "reference", "cpu", "triton" or "cuda".

    Raises:
        ValueError: there is no backend of that name.
        BackendUnavailable: a RuntimeError: it cannot run here; the message says why.
    """
    _checked(name)  # at the call, not only on entering
    return _chosen(name)


@contextlib.contextmanager
def _chosen(name: str):
    before, _choice.name = _choice.name, name
    try:
        yield
    finally:
        _choice.name = before


_forced = os.environ.get("KDKERNELS_BACKEND") or None


def pick(student: Tensor, teacher: Tensor | None = None) -> ModuleType:
    """The backend for these logits: the one asked for, else the fastest that runs on their device.

    float64 on a GPU goes to `reference`: the kernels there compute elements in float32.
    """
    device = student.device.type
    double = "student" if student.dtype == torch.float64 else ""
    if not double and teacher is not None and teacher.dtype == torch.float64:
        double = "teacher"
    name = _choice.name or _forced
    if name is not None:
        if name not in NAMES:
            raise BackendUnavailable(f"KDKERNELS_BACKEND must be one of {', '.join(NAMES)}, got {name!r}")
        module = _checked(name)
        if device not in module.DEVICES and "any" not in module.DEVICES:
            raise ValueError(f"backend {name!r} runs on {' or '.join(module.DEVICES)}, student_logits are on {device}")
        if double and not module.FLOAT64:
            raise TypeError(f"backend {name!r} computes in float32 and {double}_logits are float64; use 'reference'")
        return module
    candidates: tuple[str, ...]
    if device == "cpu":
        candidates = ("cpu",)
    elif double:
        candidates = ("reference",)
    else:
        candidates = ("cuda", "triton") if device == "cuda" else ("triton",)
    for candidate in candidates:
        found = _load(candidate)
        if not isinstance(found, str):
            return found
    if not double and not torch.compiler.is_compiling():
        _say_slow(candidates[0], str(_load(candidates[0])))
    return _checked("reference")


FAMILIES = {"COMPARE": "rank losses", "SEPARABLE": "separable losses", "GROUPED": "losses of groups",
            "ULD": "sorted probabilities"}  # fmt: skip


def pick_with(family: str, student: Tensor, teacher: Tensor | None, *loss) -> ModuleType:
    """The same for a family of losses whose kernels not every backend has: its operators are an attribute of that name
    or, where they differ by loss, what it returns for this one; None if there are none.

    Raises:
        BackendUnavailable: the backend asked for has none.
    """

    def has(module):
        found = getattr(module, family, None)
        return found is not None and (not loss or found(student, teacher, *loss) is not None)

    backend = pick(student, teacher)
    if backend.__name__.endswith(".reference") or has(backend):
        return backend
    missing = f"no kernels for {FAMILIES[family]} in this version of kdkernels"
    if (name := _choice.name or _forced) is not None:
        raise BackendUnavailable(f"backend {name!r} has {missing}")
    if not isinstance(other := _load("triton"), str) and has(other):
        return other
    if not torch.compiler.is_compiling():
        _say_slow(backend.__name__.rpartition(".")[2], f"it has {missing}")
    return _checked("reference")


def kernels(family: str, student: Tensor, teacher: Tensor | None = None):
    """A family's operators of the backend for these logits, or Triton's where `cuda` has none and nobody asked for it;
    None: torch is to do the work."""
    backend = pick(student, teacher)
    if not hasattr(backend, family) and backend.__name__.endswith(".cuda") and (_choice.name or _forced) is None:
        other = _load("triton")
        return None if isinstance(other, str) else getattr(other, family, None)
    return getattr(backend, family, None)


def definition(loss: str) -> ModuleType:
    """The reference backend, for a loss that has no kernels at all.

    Raises:
        BackendUnavailable: another backend was asked for.
    """
    if (name := _choice.name or _forced) not in (None, "reference"):
        raise BackendUnavailable(f"backend {name!r} has no kernels for {loss}, which runs its definition in torch")
    return _checked("reference")


@functools.cache
def _say_slow(name: str, reason: str) -> None:
    warnings.warn(f"kdkernels runs its reference backend, which is slow: {name!r} cannot run, {reason}", stacklevel=5)
