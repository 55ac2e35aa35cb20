"""Figures on held-out text, a few rows at a time: the logits of a whole validation set would fill the memory."""

import torch
import torch.nn.functional as F

from .models import logits_of

ROWS = 256


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
        log_p = logits_of(teacher, x).float().log_softmax(-1)
        for name, student in students.items():
            log_q = logits_of(student, x).float().log_softmax(-1)
            totals[name] += torch.stack(compare(log_p, log_q, y)).double()
    kept = int((labels != -100).sum())
    names = ("ce", "kl", "agreement", "acceptance")
    return {name: dict(zip(names, (total / kept).tolist(), strict=True)) for name, total in totals.items()}


def compare(log_p, log_q, labels):
    """log-probabilities (N, V), labels (N) -> the four sums over the rows kept."""
    kept = labels != -100
    p, q = log_p.exp(), log_q.exp()
    kl = (p * (log_p - log_q)).sum(-1)
    same = log_p.argmax(-1) == log_q.argmax(-1)
    overlap = torch.minimum(p, q).sum(-1)
    ce = F.nll_loss(log_q, labels, reduction="sum", ignore_index=-100)
    return ce, kl[kept].sum(), same[kept].sum(), overlap[kept].sum()
