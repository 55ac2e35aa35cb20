"""From what a user passes to what a kernel takes: checks, shapes, row arguments and the factors of a reduction."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .options import ELSEWHERE, check_number, readable

if TYPE_CHECKING:
    from .base import BaseLoss
    from .loss import Loss, Program


class Rows(NamedTuple):
    """student (..., W), teacher (..., W2) or None, labels (N,) int64 or None, mask (vocab,), classes [0, vocab).
    Of one rank's columns, and labels among them, if there are `shards` (`parallel.Shards`)."""

    student: Tensor
    teacher: Tensor | None
    labels: Tensor | None
    mask: Tensor | None
    weight: Tensor | None
    vocab: int
    shards: Any = None


def detached(rows: Rows) -> Rows:
    teacher = None if rows.teacher is None else rows.teacher.detach()
    return rows._replace(student=rows.student.detach(), teacher=teacher)


class Shaped(NamedTuple):
    """What the checks look at of logits that are never whole in memory."""

    shape: torch.Size
    device: torch.device


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_logits(name: str, x) -> None:
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
        x = x.clone(memory_format=torch.contiguous_format)  # contiguous() leaves a tensor without rows as it is
    if x.dim() in (2, 3):
        return x
    return x.unsqueeze(0) if x.dim() == 1 else x.reshape(-1, *x.shape[-2:])


def _like(name: str, x, student: Tensor | Shaped) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.shape != student.shape[:-1]:
        raise ValueError(f"{name} must have shape {tuple(student.shape[:-1])} for student_logits of shape "
                         f"{tuple(student.shape)}, got {tuple(x.shape)}")  # fmt: skip
    if x.device != student.device:
        raise ValueError(f"{name} must be on student_logits' device {student.device}, got {x.device}")
    return x


def _constant(name: str, x: Tensor) -> None:
    if x.dtype == torch.bool or x.is_complex():
        raise TypeError(f"{name} must be real numbers, got {_name(x.dtype)}")
    if x.requires_grad:
        raise ValueError(f"{name} requires grad, but no gradient flows to it; pass {name}.detach()")


def unused(value: Tensor, teacher: Any) -> Tensor:
    """The value, whose gradient for a teacher that the loss does not look at is 0, and not None."""
    if not isinstance(teacher, Tensor) or not teacher.requires_grad:
        return value
    own = teacher.to_local() if hasattr(teacher, "to_local") else teacher
    return value + own[..., :0].sum().to(value.dtype)


def check(loss: BaseLoss, student, teacher, labels, row_weight, temperature, vocab_size, vocab_mask) -> Rows:
    """The call's tensors in the shapes kernels take.

    Raises:
        TypeError, ValueError: naming the argument, its shape and what was expected.
    """
    check_logits("student_logits", student)
    vocab = check_vocab(vocab_size, student)
    if teacher is None:
        if loss._uses.teacher:
            raise ValueError(f"{type(loss).__name__} needs teacher_logits")
    else:
        check_logits("teacher_logits", teacher)
        fits = teacher.shape == student.shape or (
            vocab_size is not None and teacher.shape[:-1] == student.shape[:-1] and teacher.shape[-1] >= vocab_size
        )
        if not fits:
            raise ValueError(f"teacher_logits must have student_logits' shape {tuple(student.shape)}, "
                             f"got {tuple(teacher.shape)}")  # fmt: skip
        if teacher.device != student.device:
            raise ValueError(f"teacher_logits must be on student_logits' device {student.device}, got {teacher.device}")
        if not loss._uses.teacher:  # one signature for all losses
            teacher = None
    labels, vocab_mask, row_weight = check_rows(loss, student, vocab, labels, row_weight, temperature, vocab_mask)
    if loss.standardize:  # the gradient is a sum of two (through the row and its deviation): rounded once, at the end
        student = student if student.dtype == torch.float64 else student.float()
        if teacher is not None and teacher.dtype != torch.float64:
            teacher = teacher.float()
    return Rows(student, teacher, labels, vocab_mask, row_weight, vocab)


def check_vocab(vocab_size: int | None, student: Tensor | Shaped) -> int:
    """The number of classes: vocab_size, or the width of the student's logits."""
    width = student.shape[-1]
    if vocab_size is None:
        return width
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise TypeError(f"vocab_size must be an int, got {type(vocab_size).__name__}")
    if not 1 <= vocab_size <= width:
        raise ValueError(f"vocab_size must be in [1, {width}] for student_logits {tuple(student.shape)}, "
                         f"got {vocab_size}")  # fmt: skip
    return vocab_size


def check_rows(loss: BaseLoss, student: Tensor | Shaped, vocab: int, labels, row_weight, temperature, vocab_mask):
    """What a call has beside logits: labels (N,) int64, mask (vocab,) and row weights (N,) float64, each or None."""
    if labels is None and loss._uses.labels:
        cause = "" if loss.needs_labels and loss.kd_weight else f" with ce_weight={loss.ce_weight}"
        raise ValueError(f"{type(loss).__name__}{cause} needs labels")
    if labels is not None:
        labels = _like("labels", labels, student)
        if labels.is_floating_point() or labels.dtype == torch.bool or labels.is_complex():
            raise TypeError(f"labels must be integers, got {labels.dtype} of shape {tuple(labels.shape)}")
        if labels.dim() != 1 or labels.dtype != torch.int64 or not labels.is_contiguous():  # each costs a small batch
            labels = labels.reshape(-1).to(torch.int64).contiguous()
        if loss.validate and not torch.compiler.is_compiling():
            check_labels(labels, vocab, loss.ignore_index)
    if row_weight is not None:
        row_weight = _like("row_weight", row_weight, student)
        _constant("row_weight", row_weight)
        row_weight = row_weight.reshape(-1).to(torch.float64).contiguous()
    if isinstance(temperature, Tensor):
        _temperature(temperature, student, None if labels is None else labels != loss.ignore_index)
    elif temperature is not None:
        check_number("temperature", temperature, above=0)
    if vocab_mask is not None:
        vocab_mask = check_mask(vocab_mask, student, vocab)
        if labels is not None and readable(vocab_mask):
            live = labels[(labels != loss.ignore_index) & (labels >= 0) & (labels < vocab)]  # kernels refuse the rest
            if not (kept := vocab_mask[live]).all():
                raise ValueError(f"labels must be classes that vocab_mask keeps, got {live[~kept][0].item()}")
    return labels, vocab_mask, row_weight


def check_labels(labels: Tensor, vocab: int, ignore: int) -> None:
    wrong = (labels != ignore) & ((labels < 0) | (labels >= vocab))
    if wrong.any():
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(f"labels must be in [0, {vocab}) or ignore_index={ignore}, "
                         f"got {labels[row].item()} at row {row}")  # fmt: skip


def _temperature(temperature: Tensor, student: Tensor | Shaped, keep: Tensor | None) -> None:
    _constant("temperature", temperature)
    if temperature.dim():
        _like("temperature", temperature, student)
    if readable(temperature):
        bad = ~((temperature > 0) & (temperature < math.inf)).reshape(-1)
        bad = bad & keep if keep is not None and temperature.dim() else bad
        if bad.any():
            raise ValueError(f"temperature must be > 0 and finite, got {temperature.reshape(-1)[bad][0].item()}")


def check_mask(mask, student: Tensor | Shaped, vocab: int, least: int = 1) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"vocab_mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if mask.dim() != 1 or mask.shape[0] not in (student.shape[-1], vocab):
        raise ValueError(f"vocab_mask must have shape ({student.shape[-1]},), got {tuple(mask.shape)}")
    if mask.device != student.device:
        raise ValueError(f"vocab_mask must be on student_logits' device {student.device}, got {mask.device}")
    mask = mask[:vocab].contiguous()
    if least and readable(mask) and not mask.any():
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
    if loss.standardize or isinstance(temperature, Tensor):  # numbers stay on the host: a copy waits for the device
        args = args.to(rows.student.device)
    T = args[:, 2]
    if temperature is not None:
        if not isinstance(temperature, Tensor):  # torch.compile would hold a number in as_tensor or full constant
            temperature = torch.ones(1, dtype=torch.float64) * float(temperature)
        T = temperature.reshape(-1).to(args.device, torch.float64)
    student = 1 / T
    teacher = args[:, 1] if loss._uses.teacher_temperature else student
    if loss.standardize:
        student, *teachers = (x * y for x, y in zip((student, teacher), _inverse_deviations(loss, rows), strict=False))
        teacher = teachers[0] if teachers else teacher
    head = torch.broadcast_tensors(student, teacher, T, args[:, 2])
    count = head[0].shape[0]
    return torch.cat((torch.stack(head[:3], -1), args[:, 3:].expand(count, -1)), -1)


def _inverse_deviations(loss: Loss, rows: Rows) -> list[Tensor]:
    """(N,) float64, of the student's rows and of the teacher's: 1 / standard deviation over live classes,
    differentiable."""
    from .functional import INVERSE_DEVIATION as deviation

    kept = None if rows.labels is None else rows.labels != loss.ignore_index
    labels = None if kept is None else torch.where(kept, ELSEWHERE, deviation.ignore_index)
    sides = [x for x in (rows.student, rows.teacher) if x is not None]
    if rows.student.dtype == torch.float64:  # float64 throughout: a narrower teacher's deviation would be rounded
        sides = [x.double() for x in sides]
    alone = [rows._replace(student=x, teacher=None, labels=labels, weight=None) for x in sides]
    return [x.reshape(-1).to(torch.float64) for x in deviation.each(alone)]


def weighting(loss: BaseLoss, rows: Rows, num_items) -> tuple[Tensor | None, float]:
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
            if readable(num_items) and not bool(num_items >= 0):
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
    """Weighted row losses; a row that is not kept, or whose weight is 0, is 0 whatever its loss."""
    counts = factor != 0 if labels is None else (factor != 0) & (labels != ignore)
    return torch.where(counts, value * factor, 0.0)


def result_dtype(student: Tensor) -> torch.dtype:
    return torch.float64 if student.dtype == torch.float64 else torch.float32


def reduced(value: Tensor, student: Tensor, labels, weight, divisor: float, ignore: int, per_row: bool) -> Tensor:
    """Row losses (N,) -> what a call returns."""
    value = apply_factor(value, factor(weight, divisor, labels, ignore, student), labels, ignore)
    value = value.to(result_dtype(student))
    return value.view(student.shape[:-1]) if per_row else value.sum()
