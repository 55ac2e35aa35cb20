"""What a loss is made with: its options, points and flags, and errors that name them."""

from __future__ import annotations

import contextlib
import inspect
import math
import numbers
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .base import BaseLoss
    from .loss import Loss, Point


REDUCTIONS = ("mean", "sum", "none", "batchmean")
REAL: Any = numbers.Real  # numpy's scalars too; to mypy it would not compare with a float
ELSEWHERE = -(1 << 62)  # a label whose class another vocabulary shard has: the row is kept, and has none here
RAW, FROZEN, EXCLUDE, MEAN_S, MEAN_T, SECOND, GIVEN = 1, 2, 4, 8, 16, 32, 64


class Uses(NamedTuple):
    """What a loss takes, kept apart from its options: torch.compile would guard on the numbers that it sees read."""

    teacher: bool
    labels: bool
    teacher_temperature: bool


def uses(loss: BaseLoss) -> Uses:
    return Uses(
        teacher=loss.needs_teacher and loss.kd_weight != 0,
        labels=(loss.needs_labels and loss.kd_weight != 0) or loss.ce_weight != 0,
        teacher_temperature=loss.teacher_temperature is not None,
    )


def signature(cls: type) -> inspect.Signature:
    """What a loss's constructor takes, with what its **options hand on to the base classes."""
    found: dict[str, inspect.Parameter] = {}
    for base in (base for base in cls.__mro__ if "__init__" in vars(base)):
        own = list(inspect.signature(base.__init__).parameters.values())[1:]  # type: ignore[misc]
        named = [p for p in own if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        found |= {p.name: p.replace(kind=p.KEYWORD_ONLY) if found else p for p in named if p.name not in found}
        if not any(p.kind == p.VAR_KEYWORD for p in own):
            break
    return inspect.Signature(sorted(found.values(), key=lambda p: p.kind))


@contextlib.contextmanager
def explain_constructor(cls: type):
    """An option that the constructor does not know is named with those that it does."""
    try:
        yield
    except TypeError as error:
        unknown = re.search(r"__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
        if not unknown and not re.search(r"__init__\(\) takes .* positional arguments? but", str(error)):
            raise
        options = ", ".join(str(p.replace(annotation=p.empty)) for p in signature(cls).parameters.values())
        problem = f" has no option {unknown[1]!r}; its options" if unknown else ": options are keywords"
        raise TypeError(f"{cls.__name__}{problem}: {options}") from error


@contextlib.contextmanager
def explain_value(loss: Loss, name: str = "value"):
    """A function that cannot be traced is told from those that can."""
    try:
        yield
    except (TypeError, AttributeError) as error:
        if "Expr" not in str(error):
            raise
        raise TypeError(f"{type(loss).__name__}.{name} is traced: use arithmetic and the functions of kdkernels.tape, "
                        f"not those of torch or math ({error})") from error  # fmt: skip


@contextlib.contextmanager
def all_or_nothing(attributes: dict):
    """Whatever raises within leaves the attributes as they were."""
    before = dict(attributes)
    try:
        yield
    except BaseException:
        attributes.clear()
        attributes.update(before)
        raise


def check_number(name: str, value: Any, *, above: float = -math.inf, least: float = -math.inf, most: float = math.inf,
                 below: float = math.inf):  # fmt: skip
    """A finite number in (above, below) and [least, most]; a bool, a string or NaN raises."""
    if isinstance(value, bool) or not isinstance(value, REAL):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    if not (-math.inf < value < math.inf and above < value < below and least <= value <= most):  # torch.compile knows
        low = f"> {above:g}" if above > -math.inf else f">= {least:g}" if least > -math.inf else "finite"
        high = f" and < {below:g}" if below < math.inf else f" and <= {most:g}" if most < math.inf else ""
        raise ValueError(f"{name} must be {low}{high}, got {value!r}")
    return value


def check_coefficient(name: str, value: Any) -> None:
    """A finite number, or a tensor of them that is a constant."""
    if not isinstance(value, Tensor):
        check_number(name, value)
        return
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{name} must be real numbers, got {value.dtype}")
    if value.requires_grad:
        raise ValueError(f"{name} requires grad, but no gradient flows to it; pass it detached")
    if readable(value) and not value.isfinite().all():
        raise ValueError(f"{name} must be finite, got {value}")


def check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_count(name: str, value: Any, least: float = 1, most: float = math.inf) -> None:
    """An int in [least, most]; a bool raises."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if not least <= value <= most:
        allowed = f">= {least:g}" if most == math.inf else f"in [{least:g}, {most:g}]"
        raise ValueError(f"{name} must be {allowed}, got {value}")


def check_integers(name: str, x: Any) -> None:
    """A tensor of integers."""
    if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} must be a tensor of integers, got {getattr(x, 'dtype', type(x).__name__)}")


def check_options(loss: BaseLoss) -> None:
    check_number("temperature", loss.temperature, above=0)
    if loss.teacher_temperature is not None:
        check_number("teacher_temperature", loss.teacher_temperature, above=0)
    check_number("kd_weight", loss.kd_weight)
    check_number("ce_weight", loss.ce_weight)
    check_number("label_smoothing", loss.label_smoothing, least=0, most=1)
    check_number("z_loss", loss.z_loss, least=0)
    for name in ("t_squared", "standardize", "validate"):
        check_bool(name, getattr(loss, name))
    check_choice("reduction", loss.reduction, REDUCTIONS)
    check_count("ignore_index", loss.ignore_index, least=-math.inf)


def check_new(loss: BaseLoss) -> None:
    """What is asked of a new loss only; a weight may be annealed to 0 later."""
    if "reduction" not in vars(loss):
        raise TypeError(f"{type(loss).__name__}.__init__ must call super().__init__(**options)")
    check_options(loss)
    for name in ("label_smoothing", "z_loss"):
        if getattr(loss, name) and not loss.ce_weight:
            raise ValueError(f"{name} needs ce_weight > 0: {type(loss).__name__} has no cross-entropy here")


def readable(x: Tensor) -> bool:
    """Whether x can be looked at: it is an ordinary tensor on the CPU, where nothing waits for a device."""
    return not torch.compiler.is_compiling() and type(x) is Tensor and x.is_cpu


def check_points(loss: Loss, points: tuple) -> None:
    for k, point in enumerate(points):
        if not hasattr(point, "exclude_label"):  # a bare Point is a tuple as well, of numbers
            raise TypeError(f"{type(loss).__name__}: points must return a tuple of Points, as in (Point(student=1),), "
                            f"got {point!r} in it")  # fmt: skip
        for side in ("student", "teacher"):
            name, value = f"{type(loss).__name__}: {side} of point {k}", getattr(point, side)
            check_coefficient(name, value)


def flags(point: Point, used: set[int], sloped: set[int], first: int, standardize: bool) -> int:
    """What the kernels do at a point, given the registers that its loss reads, and has slopes by (if standardised); its
    moments start at `first`."""
    found = RAW * point.raw | FROZEN * point.frozen | EXCLUDE * point.exclude_label | GIVEN * point.given
    found |= MEAN_S * (first + 1 in used) | MEAN_T * (first + 2 in used)
    covariances = {first + 3, first + 4, first + 5}
    second = used & covariances and not point.given
    tilted = any(isinstance(x, Tensor) or x != 0 for x in (point.student, point.teacher))
    if sloped & covariances and tilted and not (point.frozen or point.raw or point.given):
        raise ValueError("standardize=True takes covariances (.ss, .st, .tt) only of a point without coefficients, or "
                         "one that is frozen or raw: the scale's gradient would be one of third moments")  # fmt: skip
    if second or (standardize and not point.raw):
        found |= SECOND | MEAN_S | MEAN_T
    return found
