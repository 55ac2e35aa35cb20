"""Fused kernels for knowledge-distillation losses: the textbook number, a fraction of the memory traffic."""

from importlib.metadata import PackageNotFoundError, version

from . import backends, logpartition, tape
from .backends import BackendUnavailable, available_backends, use_backend
from .functional import power_sum, power_transform
from .linear import LinearLoss
from .logpartition import *  # noqa: F403  (its __all__ is the catalogue)
from .loss import Label, Loss, Moment, Point

try:
    __version__ = version("kdkernels")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

__all__ = [
    *logpartition.__all__, "BackendUnavailable", "Label", "LinearLoss", "Loss", "Moment", "Point", "available_backends",
    "backends", "catalogue", "power_sum", "power_transform", "tape", "use_backend",
]  # fmt: skip


backends.load_defaults()


def catalogue() -> dict[str, type[Loss]]:
    """Class name -> class of every loss the library declares."""
    found = {name: globals()[name] for name in __all__}
    return {n: c for n, c in found.items() if isinstance(c, type) and issubclass(c, Loss) and c is not Loss}
