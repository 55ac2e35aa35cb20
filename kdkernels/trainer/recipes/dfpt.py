"""A teacher of two forward paths: the one it was trained as, and one through prompts, which learns what suits the
student.

    kdkernels distill --recipe dfpt

Claim: A teacher whose second path is tuned to the student teaches better than the pretrained one.

After each stage of the frozen teacher a prompt block (a 1 x 1 convolution to a quarter of the channels; convolutions of
1, 3 and 5 pixels on half of these, each with a 1 x 1 behind it; a 1 x 1 back) adds to the features, 0 at first; a
second head makes logits of them. Each batch has two updates. Prompts and second head: CE + a T^2 KL(p || p') + b T^2
KL(q || p') of the first path's p, the prompt path's p' and the student's q, a constant. Then the student: KD from p'.
No code and no weights are public: a = 1, b = 0.1 (with b = 1 the student's own output is half of what it is told, and
it learns at half the pace), T = 4, KD's alpha = 0.9 and the sum as the fusion are our choices. DFPT-KD+ would train the
whole path, and is not here.

Expected (mean of 3 seeds):

    DFPT-KD 74.5 > KD 75.3: within noise
    DFPT-KD 74.5 > cross-entropy 68.6: yes
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import kdkernels as kd

from ..images import accuracy
from ..lab import Update
from . import kd as hinton

SOURCE = "Li et al. 2025, Dual-forward path teacher knowledge distillation (arXiv 2506.18244)"
FIGURE = hinton.FIGURE
TREND = [("DFPT-KD", "KD"), ("DFPT-KD", "cross-entropy")]
T, A, B, LR = 4.0, 1.0, 0.1, 0.02
KERNELS = 1, 3, 5


class Prompt(nn.Module):
    """(N, C, H, W) -> the same, 0 before it has learnt."""

    def __init__(self, channels, rate=4):
        super().__init__()
        inner = channels // rate
        self.part = inner // 2
        self.down, self.up = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1)
        self.partial = nn.ModuleList(nn.Conv2d(self.part, self.part, k, padding=k // 2) for k in KERNELS)
        self.point = nn.ModuleList(nn.Conv2d(inner, inner, 1) for _ in KERNELS)
        for p in self.up.parameters():
            nn.init.zeros_(p)

    def forward(self, x):
        x = F.gelu(self.down(x))
        for partial, point in zip(self.partial, self.point, strict=True):
            x = F.gelu(point(torch.cat((partial(x[:, : self.part]), x[:, self.part :]), 1)))
        return self.up(x)


class DualPath(nn.Module):
    """The prompt path of a frozen teacher, whose own path is the teacher."""

    def __init__(self, teacher):
        super().__init__()
        self.teacher, self.second = teacher, copy.deepcopy(teacher.head).requires_grad_(True)
        self.prompts = nn.ModuleList(Prompt(width) for width in teacher.widths)

    def own(self):
        return [*self.prompts.parameters(), *self.second.parameters()]

    def forward(self, x):
        self.teacher.eval()
        body, prompts = self.teacher.body, iter(self.prompts)
        for i, layer in enumerate(body):
            x = layer(x)
            if i + 1 == len(body) or isinstance(layer, nn.MaxPool2d):  # the end of a stage
                x = x + next(prompts)(x)
        return self.second(x.mean(2).flatten(1))


class Both(nn.Module):
    def __init__(self, student, dual):
        super().__init__()
        self.student, self.dual = student, dual

    def forward(self, x):
        return self.student(x)


def updates(net):
    student, dual = net.student, net.dual
    kl = kd.ForwardKLLoss(temperature=T, t_squared=True)
    stay, approach, learn = kl * A, kl * B, kd.KDLoss(temperature=T, alpha=0.9)

    def prompt(batch):
        with torch.no_grad():
            p, q = dual.teacher.eval()(batch.images), student(batch.images)
        own = dual(batch.images)
        return F.cross_entropy(own, batch.labels) + stay(own, p) + approach(own, q)

    def distil(batch):
        with torch.no_grad():
            told = dual(batch.images)
        return learn(student(batch.images), told, batch.labels)

    return [Update(prompt, dual.own(), LR), Update(distil, list(student.parameters()))]


def run(lab):
    figures, data = hinton.run(lab), lab.data()
    net = Both(lab.student(), DualPath(lab.teacher()))
    lab.train("dfpt", net, updates(net), teacher=net.dual.teacher)
    return figures | {"prompt path": accuracy(net.dual, data), "DFPT-KD": accuracy(net, data)}
