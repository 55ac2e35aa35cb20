"""DistiLLM: skewed KLs, and the student's own text where that of the fixed set does not help any more.

    kdkernels distill --recipe distillm

Claim: Skewed KLs are better than the KLs, and better still with the student's own text, adaptively.

KL(q || (1 - a) p + a q), a = 0.1, the skewed reverse KL. phi, the share of batches of the student's own text, starts at
0 and rises by 0.1 whenever the cross-entropy on held-out text did not fall below where it was when it last rose (every
10 steps; the code asks for 0.1 nats more than that, in runs of many epochs). A step's text is written anew with
probability phi (1 - step / total), or while the store of such texts is not full, kept there, and otherwise is one from
the store: off-policy. 64 texts fit (in the code 1000).

Expected (mean of 3 seeds):

    DistiLLM 64.4 > supervised 63.4: yes
    skew reverse KL 64.1 > reverse KL 63.5: yes
    DistiLLM 64.4 > skew reverse KL 64.1: yes
"""

import math

import torch
from torch import nn

import kdkernels as kd

from .. import textlab
from . import divergences

LAB, FIGURE = divergences.LAB, divergences.FIGURE
SOURCE = "Ko et al. 2024, DistiLLM: towards streamlined distillation for large language models (ICML)"
TREND = [("DistiLLM", "supervised"), ("skew reverse KL", "reverse KL"), ("DistiLLM", "skew reverse KL")]
LOSS = kd.SkewReverseKLLoss(alpha=0.1)
EVERY, RISE, MORE, CAPACITY = 10, 0.1, 0.0, 64


class Adaptive(nn.Module):
    """tokens(net, batch) and the state of the schedule, for a training run of `total` steps."""

    phi: torch.Tensor
    before: torch.Tensor
    store: torch.Tensor
    count: torch.Tensor

    def __init__(self, lab, total):
        super().__init__()
        self.lab, self.total = lab, total
        self.register_buffer("phi", torch.zeros(()))
        self.register_buffer("before", torch.tensor(math.inf))
        self.register_buffer("store", torch.zeros(CAPACITY, textlab.PROMPT + textlab.RESPONSE, dtype=torch.int64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def look(self, value):
        """`value`: the loss on held-out text."""
        if value >= self.before + MORE:
            self.phi.add_(RISE).clamp_(max=1.0)
        if value >= self.before + MORE or self.before == math.inf:
            self.before.fill_(value)

    def forward(self, net, batch):
        if batch.step % EVERY == 0:
            self.look(self.lab.cross_entropy(net, self.lab.data().watched))
        r, size = torch.rand((), generator=batch.noise), len(batch.inputs)
        full = self.count >= CAPACITY
        if r < self.phi * (1 - batch.step / self.total) or (r < self.phi and not full):
            own = self.lab.written(net, batch.inputs, batch.noise)
            self.store[(self.count + torch.arange(size)) % CAPACITY] = own
            self.count.add_(size)
            return own
        if r < self.phi:
            return self.store[torch.randint(CAPACITY, (size,), generator=batch.noise)]
        return batch.inputs


def run(lab):
    losses = {"reverse KL": kd.ReverseKLLoss(), "skew KL": kd.SkewKLLoss(alpha=0.1), "skew reverse KL": LOSS}
    figures, net = divergences.run(lab, losses), lab.student()
    net.schedule = Adaptive(lab, textlab.STEPS * lab.share)
    return figures | lab.figures("DistiLLM", lab.distil("distillm", LOSS, net.schedule, net=net))
