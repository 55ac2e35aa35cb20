"""Comparative distillation: the student matches differences between the teacher's outputs, N^2 of them for N calls of
it.

    kdkernels distill --recipe comparative

Claim: With few calls of the teacher, matching differences is better than matching outputs.

With d_i = s_i - t_i the mean over all pairs of ||d_i - d_j||^2 is 2 (mean ||d_i||^2 - ||mean d||^2): within a batch the
squared error of the logits without their common offset, in O(N). Pairs across batches are what adds something: here
with the residuals of the last 512 pictures, or as many as there were yet, kept. The teacher is asked about 2,000
pictures only. The published code has no loss to compare with; weight 0.5 beside the cross-entropy is our choice.

Expected (mean of 3 seeds):

    comparative 72.8 > logit error 72.4: within noise
    across batches 72.3 > logit error 72.4: within noise
    logit error 72.4 > cross-entropy 49.6: yes
"""

import torch
import torch.nn.functional as F
from torch import nn

from ..images import accuracy
from ..lab import Update, logits_of

SOURCE = "Wilf et al. 2023, Comparative knowledge distillation"
FIGURE = "top-1 accuracy, %"
TREND = [("comparative", "logit error"), ("across batches", "logit error"), ("logit error", "cross-entropy")]
WHOLE = "pairs are those of a whole batch"
CALLS, KEPT, WEIGHT = 2000, 512, 0.5


def pairs(d):
    """mean over i, j of ||d_i - d_j||^2."""
    return 2 * (d.square().sum(1).mean() - d.mean(0).square().sum())


def across(d, other):
    """mean over i, j of ||d_i - o_j||^2, the o constants."""
    return d.square().sum(1).mean() - 2 * d.mean(0) @ other.mean(0) + other.square().sum(1).mean()


class Remembering(nn.Module):
    """A student, and the residuals of the last pictures, which a resumed run needs too."""

    def __init__(self, student, classes):
        super().__init__()
        self.student = student
        self.residuals: torch.Tensor
        self.kept: torch.Tensor
        self.register_buffer("residuals", torch.zeros(KEPT, classes))
        self.register_buffer("kept", torch.zeros((), dtype=torch.int64))  # how many of them there are yet

    def forward(self, x):
        return self.student(x)

    def remember(self, d):
        self.residuals.copy_(torch.cat((d.detach(), self.residuals))[:KEPT])
        self.kept.add_(len(d)).clamp_(max=KEPT)


def arms(net):
    """{arm: f(residuals)}."""

    def with_memory(d):
        before = net.residuals[: net.kept].clone()
        net.remember(d)
        return (pairs(d) + across(d, before)) / 2 if len(before) else pairs(d)

    return {"logit error": lambda d: d.square().sum(1).mean(), "comparative": pairs, "across batches": with_memory}


def run(lab):
    data = lab.data(train=CALLS)
    figures = {"cross-entropy": accuracy(lab.plain(data=data), lab.data())}
    teacher = lab.teacher()
    logits = logits_of(teacher, data)
    for arm in arms(None):
        net = Remembering(lab.student(), logits.shape[1])
        own = arms(net)[arm]

        def loss(batch, net=net, own=own):
            s = net(batch.images)
            return F.cross_entropy(s, batch.labels) + WEIGHT * own(s - logits[batch.at]) / s.shape[1]

        lab.train(arm.replace(" ", "-"), net, [Update(loss, list(net.parameters()))], data=data, teacher=teacher)
        figures[arm] = accuracy(net, lab.data())
    return figures
