"""Relative difficulty distillation: how hard a pixel is for the two nets decides whether the student learns from it.

    kdkernels distill --recipe rdd

Claim: Letting the relative difficulty of pixels choose what to learn from is better than learning from all.

The loss is a weighted cross-entropy (main head + 0.4 auxiliary head) + KL(p || q) of every pixel, at temperature 1.
First stage, the first tenth of the steps: a pixel weighs exp(-KL(p_aux || p_main)) of the teacher's two heads, so that
easy ones lead. Second stage: only pixels that exactly one of student and teacher finds hard, whose probability of the
label is at most max(0.7, the k-th smallest of the batch), k = 2.4% of the pixels as published (100,000 of 16 x 512 x
512). That both heads learn from these is our choice. The task: 10 digits and background on 12 x 20 pixels.

Expected (mean of 3 seeds):

    RDD 62.3 > KD 54.1: yes
    KD 54.1 > cross-entropy 49.4: yes
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

import kdkernels as kd

from ..lab import Update, frozen

SOURCE = "Liang et al. 2024, Relative difficulty distillation for semantic segmentation"
FIGURE = "mean intersection over union, %"
TREND = [("RDD", "KD"), ("KD", "cross-entropy")]
CLASSES, TEACHER, STUDENT = 11, (16, 64, 64), (8, 24, 24)
WHOLE = "which pixels are hard depends on all those of a batch"
FIRST, AUXILIARY, SURE, HARDEST, KL = 0.1, 0.4, 0.7, 0.024, 1.0
STEPS, TEACHER_STEPS, LR = 400, 600, 0.2


class SegNet(nn.Module):
    """images (N, 1, H, W) -> logits of the main and of the auxiliary head, each (N, H, W, classes): rows of pixels."""

    def __init__(self, widths):
        super().__init__()
        a, b, c = widths
        block = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())  # noqa: E731
        self.first, self.middle, self.last = block(1, a), nn.Sequential(nn.MaxPool2d(2), block(a, b)), block(b, c)
        self.main, self.auxiliary = nn.Conv2d(a + c, CLASSES, 1), nn.Conv2d(b, CLASSES, 1)

    def forward(self, x):
        first = self.first(x)
        middle = self.middle(first)
        wide = lambda x: F.interpolate(x, first.shape[2:], mode="bilinear")  # noqa: E731
        main = self.main(torch.cat((first, wide(self.last(middle))), 1))
        return main.movedim(1, -1).contiguous(), wide(self.auxiliary(middle)).movedim(1, -1).contiguous()


def task(heads, labels, weight=None):
    """Cross-entropy of both heads, the mean over the pixels whose label is not -100."""
    main, auxiliary = (kd.CrossEntropyLoss()(s, labels=labels, row_weight=weight) for s in heads)
    return main + AUXILIARY * auxiliary


def easiness(teacher_heads):
    """(N, H, W): 1 where the teacher's heads agree."""
    main, auxiliary = teacher_heads
    return (-kd.ForwardKLLoss(reduction="none")(main, auxiliary)).exp()


@torch.no_grad()
def hard(s, labels):
    """(N, H, W) whether a net finds a pixel hard."""
    own = (-kd.CrossEntropyLoss(reduction="none")(s, labels=labels)).exp()
    return own <= max(SURE, own.flatten().kthvalue(math.ceil(HARDEST * own.numel())).values.item())


def chosen(s, t, labels):
    """The labels, -100 but where exactly one of the nets finds the pixel hard."""
    return torch.where(hard(s, labels) ^ hard(t, labels), labels, -100)


def loss(net, teacher, first):
    """RDD with `first` steps of the first stage; None: all pixels alike."""

    def of(batch):
        with torch.no_grad():
            told = teacher(batch.images)
        heads, labels, weight = net(batch.images), batch.masks, None
        if first is not None and batch.step < first:
            weight = easiness(told)
        elif first is not None:
            labels = chosen(heads[0], told[0], labels)
        return task(heads, labels, weight) + KL * kd.ForwardKLLoss()(heads[0], told[0])

    return of


@torch.no_grad()
def overlap(net, data):
    """Mean over the classes of intersection over union, %."""
    images, _, masks = data.test
    found = torch.cat([net.eval()(x)[0].argmax(-1) for x in images.split(500)])
    counts = torch.bincount((CLASSES * masks + found).flatten(), minlength=CLASSES**2).view(CLASSES, -1).double()
    both = counts.diagonal()
    return 100 * (both / (counts.sum(0) + counts.sum(1) - both).clamp(min=1)).mean().item()


def trained(lab, name, make, widths, **options):
    """A net of these widths, every one of a seed from the same weights, trained with make(net)(batch)."""
    torch.manual_seed(lab.seed)
    net = SegNet(widths)
    return lab.train(name, net, [Update(make(net), list(net.parameters()), LR)], **options)


def run(lab):
    data, alone = lab.data(), lambda net: lambda batch: task(net(batch.images), batch.masks)
    [seed] = lab.teacher_seeds()
    key = f"segmentation-teacher-{data.key.replace(' ', '-')}-{TEACHER_STEPS}-{seed}"
    teacher = frozen(trained(lab.shared(seed), key, alone, TEACHER, steps=TEACHER_STEPS, data=data))
    figures = {"teacher": overlap(teacher, data)}
    arms = {"cross-entropy": alone, "KD": lambda net: loss(net, teacher, None),
            "RDD": lambda net: loss(net, teacher, FIRST * STEPS * lab.share)}  # fmt: skip
    for arm, make in arms.items():
        told = None if make is alone else teacher
        net = trained(lab, arm.lower(), make, STUDENT, steps=STEPS, data=data, teacher=told)
        figures[arm] = overlap(net, data)
    return figures
