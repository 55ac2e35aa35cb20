"""TRL's distillation trainers with the losses of kdkernels."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ..linear import LinearLoss
from ..linearcall import autocast
from ..loss import Loss, Point
from ..separable import JSDLoss

# Where TRL keeps a generalised JSD: of logits, a static method of the trainer; of hidden states, a function beside it.
TRAINERS = (("trl.experimental.gkd.gkd_trainer", "GKDTrainer"), ("trl.experimental.gold.gold_trainer", "GOLDTrainer"))
CHUNKED = "trl.trainer.distillation_trainer", "_chunked_divergence_loss"
_theirs: dict[tuple[str, str], Any] = {}


def generalized_jsd_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None,
                         beta: float = 0.5, temperature: float = 1.0, reduction: str = "batchmean",
                         num_items_in_batch=None) -> Tensor:  # fmt: skip
    """`JSDLoss(beta, temperature=...)` in the form of TRL's GKDTrainer: (..., V) logits, aligned labels (...).

    Its "batchmean" is a mean over the rows with a label other than -100, and its "mean" one over their classes, too.

    Raises:
        ValueError: the reduction is another one than those and "sum", which give numbers of single classes.
    """
    if not _one_number(reduction, num_items_in_batch):
        raise ValueError(f"reduction must be 'batchmean', 'mean' or 'sum', got {reduction!r}")
    summed = reduction == "sum" and num_items_in_batch is None
    loss = JSDLoss(beta, temperature=temperature, reduction="sum" if summed else "mean")
    value = loss(student_logits, teacher_logits, labels, num_items=None if summed else num_items_in_batch)
    return value / student_logits.shape[-1] if reduction == "mean" and num_items_in_batch is None else value


def chunked_divergence_loss(student_hidden_states: Tensor, teacher_hidden_states: Tensor,
                            student_lm_head_weight: Tensor, teacher_lm_head_weight: Tensor, completion_mask: Tensor,
                            beta: float, num_items_in_batch=None, student_lm_head_bias: Tensor | None = None,
                            teacher_lm_head_bias: Tensor | None = None, student_logit_scale: float = 1.0,
                            teacher_logit_scale: float = 1.0, student_final_logit_softcapping: float | None = None,
                            teacher_final_logit_softcapping: float | None = None, temperature: float = 1.0,
                            ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`LinearLoss(JSDLoss(beta, temperature=...))` in the form of TRL's DistillationTrainer, with what it logs.

    Hidden states (..., H) and (..., H2), heads (V, H) and (V, H2), a mask (...) of the positions that count. The logits
    are made in the dtype of the hidden states, or autocast's; TRL makes them in float32.

    Returns:
        The loss, the sum of the student's entropies (from another sweep over its logits), the number of positions.
    """
    heads = [_whole(weight, bias, hidden) for weight, bias, hidden in (
        (student_lm_head_weight, student_lm_head_bias, student_hidden_states),
        (teacher_lm_head_weight, teacher_lm_head_bias, teacher_hidden_states))]  # fmt: skip
    (student, bias), (teacher, teacher_bias) = heads
    labels = torch.where(completion_mask != 0, 0, -100)
    own = dict(student_logit_scale=student_logit_scale, student_softcap=student_final_logit_softcapping)
    loss = LinearLoss(JSDLoss(beta, temperature=temperature), **own, teacher_logit_scale=teacher_logit_scale,
                      teacher_softcap=teacher_final_logit_softcapping)  # fmt: skip
    value = loss(student_hidden_states, student, teacher_hidden_states.detach(), teacher.detach(), labels,
                 student_bias=bias, teacher_bias=None if teacher_bias is None else teacher_bias.detach(),
                 num_items=num_items_in_batch)  # fmt: skip
    with torch.no_grad():
        entropy = LinearLoss(_Entropy(temperature=temperature, reduction="sum"), **own)
        return value, entropy(student_hidden_states, student, labels=labels, student_bias=bias), (labels == 0).sum()


class _Entropy(Loss):
    """`-sum_i q_i log q_i` of the student."""

    needs_teacher = False

    def points(self):
        return (Point(student=1),)

    def value(self, q):
        return q.lse - q.s


def _whole(weight: Tensor, bias: Tensor | None, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """A head that FSDP2 has cut, gathered; in the dtype of its hidden states, if autocast does not see to that."""
    weight, bias = (x.full_tensor() if hasattr(x, "full_tensor") else x for x in (weight, bias))
    if autocast(hidden) is not None:
        return weight, bias
    return weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)


def _one_number(reduction: str, num_items_in_batch) -> bool:
    return reduction in ("batchmean", "mean", "sum") or num_items_in_batch is not None


def patch() -> list[str]:
    """Has TRL's GKDTrainer, GOLDTrainer and DistillationTrainer compute their loss with kdkernels; -> the names of what
    was replaced.

    Values and gradients stay those of TRL's formula; GOLD's call with probabilities in the place of logits, and heads
    that DeepSpeed has cut, stay TRL's. Undone by `unpatch`.

    Raises:
        ImportError: TRL is not installed, or has none of them where this version of kdkernels looks for them.
    """
    done = []
    for module, name in (*TRAINERS, CHUNKED):
        try:
            holder, attribute = _place(module, name)
            theirs = _theirs.setdefault((module, name), getattr(holder, attribute))
        except (ImportError, AttributeError):
            continue
        ours = _chunked(theirs) if (module, name) == CHUNKED else staticmethod(_of_logits(theirs))
        setattr(holder, attribute, ours)
        done.append(name if (module, name) == CHUNKED else f"{name}.{attribute}")
    if not done:
        raise ImportError("kdkernels.integrations.trl needs TRL (pip install trl), tested with 1.16: found neither "
                          + " nor ".join(f"{module}.{name}" for module, name in (*TRAINERS, CHUNKED)))  # fmt: skip
    return done


def unpatch() -> None:
    """TRL's own losses again."""
    for (module, name), theirs in _theirs.items():
        holder, attribute = _place(module, name)
        setattr(holder, attribute, theirs if (module, name) == CHUNKED else staticmethod(theirs))
    _theirs.clear()


def _place(module: str, name: str) -> tuple[Any, str]:
    """What holds a loss of TRL's, and under which name."""
    found = importlib.import_module(module)
    return (found, name) if (module, name) == CHUNKED else (getattr(found, name), "generalized_jsd_loss")


def _of_logits(theirs):
    def loss(student_logits, teacher_logits, labels=None, beta=0.5, temperature=1.0, reduction="batchmean",
             num_items_in_batch=None, **other):  # fmt: skip
        if any(other.values()) or not _one_number(reduction, num_items_in_batch):
            return theirs(student_logits, teacher_logits, labels, beta, temperature, reduction=reduction,
                          num_items_in_batch=num_items_in_batch, **other)  # fmt: skip
        return generalized_jsd_loss(student_logits, teacher_logits, labels, beta, temperature, reduction,
                                    num_items_in_batch)  # fmt: skip

    return loss


def _chunked(theirs):
    def loss(*given, **named):
        cut = any(hasattr(x, "ds_id") for x in (*given, *named.values()))
        return (theirs if cut else chunked_divergence_loss)(*given, **named)

    return loss
