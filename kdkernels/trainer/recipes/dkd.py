"""Decoupled distillation of a language model: the text's own token and the others weighed apart.

    kdkernels distill --recipe dkd

Claim: Decoupled from the target, what the teacher says of the other classes teaches more than the KL does.

alpha KL(target or not) + beta KL(of the others), alpha = 1, beta = 0.5, T = 1 as the paper has it for the thousand
classes of ImageNet, without a cross-entropy, on fixed texts. KL(p || q) is alpha = 1 with beta = 1 - p_y of each row.

Expected (mean of 3 seeds):

    DKD 62.9 > supervised 63.4: no
    DKD, given 63.8 > supervised, given 64.3: no
"""

import kdkernels as kd

from . import divergences

LAB, FIGURE = divergences.LAB, divergences.FIGURE
SOURCE = "Zhao et al. 2022, Decoupled knowledge distillation (CVPR)"
TREND = [("DKD", "supervised"), ("DKD, given", "supervised, given")]
LOSS = kd.DKDLoss(alpha=1.0, beta=0.5)


def run(lab):
    return divergences.run(lab, {"DKD": LOSS})
