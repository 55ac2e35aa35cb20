"""SimKD: the student's features, projected, are the teacher's; its classifier is the teacher's own.

    kdkernels distill --recipe simkd

Claim: A student that reuses the teacher's classifier is better than one of its soft targets.

The loss is the mean squared error of the last feature maps before pooling, nothing else. The projector is that of the
paper, 1 x 1, 3 x 3 and 1 x 1 convolutions with batch normalisation, through half the teacher's channels.

Expected (mean of 3 seeds):

    SimKD 76.8 > KD 75.3: within noise
    SimKD 76.8 > cross-entropy 68.6: yes
"""

import torch
from torch import nn

from ..images import STUDENT, TEACHER, accuracy
from ..lab import Update, frozen
from . import kd as hinton

SOURCE = "Chen et al. 2022, Knowledge distillation with the reused teacher classifier (CVPR)"
FIGURE = hinton.FIGURE
TREND = [("SimKD", "KD"), ("SimKD", "cross-entropy")]


def projector(narrow, wide, factor=2):
    middle, layers = wide // factor, []
    for a, b, kernel in ((narrow, middle, 1), (middle, middle, 3), (middle, wide, 1)):
        layers += [nn.Conv2d(a, b, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers)


class Reusing(nn.Module):
    """A student through a projector and the classifier of a teacher."""

    def __init__(self, student, teacher, through=None):
        super().__init__()
        self.student, self.projector, self.teacher = student, through or projector(STUDENT[-1], TEACHER[-1]), teacher

    def features(self, x):
        return self.projector(self.student.features(x))

    def forward(self, x):
        return self.teacher.classify(self.features(x))

    def own(self):
        """The parameters that learn."""
        return [*self.student.body.parameters(), *self.projector.parameters()]


def feature_loss(net, teacher):
    def loss(batch):
        teacher.eval()
        with torch.no_grad():
            wanted = teacher.features(batch.inputs)
        return nn.functional.mse_loss(net.features(batch.inputs), wanted)

    return loss


def run(lab):
    figures, teacher = hinton.run(lab), frozen(lab.teacher())
    net = Reusing(lab.student(), teacher)
    lab.train("simkd", net, [Update(feature_loss(net, teacher), net.own(), 0.2, rows=True)], teacher=teacher)
    return figures | {"SimKD": accuracy(net, lab.data())}
