"""Fused kernels for knowledge-distillation losses: the textbook number, a fraction of the memory traffic."""

from importlib.metadata import PackageNotFoundError, version

from . import backends, cache, correlation, distributions, logpartition, longtail, metrics, ranks, separable, tape
from .backends import BackendUnavailable, available_backends, use_backend
from .base import BaseLoss
from .compare import RankLoss
from .compose import SumLoss
from .correlation import *  # noqa: F403
from .distributions import *  # noqa: F403
from .functional import power_sum, power_transform
from .linear import LinearLoss
from .logpartition import *  # noqa: F403  (its __all__ is the catalogue)
from .longtail import *  # noqa: F403
from .loss import Label, Loss, Moment, Point
from .observe import RowMetrics
from .parallel import vocab_shards
from .ranks import *  # noqa: F403
from .separable import *  # noqa: F403
from .separable import SeparableLoss
from .sparse import SparseTeacher
from .together import MixedSumLoss
from .vocab import SharedVocab

try:
    __version__ = version("kdkernels")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

_FAMILIES = (logpartition, separable, distributions, longtail, ranks, correlation)
__all__ = [
    *(_CATALOGUE := [name for family in _FAMILIES for name in family.__all__]),
    "BackendUnavailable", "Label", "LinearLoss", "Loss", "MixedSumLoss", "Moment", "Point", "RankLoss", "RowMetrics",
    "SeparableLoss", "SharedVocab", "SparseTeacher", "SumLoss", "available_backends", "backends", "cache", "catalogue",
    "metrics", "power_sum", "power_transform", "tape", "use_backend", "vocab_shards",
]  # fmt: skip


backends.load_defaults()


def catalogue() -> dict[str, type[BaseLoss]]:
    """Class name -> class of every loss the library declares."""
    return {name: globals()[name] for name in _CATALOGUE}
