"""Transformed teacher matching: the teacher's distribution to the power gamma, the student's as it is.

    kdkernels distill --recipe ttm

Claim: Dropping the student's temperature, TTM is better than KD for every pair of networks.

CE + beta KL(p^gamma / U || q), without a temperature of the student and without T^2. That is KD with a Renyi entropy of
the student as a regulariser (the paper's theorem; the identity is a test). gamma = 0.2, beta = 20 are near the middle
of the paper's table of CIFAR-100 pairs.

Expected (mean of 3 seeds):

    TTM 77.2 > KD 75.3: within noise
    TTM 77.2 > cross-entropy 68.6: yes
"""

import torch.nn.functional as F

import kdkernels as kd

from ..images import accuracy
from . import kd as hinton

SOURCE = "Zheng & Yang 2024, Knowledge distillation based on transformed teacher matching (ICLR)"
FIGURE = hinton.FIGURE
TREND = [("TTM", "KD"), ("TTM", "cross-entropy")]
GAMMA, BETA = 0.2, 20.0


def loss():
    return kd.TTMLoss(gamma=GAMMA, kd_weight=BETA, ce_weight=1.0)


def textbook(s, t, y):
    """The same by torch's own functions."""
    divergence = F.kl_div(s.log_softmax(-1), (GAMMA * t).log_softmax(-1), reduction="batchmean", log_target=True)
    return F.cross_entropy(s, y) + BETA * divergence


def run(lab):
    figures = hinton.run(lab)
    return figures | {"TTM": accuracy(lab.distil("ttm", loss(), lab.teacher()), lab.data())}
