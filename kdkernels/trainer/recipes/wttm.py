"""Weighted transformed teacher matching: TTM, each row times U_gamma(p) = sum_i p_i^gamma of the teacher.

    kdkernels distill --recipe wttm

Claim: Weighing rows by the teacher's smoothness is as good as TTM or better, and makes smoother students.

The weight is large where the teacher is unsure, between 1 and V^(1 - gamma). gamma = 0.2, beta = 3 are near the middle
of the paper's table of CIFAR-100 pairs.

Expected (mean of 3 seeds):

    WTTM 76.7 > KD 75.3: within noise
    WTTM 76.7 > TTM 77.2: within noise
    entropy, WTTM 76.5 > entropy, KD 11.9: yes
    entropy, WTTM 76.5 > entropy, TTM 76.6: within noise
"""

import kdkernels as kd

from ..images import accuracy, entropy
from . import kd as hinton
from . import ttm

SOURCE = ttm.SOURCE
FIGURE = "top-1 accuracy, and mean entropy of the student on test pictures in % of log 100"
TREND = [("WTTM", "KD"), ("WTTM", "TTM"), ("entropy, WTTM", "entropy, KD"), ("entropy, WTTM", "entropy, TTM")]
GAMMA, BETA = 0.2, 3.0


def loss():
    return kd.WTTMLoss(gamma=GAMMA, kd_weight=BETA, ce_weight=1.0)


def run(lab):
    figures, teacher, data = ttm.run(lab), lab.teacher(), lab.data()
    losses = {"KD": hinton.loss(), "TTM": ttm.loss(), "WTTM": loss()}
    nets = {arm: lab.distil(arm.lower(), own, teacher) for arm, own in losses.items()}  # two of them from their files
    return figures | {"WTTM": accuracy(nets["WTTM"], data)} | {f"entropy, {arm}": entropy(net, data)
                                                               for arm, net in nets.items()}  # fmt: skip
