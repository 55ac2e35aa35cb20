"""Figures on held-out text, a few rows at a time: the logits of a whole validation set would fill the memory."""

from typing import Any

import torch

import kdkernels as kd

from .models import logits_of

ROWS = 256
KL = kd.ForwardKLLoss(reduction="none")


@torch.no_grad()
def evaluate(students, teacher, inputs, labels):
    """-> {name: {ce, kl, agreement, acceptance}} for {name: model}; means over the positions whose label counts.

    ce: cross-entropy with the text, nats. kl: KL(teacher || student). agreement: both have the same most likely token.
    acceptance: sum_i min(p_i, q_i) = 1 - TVD, the share of the student's drafts that speculative decoding accepts.
    """
    device = next(teacher.parameters()).device
    totals = {name: torch.zeros(4, dtype=torch.float64, device=device) for name in students}
    step = max(1, ROWS // inputs.shape[1])
    for first in range(0, len(inputs), step):
        x, y = inputs[first : first + step].to(device), labels[first : first + step].to(device).flatten()
        told = logits_of(teacher, x).float()
        for name, student in students.items():
            totals[name] += sums(logits_of(student, x).float(), told, y)
    kept = int((labels != -100).sum())
    names = ("ce", "kl", "agreement", "acceptance")
    return {name: dict(zip(names, (total / kept).tolist(), strict=True)) for name, total in totals.items()}


def sums(student_logits, teacher_logits, labels):
    """Logits (N, V), labels (N) -> the four sums over the rows kept (4)."""
    kl, seen = KL.with_metrics(student_logits, teacher_logits, labels)
    rows: list[Any] = [seen.cross_entropy, kl.double(), seen.top1_agreement, seen.acceptance]
    return torch.stack(rows)[:, labels != -100].sum(1)
