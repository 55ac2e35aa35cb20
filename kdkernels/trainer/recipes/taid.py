"""TAID: the target moves from the student to the teacher as the student learns.

    kdkernels distill --recipe taid

Claim: A target between student and teacher that moves to the teacher is better than the teacher from the start.

KL(u || q), u = softmax((1 - tau) s + tau t) detached. With l the cross-entropy of u and q and r its relative fall since
the last step, m <- 0.99 m + 0.01 r and tau <- max(linear rise from 0.4 to 1, tau + 5e-4 sigmoid(m) (1 - tau)), as in
the paper's code. On fixed texts.

Expected (mean of 3 seeds):

    TAID 63.8 > supervised 63.4: yes
    TAID 63.8 > reverse KL 63.5: within noise
"""

import math

import torch
from torch import nn

import kdkernels as kd

from .. import textlab
from . import divergences

LAB, FIGURE = divergences.LAB, divergences.FIGURE
SOURCE = "Shing et al. 2025, TAID: temporally adaptive interpolated distillation (ICLR)"
TREND = [("TAID", "supervised"), ("TAID", "reverse KL")]
WHOLE = "its schedule moves by the loss of a whole batch"
START, END, ALPHA, MOMENTUM = 0.4, 1.0, 5e-4, 0.99


class Moving(nn.Module):
    """The loss and the state of its schedule, for a training run of `total` steps."""

    state: torch.Tensor

    def __init__(self, total):
        super().__init__()
        self.total = total
        self.register_buffer("state", torch.tensor([0.0, START, 0.0, math.inf], dtype=torch.float64))

    def forward(self, s, t, labels):
        step, tau, momentum, before = self.state.tolist()
        value = kd.TAIDLoss(tau)(s, t, labels)
        with torch.no_grad():
            mixed = torch.distributions.Categorical(logits=(1 - tau) * s + tau * t).entropy()
            now = value.item() + mixed[labels >= 0].mean().item()
        if before < math.inf:
            momentum = MOMENTUM * momentum + (1 - MOMENTUM) * (before - now) / (before + 1e-15)
            own = tau + ALPHA * (1 - tau) / (1 + math.exp(-momentum))
            tau = min(END, max(START + (END - START) * step / self.total, own))
        self.state.copy_(torch.tensor([step + 1, tau, momentum, now]))
        return value


def run(lab):
    figures = divergences.run(lab, {"reverse KL": kd.ReverseKLLoss()})
    net = lab.student()
    net.schedule = Moving(textlab.STEPS * lab.share)
    return figures | lab.figures("TAID", lab.distil("taid", net.schedule, net=net))
