"""TRL's distillation trainers with the losses of kdkernels."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from ..separable import JSDLoss

# Where TRL keeps a generalised JSD of logits, as a static method.
TRAINERS = (("trl.experimental.gkd.gkd_trainer", "GKDTrainer"), ("trl.experimental.gold.gold_trainer", "GOLDTrainer"))
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


def _one_number(reduction: str, num_items_in_batch) -> bool:
    return reduction in ("batchmean", "mean", "sum") or num_items_in_batch is not None


def patch() -> list[str]:
    """Has TRL's GKDTrainer and GOLDTrainer compute their loss with kdkernels; -> the names of what was replaced.

    Values and gradients stay those of TRL's formula; GOLD's call with probabilities in the place of logits stays TRL's.
    Undone by `unpatch`.

    Raises:
        ImportError: TRL is not installed, or has none of them where this version of kdkernels looks for them.
    """
    done = []
    for module, name in TRAINERS:
        try:
            trainer = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
        theirs = _theirs.setdefault((module, name), trainer.generalized_jsd_loss)
        trainer.generalized_jsd_loss = staticmethod(_ours(theirs))
        done.append(f"{name}.generalized_jsd_loss")
    if not done:
        raise ImportError("kdkernels.integrations.trl needs TRL (pip install trl), tested with 1.16: found neither "
                          + " nor ".join(f"{module}.{name}" for module, name in TRAINERS))  # fmt: skip
    return done


def unpatch() -> None:
    """TRL's own losses again."""
    for (module, name), theirs in _theirs.items():
        getattr(importlib.import_module(module), name).generalized_jsd_loss = staticmethod(theirs)
    _theirs.clear()


def _ours(theirs):
    def loss(student_logits, teacher_logits, labels=None, beta=0.5, temperature=1.0, reduction="batchmean",
             num_items_in_batch=None, **other):  # fmt: skip
        if any(other.values()) or not _one_number(reduction, num_items_in_batch):
            return theirs(student_logits, teacher_logits, labels, beta, temperature, reduction=reduction,
                          num_items_in_batch=num_items_in_batch, **other)  # fmt: skip
        return generalized_jsd_loss(student_logits, teacher_logits, labels, beta, temperature, reduction,
                                    num_items_in_batch)  # fmt: skip

    return loss
