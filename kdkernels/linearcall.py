"""What LinearLoss is called with: checks of hidden states and heads."""

from __future__ import annotations

import torch
from torch import Tensor

from . import call
from .base import BaseLoss
from .head import checked_scale
from .sparse import SparseTeacher
from .sweep import Inputs, cast_dtype
from .vocab import SharedVocab

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def autocast(hidden) -> torch.dtype | None:
    """What autocast makes of a product on this device; None where it is off."""
    if not isinstance(hidden, Tensor) or not torch.is_autocast_enabled(hidden.device.type):
        return None
    return torch.get_autocast_dtype(hidden.device.type)


def _tensor(name: str, x, shape: str, dim: int | None = None) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if hasattr(x, "full_tensor"):
        raise TypeError(f"{name} is a DTensor; pass it whole, {name}.full_tensor()")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got {x.layout}")
    if (x.dim() == 0 if dim is None else x.dim() != dim) or x.shape[-1] == 0:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
    return x


def check_head(side: str, hidden, head, bias, cast: torch.dtype | None, quantised: bool = False) -> None:
    hidden_name, head_name = f"{side}_hidden", f"{side}_head"
    _tensor(hidden_name, hidden, "(..., H)")
    _tensor(head_name, head, "(V, H)", 2)
    if hidden.dtype not in FLOATS:
        raise TypeError(f"{hidden_name} must be float64, float32, float16 or bfloat16, got {hidden.dtype}")
    if head.shape[1] != hidden.shape[-1] or not len(head):
        raise ValueError(f"{head_name} must have shape (V, {hidden.shape[-1]}) for {hidden_name} of shape "
                         f"{tuple(hidden.shape)}, got {tuple(head.shape)}")  # fmt: skip
    weights = [] if quantised else [(head_name, head)]
    if bias is not None:
        weights.append((f"{side}_bias", _tensor(f"{side}_bias", bias, f"({len(head)},)", 1)))
        if len(bias) != len(head):
            raise ValueError(f"{side}_bias must have shape ({len(head)},), got {tuple(bias.shape)}")
    for name, x in weights:
        if x.dtype not in FLOATS or cast_dtype(x, cast) != cast_dtype(hidden, cast):
            raise TypeError(f"{name} must be {hidden.dtype} like {hidden_name}, got {x.dtype}")
    for name, x in [(head_name, head), *weights]:
        if x.device != hidden.device:
            raise ValueError(f"{name} must be on {hidden_name}'s device {hidden.device}, got {x.device}")


def check_shared(shared, x: Inputs, group) -> None:
    if not isinstance(shared, SharedVocab):
        raise TypeError(f"shared_vocab must be a SharedVocab, got {type(shared).__name__}")
    if group is not None:
        raise ValueError("shared_vocab needs heads of the whole vocabularies, not shards of them: pass no group")
    if isinstance(x.teacher_logits, SparseTeacher):
        raise ValueError("a SparseTeacher needs no shared_vocab: pass teacher_logits=shared_vocab(teacher)")
    if isinstance(x.student_hidden, Tensor) and shared.student.device != x.student_hidden.device:
        raise ValueError(f"shared_vocab must be on student_hidden's device {x.student_hidden.device}, got "
                         f"{shared.student.device}")  # fmt: skip


def check_teacher(loss: BaseLoss, x: Inputs, student: call.Shaped, vocab_size: int | None, shared: SharedVocab | None,
                  cast) -> Inputs:  # fmt: skip
    """The inputs with the teacher's as constants, or without a teacher where the loss looks at none."""
    names = ("teacher_hidden", "teacher_head", "teacher_bias", "teacher_head_scale", "teacher_logits")
    if not loss._uses.teacher:
        return x._replace(**dict.fromkeys(names))
    if x.teacher_logits is not None:
        if given := [name for name in names[:-1] if getattr(x, name) is not None]:
            raise ValueError(f"teacher_logits stand in for the teacher's hidden states and head: pass no {given[0]}")
        if isinstance(x.teacher_logits, SparseTeacher):
            x.teacher_logits.check(student, vocab_size or student.shape[-1])
            return x._replace(teacher_logits=None)
        call.check_logits("teacher_logits", x.teacher_logits)
        shape, source, device = x.teacher_logits.shape, "teacher_logits", x.teacher_logits.device
    else:
        if x.teacher_hidden is None or x.teacher_head is None:
            raise ValueError(f"{type(loss).__name__} needs teacher_hidden and teacher_head, or teacher_logits")
        x = x._replace(teacher_head_scale=checked_scale(x.teacher_head, x.teacher_head_scale))
        quantised = x.teacher_head_scale is not None
        check_head("teacher", x.teacher_hidden, x.teacher_head, x.teacher_bias, cast, quantised)
        shape = torch.Size((*x.teacher_hidden.shape[:-1], len(x.teacher_head)))
        source, device = "teacher_hidden and teacher_head", x.teacher_hidden.device
    if shared is not None and shape[-1] < shared.teacher_vocab:
        raise ValueError(f"{source} must give logits of the {shared.teacher_vocab} classes of shared_vocab's teacher "
                         f"or more, got {tuple(shape)}")  # fmt: skip
    free = shared is not None or (loss.any_width and vocab_size is None and x.mask is None)
    fits = free or (shape[-1] == student.shape[-1] if vocab_size is None else shape[-1] >= vocab_size)
    if shape[:-1] != student.shape[:-1] or not fits:
        raise ValueError(f"{source} must give logits of the student's shape {tuple(student.shape)}, got {tuple(shape)}")
    if device != student.device:
        raise ValueError(f"{source} must be on the student's device {student.device}, got {device}")
    tied = (x.student_head, x.student_bias)
    for name in names:
        y = getattr(x, name)
        if y is not None and y.requires_grad and torch.is_grad_enabled() and not any(y is own for own in tied):
            raise ValueError(f"{name} requires grad, but LinearLoss gives a teacher no gradient: it keeps no logits "
                             f"to pass one through; pass {name}.detach(), or call the loss on logits")  # fmt: skip
    x = x._replace(**{n: None if getattr(x, n) is None else getattr(x, n).detach() for n in names})
    if shared is not None:
        vocab_size = shared.teacher_vocab
    if vocab_size is None:
        return x
    if x.teacher_logits is not None:
        return x._replace(teacher_logits=x.teacher_logits[..., :vocab_size])
    return x._replace(teacher_head=x.teacher_head[:vocab_size])
