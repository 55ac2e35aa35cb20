"""DIST: the student's probabilities correlate with the teacher's, over the classes of a picture and over the pictures
of a class.

    kdkernels distill --recipe dist

Claim: Correlations keep improving with a stronger teacher, where KD does not.

CE + 2 (inter + intra), tau = 4, as for CIFAR-100; the students of a weaker teacher, of half the widths and half the
steps, and of a stronger one, the usual.

Expected (mean of 3 seeds):

    DIST, stronger 74.4 > DIST, weaker 73.8: within noise
    KD, weaker 71.7 > KD, stronger 75.3: no
    DIST, weaker 73.8 > KD, weaker 71.7: yes
    DIST, stronger 74.4 > KD, stronger 75.3: within noise
"""

import kdkernels as kd

from ..images import TEACHER, accuracy
from . import kd as hinton

SOURCE = "Huang et al. 2022, Knowledge distillation from a stronger teacher (NeurIPS)"
FIGURE = hinton.FIGURE
TREND = [("DIST, stronger", "DIST, weaker"), ("KD, weaker", "KD, stronger"), ("DIST, weaker", "KD, weaker"),
         ("DIST, stronger", "KD, stronger")]  # fmt: skip
WHOLE = "DIST correlates the pictures of a batch"
WEAK = tuple(width // 2 for width in TEACHER)


def loss():
    return kd.DISTLoss(temperature=4.0, beta=1.0, gamma=1.0, kd_weight=2.0, ce_weight=1.0)


def run(lab):
    data, figures = lab.data(), {"cross-entropy": accuracy(lab.plain(), lab.data())}
    for teacher, note in ((lab.teacher(widths=WEAK, steps=600), "weaker"), (lab.teacher(), "stronger")):
        figures[f"teacher, {note}"] = accuracy(teacher, data)
        for arm, own in (("kd", hinton.loss()), ("dist", loss())):
            name = f"{arm}-weaker" if note == "weaker" else arm
            figures[f"{arm.upper()}, {note}"] = accuracy(lab.distil(name, own, teacher), data)
    return figures
