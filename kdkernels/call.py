"""From what a user passes to what a kernel takes: checks, shapes, row arguments and the factors of a reduction."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .loss import Loss, Program


REDUCTIONS = ("mean", "sum", "none", "batchmean")


class Rows(NamedTuple):
    """student (..., W), teacher (..., W2) or None, labels (N,) int64 or None, mask (vocab,), classes [0, vocab)."""

    student: Tensor
    teacher: Tensor | None
    labels: Tensor | None
    mask: Tensor | None
    weight: Tensor | None
    vocab: int


def check_number(name: str, value, *, above: float = -math.inf, least: float = -math.inf, most: float = math.inf):
    """A finite number in (above, inf) and [least, most]; a bool, a string or NaN raises."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    if not (math.isfinite(value) and value > above and least <= value <= most):
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
    check_number("z_loss", loss.z_loss)
    for name in ("t_squared", "standardize"):
        if not isinstance(getattr(loss, name), bool):
            raise TypeError(f"{name} must be a bool, got {getattr(loss, name)!r}")
    if loss.reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {loss.reduction!r}")
    if isinstance(loss.ignore_index, bool) or not isinstance(loss.ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {loss.ignore_index!r}")


def _logits(name: str, x) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {x.dtype} of shape {tuple(x.shape)}")
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


def _no_gradient(name: str, x) -> None:
    if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
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
    needs_teacher = loss.needs_teacher and loss.kd_weight != 0
    if teacher is None:
        if needs_teacher:
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
        if not needs_teacher:
            _no_gradient("teacher_logits", teacher)
            teacher = None
    if labels is None and ((loss.needs_labels and loss.kd_weight != 0) or loss.ce_weight):
        raise ValueError(f"{type(loss).__name__} with ce_weight={loss.ce_weight} needs labels")
    if labels is not None:
        labels = _like("labels", labels, student)
        if labels.is_floating_point() or labels.dtype == torch.bool or labels.is_complex():
            raise TypeError(f"labels must be integers, got {labels.dtype} of shape {tuple(labels.shape)}")
        labels = (labels if labels.dim() == 1 else labels.reshape(-1)).to(torch.int64).contiguous()
    if row_weight is not None:
        row_weight = _like("row_weight", row_weight, student)
        _no_gradient("row_weight", row_weight)
        row_weight = row_weight.reshape(-1).to(torch.float64)
    _no_gradient("temperature", temperature)
    if isinstance(temperature, Tensor):
        _like("temperature", temperature, student) if temperature.dim() else None
    elif temperature is not None:
        check_number("temperature", temperature, above=0)
    if vocab_mask is not None:
        vocab_mask = _mask(vocab_mask, student, vocab)
    if loss.standardize:  # the gradient is a sum of two (through the row and its deviation): rounded once, at the end
        student = student if student.dtype == torch.float64 else student.float()
        if teacher is not None and teacher.dtype != torch.float64:
            teacher = teacher.float()
    return Rows(student, teacher, labels, vocab_mask, row_weight, vocab)


def check_out(out, student: Tensor) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor, got {type(out).__name__}")
    if out.shape != student.shape or out.dtype != student.dtype or out.device != student.device:
        raise ValueError(f"out must be like student_logits {tuple(student.shape)} {student.dtype} on {student.device}, "
                         f"got {tuple(out.shape)} {out.dtype} on {out.device}")  # fmt: skip
    if out.requires_grad and out.is_leaf:
        raise ValueError("out is a leaf that requires grad; pass out.detach()")


def _mask(mask, student: Tensor, vocab: int) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"vocab_mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if mask.dim() != 1 or mask.shape[0] not in (student.shape[-1], vocab):
        raise ValueError(f"vocab_mask must have shape ({student.shape[-1]},), got {tuple(mask.shape)}")
    if mask.device != student.device:
        raise ValueError(f"vocab_mask must be on student_logits' device {student.device}, got {mask.device}")
    return mask[:vocab].contiguous()


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
        T = torch.as_tensor(temperature, dtype=torch.float64, device=args.device).reshape(-1)
    student = 1 / T
    teacher = args[:, 1] if loss.teacher_temperature is not None else student
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


def weighting(loss: Loss, rows: Rows, num_items) -> tuple[Tensor | None, float]:
    """weight (N or 1,) float64 or None, and the divisor: a row's loss counts weight / divisor times.

    Divisor 0 stands for the number of kept rows, which only the labels know.
    """
    if num_items is not None and loss.reduction != "mean":
        raise ValueError(f"num_items replaces the denominator of reduction='mean', not of {loss.reduction!r}")
    if loss.reduction == "mean":
        if num_items is None:
            return rows.weight, 0.0
        if not isinstance(num_items, (int, float, Tensor)) or isinstance(num_items, bool):
            raise TypeError(f"num_items must be a number or a tensor, got {type(num_items).__name__}")
        if not isinstance(num_items, Tensor):
            if not num_items > 0:
                raise ValueError(f"num_items must be > 0, got {num_items}")
            return rows.weight, float(num_items)
        if num_items.numel() != 1:
            raise ValueError(f"num_items must have one element, got shape {tuple(num_items.shape)}")
        items = num_items.reshape(1).to(rows.student.device, torch.float64)
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
