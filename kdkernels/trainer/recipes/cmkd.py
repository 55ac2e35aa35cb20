"""CMKD: Pearson's and Spearman's correlation of the logits together, with weights that follow the teacher's sureness.

    kdkernels distill --recipe cmkd

Claim: Ranks beside values, weighed by the difficulty of a sample, are better than KD.

CE + w [(1 - h) (1 - Pearson) + h (1 - Spearman)], h = H(p) / log V the teacher's entropy at temperature 4: pictures
that are hard for the teacher lean on ranks. The paper's weights and its operator for the ranks of the student are not
public. Our choices: w = 20, at which the slopes of both terms are of the size of the cross-entropy's; the entropy; and
the soft ranks of `kdkernels.SpearmanLoss`, sums of Laplace distribution functions of the differences of the logits.

Expected (mean of 3 seeds):

    CMKD 73.2 > KD 75.3: no
    CMKD 73.2 > Pearson 76.2: no
"""

import kdkernels as kd

from ..images import accuracy
from . import kd as hinton

SOURCE = "Niu et al. 2024, Correlation matching knowledge distillation"
FIGURE = hinton.FIGURE
TREND = [("CMKD", "KD"), ("CMKD", "Pearson")]
WEIGHT, T = 20.0, 4.0


def loss():
    return kd.CMKDLoss(1.0, 1.0, hard="spearman", temperature=T, kd_weight=WEIGHT, ce_weight=1.0)


def run(lab):
    figures, teacher = hinton.run(lab), lab.teacher()
    for arm, own in (("Pearson", kd.PearsonLoss(kd_weight=WEIGHT, ce_weight=1.0)), ("CMKD", loss())):
        figures[arm] = accuracy(lab.distil(arm.lower(), own, teacher), lab.data())
    return figures
