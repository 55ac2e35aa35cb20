"""From what a user passes to what a kernel takes: checks, shapes, row arguments and the factors of a reduction."""

from __future__ import annotations

import contextlib
import inspect
import math
import numbers
import re
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from .loss import Loss, Point, Program


REDUCTIONS = ("mean", "sum", "none", "batchmean")
_REAL: Any = numbers.Real  # numpy's scalars too; to mypy it would not compare with a float
RAW, FROZEN, EXCLUDE, MEAN_S, MEAN_T, SECOND = 1, 2, 4, 8, 16, 32


class Rows(NamedTuple):
    """student (..., W), teacher (..., W2) or None, labels (N,) int64 or None, mask (vocab,), classes [0, vocab)."""

    student: Tensor
    teacher: Tensor | None
    labels: Tensor | None
    mask: Tensor | None
    weight: Tensor | None
    vocab: int


class Uses(NamedTuple):
    """What a loss takes, kept apart from its options: torch.compile would guard on the numbers that it sees read."""

    teacher: bool
    labels: bool
    teacher_temperature: bool


def uses(loss: Loss) -> Uses:
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
def explain_value(loss: Loss):
    """A function that cannot be traced is told from those that can."""
    try:
        yield
    except (TypeError, AttributeError) as error:
        if "Expr" not in str(error):
            raise
        raise TypeError(f"{type(loss).__name__}.value is traced: use arithmetic and the functions of kdkernels.tape, "
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


def check_number(name: str, value: Any, *, above: float = -math.inf, least: float = -math.inf, most: float = math.inf):
    """A finite number in (above, inf) and [least, most]; a bool, a string or NaN raises."""
    if isinstance(value, bool) or not isinstance(value, _REAL):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    if not (-math.inf < value < math.inf and above < value and least <= value <= most):  # torch.compile knows these
        low = f"> {above:g}" if above > -math.inf else f">= {least:g}" if least > -math.inf else "finite"
        raise ValueError(f"{name} must be {low}{f' and <= {most:g}' if most < math.inf else ''}, got {value!r}")
    return value


def check_options(loss: Loss) -> None:
    check_number("temperature", loss.temperature, above=0)
    if loss.teacher_temperature is not None:
        check_number("teacher_temperature", loss.teacher_temperature, above=0)
    check_number("kd_weight", loss.kd_weight)
    check_number("ce_weight", loss.ce_weight)
    check_number("label_smoothing", loss.label_smoothing, least=0, most=1)
    check_number("z_loss", loss.z_loss, least=0)
    for name in ("t_squared", "standardize"):
        if not isinstance(getattr(loss, name), bool):
            raise TypeError(f"{name} must be a bool, got {getattr(loss, name)!r}")
    if loss.reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {loss.reduction!r}")
    if isinstance(loss.ignore_index, bool) or not isinstance(loss.ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {loss.ignore_index!r}")


def check_new(loss: Loss) -> None:
    """What is asked of a new loss only; a weight may be annealed to 0 later."""
    if "reduction" not in vars(loss):
        raise TypeError(f"{type(loss).__name__}.__init__ must call super().__init__(**options)")
    check_options(loss)
    for name in ("label_smoothing", "z_loss"):
        if getattr(loss, name) and not loss.ce_weight:
            raise ValueError(f"{name} needs ce_weight > 0: {type(loss).__name__} has no cross-entropy here")


def check_points(loss: Loss, points: tuple) -> None:
    for k, point in enumerate(points):
        if not hasattr(point, "exclude_label"):  # a bare Point is a tuple as well, of numbers
            raise TypeError(f"{type(loss).__name__}: points must return a tuple of Points, as in (Point(student=1),), "
                            f"got {point!r} in it")  # fmt: skip
        for side in ("student", "teacher"):
            name, value = f"{type(loss).__name__}: {side} of point {k}", getattr(point, side)
            if not isinstance(value, Tensor):
                check_number(name, value)
            elif _readable(value) and not value.isfinite().all():
                raise ValueError(f"{name} must be finite, got {value}")


def _readable(x: Tensor) -> bool:
    """Whether x can be looked at: it is an ordinary tensor on the CPU, where nothing waits for a device."""
    return not torch.compiler.is_compiling() and type(x) is Tensor and x.is_cpu


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _logits(name: str, x) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        hint = "; labels are the third argument" if name == "teacher_logits" else f" of shape {tuple(x.shape)}"
        raise TypeError(f"{name} must be floating point, got {_name(x.dtype)}{hint}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got {x.layout}")
    if x.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"{name} must be float64, float32, float16 or bfloat16, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name} must have shape (..., V) with V >= 1, got {tuple(x.shape)}")


def dense(x: Tensor) -> Tensor:
    """(..., V) -> (N, V) or (A, B, V) with unit stride in V; a copy only where the leading strides cannot be kept."""
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        x = x.contiguous()
    if x.dim() in (2, 3):
        return x
    return x.unsqueeze(0) if x.dim() == 1 else x.reshape(-1, *x.shape[-2:])


def _like(name: str, x, student: Tensor) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.shape != student.shape[:-1]:
        raise ValueError(
            f"{name} must have shape {tuple(student.shape[:-1])} for student_logits of shape "
            f"{tuple(student.shape)}, got {tuple(x.shape)}"
        )
    if x.device != student.device:
        raise ValueError(f"{name} must be on student_logits' device {student.device}, got {x.device}")
    return x


def _constant(name: str, x: Tensor) -> None:
    if x.dtype == torch.bool or x.is_complex():
        raise TypeError(f"{name} must be real numbers, got {_name(x.dtype)}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad, but no gradient flows to it; pass {name}.detach()")


def check(loss: Loss, student, teacher, labels, row_weight, temperature, vocab_size, vocab_mask) -> Rows:
    """The call's tensors in the shapes kernels take.

    Raises:
        TypeError, ValueError: naming the argument, its shape and what was expected.
    """
    _logits("student_logits", student)
    width = student.shape[-1]
    if vocab_size is not None:
        if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
            raise TypeError(f"vocab_size must be an int, got {type(vocab_size).__name__}")
        if not 1 <= vocab_size <= width:
            raise ValueError(f"vocab_size must be in [1, {width}] for student_logits {tuple(student.shape)}, "
                             f"got {vocab_size}")  # fmt: skip
    vocab = vocab_size or width
    if teacher is None:
        if loss._uses.teacher:
            raise ValueError(f"{type(loss).__name__} needs teacher_logits")
    else:
        _logits("teacher_logits", teacher)
        fits = teacher.shape == student.shape or (
            vocab_size is not None and teacher.shape[:-1] == student.shape[:-1] and teacher.shape[-1] >= vocab_size
        )
        if not fits:
            raise ValueError(f"teacher_logits must have student_logits' shape {tuple(student.shape)}, "
                             f"got {tuple(teacher.shape)}")  # fmt: skip
        if teacher.device != student.device:
            raise ValueError(f"teacher_logits must be on student_logits' device {student.device}, got {teacher.device}")
        if not loss._uses.teacher:  # one signature for all losses, and no gradient from those that do not look at it
            teacher = None
    if labels is None and loss._uses.labels:
        cause = "" if loss.needs_labels and loss.kd_weight else f" with ce_weight={loss.ce_weight}"
        raise ValueError(f"{type(loss).__name__}{cause} needs labels")
    if labels is not None:
        labels = _like("labels", labels, student)
        if labels.is_floating_point() or labels.dtype == torch.bool or labels.is_complex():
            raise TypeError(f"labels must be integers, got {labels.dtype} of shape {tuple(labels.shape)}")
        labels = (labels if labels.dim() == 1 else labels.reshape(-1)).to(torch.int64).contiguous()
    if row_weight is not None:
        row_weight = _like("row_weight", row_weight, student)
        _constant("row_weight", row_weight)
        row_weight = row_weight.reshape(-1).to(torch.float64)
    if isinstance(temperature, Tensor):
        _temperature(temperature, student, None if labels is None else labels != loss.ignore_index)
    elif temperature is not None:
        check_number("temperature", temperature, above=0)
    if vocab_mask is not None:
        vocab_mask = _mask(vocab_mask, student, vocab)
        if labels is not None and _readable(vocab_mask):
            live = labels[(labels != loss.ignore_index) & (labels >= 0) & (labels < vocab)]  # kernels refuse the rest
            if not (kept := vocab_mask[live]).all():
                raise ValueError(f"labels must be classes that vocab_mask keeps, got {live[~kept][0].item()}")
    if loss.standardize:  # the gradient is a sum of two (through the row and its deviation): rounded once, at the end
        student = student if student.dtype == torch.float64 else student.float()
        if teacher is not None and teacher.dtype != torch.float64:
            teacher = teacher.float()
    return Rows(student, teacher, labels, vocab_mask, row_weight, vocab)


def _temperature(temperature: Tensor, student: Tensor, keep: Tensor | None) -> None:
    _constant("temperature", temperature)
    if temperature.dim():
        _like("temperature", temperature, student)
    if _readable(temperature):
        bad = ~((temperature > 0) & (temperature < math.inf)).reshape(-1)
        bad = bad & keep if keep is not None and temperature.dim() else bad
        if bad.any():
            raise ValueError(f"temperature must be > 0 and finite, got {temperature.reshape(-1)[bad][0].item()}")


def check_out(loss: Loss, out, student: Tensor, teacher: Tensor | None) -> None:
    """What value_and_grad asks for beside a call's."""
    if loss.reduction == "none":
        raise ValueError("value_and_grad needs a reduction other than 'none'")
    if loss.standardize:
        raise ValueError("value_and_grad needs standardize=False")
    if out is None:
        return
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor, got {type(out).__name__}")
    if out.shape != student.shape or out.dtype != student.dtype or out.device != student.device:
        raise ValueError(f"out must be like student_logits {tuple(student.shape)} {student.dtype} on {student.device}, "
                         f"got {tuple(out.shape)} {out.dtype} on {out.device}")  # fmt: skip
    if out.requires_grad and out.is_leaf:
        raise ValueError("out is a leaf that requires grad; pass out.detach()")
    for name, x in (("student_logits", student), ("teacher_logits", teacher)):
        if x is not None and not torch.compiler.is_compiling() and _overlaps(out, x):
            raise ValueError(f"out shares memory with {name}, which is read meanwhile; only {name} itself may be out")


def _overlaps(out: Tensor, x: Tensor) -> bool:
    """Whether they share memory, and not element by element."""
    same = (out.data_ptr(), out.shape, out.stride()) == (x.data_ptr(), x.shape, x.stride())
    return not (same and out.dtype == x.dtype) and np.shares_memory(_footprint(out), _footprint(x))


def _footprint(x: Tensor) -> np.ndarray:
    """An array at x's addresses, on whatever device they are: numpy compares them and reads nothing."""
    strides = tuple(n * x.itemsize for n in x.stride())
    place = dict(data=(x.data_ptr(), True), shape=tuple(x.shape), strides=strides, typestr=f"|V{x.itemsize}", version=3)
    return np.asarray(SimpleNamespace(__array_interface__=place))


def _mask(mask, student: Tensor, vocab: int) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"vocab_mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if mask.dim() != 1 or mask.shape[0] not in (student.shape[-1], vocab):
        raise ValueError(f"vocab_mask must have shape ({student.shape[-1]},), got {tuple(mask.shape)}")
    if mask.device != student.device:
        raise ValueError(f"vocab_mask must be on student_logits' device {student.device}, got {mask.device}")
    mask = mask[:vocab].contiguous()
    if _readable(mask) and not mask.any():
        raise ValueError(f"vocab_mask must keep one class of {vocab} or more, got False throughout")
    return mask


def arguments(loss: Loss, program: Program, rows: Rows, temperature) -> Tensor:
    """Row arguments (1 or N, 3 + 2K): [1/T_student, 1/T_teacher, T] and the points' coefficients."""
    args = program.args
    if len(args) > 1 and len(args) != rows.student.shape[:-1].numel():
        raise ValueError(f"{type(loss).__name__} has {len(args)} rows of point coefficients, student_logits "
                         f"{tuple(rows.student.shape)} another number of rows")  # fmt: skip
    if temperature is None and not loss.standardize:
        return args
    args = args.to(rows.student.device)
    T = args[:, 2]
    if temperature is not None:
        if not isinstance(temperature, Tensor):  # torch.compile would hold a number in as_tensor constant
            temperature = torch.full((1,), float(temperature), dtype=torch.float64)
        T = temperature.reshape(-1).to(args.device, torch.float64)
    student = 1 / T
    teacher = args[:, 1] if loss._uses.teacher_temperature else student
    if loss.standardize:
        student = student * _inverse_deviation(rows.student, rows)
        if rows.teacher is not None:
            teacher = teacher * _inverse_deviation(rows.teacher, rows)
    head = torch.broadcast_tensors(student, teacher, T, args[:, 3])
    count = head[0].shape[0]
    return torch.cat((torch.stack(head[:3], -1), args[:, 3:].expand(count, -1)), -1)


def _inverse_deviation(logits: Tensor, rows: Rows) -> Tensor:
    """(N,) float64: 1 / standard deviation of each row of logits (..., W) over its live classes, differentiable."""
    from .functional import inverse_deviation

    labels = None if rows.labels is None else rows.labels.view(logits.shape[:-1])
    scale = inverse_deviation(logits, labels=labels, vocab_size=rows.vocab, vocab_mask=rows.mask)
    return scale.reshape(-1).to(torch.float64)


def flags(point: Point, used: set[int], first: int, standardize: bool) -> int:
    """What the kernels do at a point, given the registers that its loss reads; its moments start at `first`."""
    found = RAW * point.raw | FROZEN * point.frozen | EXCLUDE * point.exclude_label
    found |= MEAN_S * (first + 1 in used) | MEAN_T * (first + 2 in used)
    if used & {first + 3, first + 4, first + 5} or (standardize and not point.raw):
        found |= SECOND | MEAN_S | MEAN_T
    return found


def weighting(loss: Loss, rows: Rows, num_items) -> tuple[Tensor | None, float]:
    """weight (N or 1,) float64 or None, and the divisor: a row's loss counts weight / divisor times.

    Divisor 0 stands for the number of kept rows, which only the labels know.
    """
    if num_items is not None and loss.reduction != "mean":
        raise ValueError(f"num_items replaces the denominator of reduction='mean', not of {loss.reduction!r}")
    if loss.reduction == "mean":
        if num_items is None:
            return rows.weight, 0.0
        if isinstance(num_items, Tensor):
            _constant("num_items", num_items)
            if num_items.numel() != 1:
                raise ValueError(f"num_items must have one element, got shape {tuple(num_items.shape)}")
            if _readable(num_items) and not bool(num_items >= 0):
                raise ValueError(f"num_items must be >= 0, got {num_items.item()}")
        elif check_number("num_items", num_items, least=0):
            return rows.weight, float(num_items)
        items = torch.as_tensor(num_items, dtype=torch.float64, device=rows.student.device).reshape(1)  # 0: none kept
        return (1 / items if rows.weight is None else rows.weight / items), 1.0
    batch = rows.student.shape[0] if rows.student.dim() > 1 else 1
    return rows.weight, float(max(batch, 1)) if loss.reduction == "batchmean" else 1.0


def factor(weight: Tensor | None, divisor: float, labels: Tensor | None, ignore: int, like: Tensor) -> Tensor:
    """weight / divisor of each row of `like` (..., W): (N,) or (1,) float64."""
    one = torch.ones(1, dtype=torch.float64, device=like.device) if weight is None else weight
    if divisor:
        return one / divisor
    return one / max(like.shape[:-1].numel(), 1) if labels is None else one / (labels != ignore).sum().clamp(min=1)


def apply_factor(value: Tensor, factor: Tensor, labels: Tensor | None, ignore: int) -> Tensor:
    """Weighted row losses; a row that is not kept is 0 whatever its weight."""
    value = value * factor
    return value if labels is None else torch.where(labels != ignore, value, torch.zeros_like(value))


def result_dtype(student: Tensor) -> torch.dtype:
    return torch.float64 if student.dtype == torch.float64 else torch.float32


def reduced(value: Tensor, student: Tensor, labels, weight, divisor: float, ignore: int, per_row: bool) -> Tensor:
    """Row losses (N,) -> what a call returns."""
    value = apply_factor(value, factor(weight, divisor, labels, ignore, student), labels, ignore)
    value = value.to(result_dtype(student))
    return value.view(student.shape[:-1]) if per_row else value.sum()
