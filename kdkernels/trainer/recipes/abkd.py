"""The alpha-beta divergence as the loss of distillation: a dial for how much the student's and the teacher's sureness
count.

    kdkernels distill --recipe abkd

Claim: The alpha-beta divergence is better than the forward and the reverse KL.

CE + lambda D_AB(p || q) with alpha + beta = 1.1, alpha = 0.8, lambda = 32, both at T = 4 and without T^2, as the
paper's code has it for CIFAR-100; (1, 0) is the forward and (0, 1) the reverse KL, at the same T and lambda. "AB + TTM"
has the teacher to the power gamma and the student at T = 1. `python -m benchmarks.pages.alpha_beta` draws the accuracy
over alpha and beta.

Expected (mean of 3 seeds):

    AB 75.3 > forward KL 75.8: within noise
    AB 75.3 > reverse KL 75.9: within noise
"""

import kdkernels as kd

from ..images import accuracy
from . import kd as hinton

SOURCE = "Wang et al. 2025, ABKD: pursuing a proper allocation of the probability mass in knowledge distillation (ICML)"
FIGURE = hinton.FIGURE
TREND = [("AB", "forward KL"), ("AB", "reverse KL")]
LAMBDA = 32.0


def loss(alpha, beta):
    return kd.AlphaBetaLoss(alpha, beta, temperature=4.0, kd_weight=LAMBDA, ce_weight=1.0)


def with_ttm(gamma=0.2):
    """The power-transformed teacher is the teacher at the temperature 1 / gamma."""
    return kd.AlphaBetaLoss(0.8, 0.3, temperature=1.0, teacher_temperature=1 / gamma, kd_weight=20.0, ce_weight=1.0)


def run(lab):
    teacher, data = lab.teacher(), lab.data()
    arms = {"AB": loss(0.8, 0.3), "forward KL": loss(1.0, 0.0), "reverse KL": loss(0.0, 1.0), "AB + TTM": with_ttm()}
    figures = {"cross-entropy": accuracy(lab.plain(), data)}
    for arm, own in arms.items():
        figures[arm] = accuracy(lab.distil(arm.lower().replace(" ", "-"), own, teacher), data)
    return figures
