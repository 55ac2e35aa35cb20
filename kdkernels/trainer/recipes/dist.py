"""DIST: the student's probabilities correlate with the teacher's, over the classes of a picture and over the pictures
of a class.

    kdkernels distill --recipe dist

CE + 2 (inter + intra), tau = 4, as for CIFAR-100, after students of a teacher of three widths. Expected: 75% as of KD,
and as much of the stronger teacher, where KD has 74%; all within noise.
"""

import kdkernels as kd

from ..images import TEACHER, accuracy
from . import kd as hinton

SOURCE = "Huang et al. 2022, Knowledge distillation from a stronger teacher (NeurIPS)"
CLAIM = "Correlations keep improving with a stronger teacher, where KD does not."
FIGURE = hinton.FIGURE
TREND = [("DIST", "KD"), ("DIST, strong", "KD, strong")]
WHOLE = "DIST correlates the pictures of a batch"
STRONG = tuple(2 * width for width in TEACHER)


def loss():
    return kd.DISTLoss(temperature=4.0, beta=1.0, gamma=1.0, kd_weight=2.0, ce_weight=1.0)


def run(lab):
    data, figures = lab.data(), {"cross-entropy": accuracy(lab.plain(), lab.data())}
    hinton_loss = kd.KDLoss(temperature=4.0, alpha=0.9)
    for teacher, note in ((lab.teacher(), ""), (lab.teacher(widths=STRONG, steps=600), ", strong")):
        figures["teacher" + note] = accuracy(teacher, data)
        for arm, own in (("KD", hinton_loss), ("DIST", loss())):
            figures[arm + note] = accuracy(lab.distil(f"{arm.lower()}{note.replace(', ', '-')}", own, teacher), data)
    return figures
