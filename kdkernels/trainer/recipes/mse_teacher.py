"""A teacher trained with the squared error of its probabilities, for any distillation after it.

    kdkernels distill --recipe mse_teacher

Claim: A teacher trained with the squared error teaches better than one trained with the cross-entropy.

The teacher's loss is sum_i (q_i - [i = y])^2 in place of the cross-entropy (`space` "probability"; "logit": the same of
the raw logits). The paper's toy experiment has the probabilities and its code for images the logits; both are here, the
trends and the default, our choice, are of the probabilities. The teacher starts from the weights of the
cross-entropy's, our choice too: the slope of the squared error vanishes where a net is sure and wrong; and SCALE = 10
times the loss makes up for small slopes at the usual learning rate. The students are those of `kd`; at T = 4 those of
the logit space's teacher, whose logits are near 0 and 1, learn next to nothing.

`python -m benchmarks.pages.bayes_teacher` looks at both losses where the posterior is known.

Expected (mean of 3 seeds):

    KD, MSE teacher 74.5 > KD 75.3: within noise
    teacher 87.4 > MSE teacher 87.3: within noise
"""

import copy

import torch

import kdkernels as kd

from ..images import accuracy
from . import kd as hinton

SOURCE = "Hamidi et al. 2024, How to train the teacher model for effective knowledge distillation (ECCV)"
FIGURE = hinton.FIGURE
TREND = [("KD, MSE teacher", "KD"), ("teacher", "MSE teacher")]
SCALE = 10.0  # of the squared error, whose slopes are small: one of the learning rate


def error(space="probability"):
    """-> loss(logits, labels)."""
    squares = SCALE * kd.BrierLoss() if space == "probability" else kd.LogitMSELoss()
    return lambda s, y: squares(s, labels=y)


def start(teacher, space):
    """The teacher's weights; in logit space with logits of the size of those they are to become."""
    net = copy.deepcopy(teacher)
    if space == "logit":
        with torch.no_grad():
            for p in net.head.parameters():
                p.mul_(0.05)
    return net


def run(lab):
    figures = hinton.run(lab)
    data = lab.data()
    for space, arm in (("probability", "MSE teacher"), ("logit", "logit-MSE teacher")):
        teacher = lab.teacher(error(space), f"mse-{space}", start=start(lab.teacher(), space), steps=600)
        student = lab.distil(f"kd-{space}", kd.KDLoss(temperature=4.0, alpha=0.9), teacher)
        figures |= {arm: accuracy(teacher, data), f"KD, {arm}": accuracy(student, data)}
    return figures
