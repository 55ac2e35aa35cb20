"""Knowledge distillation: a student of the teacher's softened probabilities and the labels.

    kdkernels distill --recipe kd

Claim: A student of a teacher's soft targets is better than one of the labels alone.

The loss is (1 - alpha) CE + alpha T^2 KL(p_T || q_T), T = 4, alpha = 0.9 as in the CIFAR-100 experiments that later
papers compare with.

Expected (mean of 3 seeds):

    KD 75.3 > cross-entropy 68.6: yes
"""

import kdkernels as kd

from ..images import accuracy

SOURCE = "Hinton, Vinyals & Dean 2015"
FIGURE = "top-1 accuracy, %"
TREND = [("KD", "cross-entropy")]


def loss():
    return kd.KDLoss(temperature=4.0, alpha=0.9)


def run(lab):
    teacher, data = lab.teacher(), lab.data()
    return {
        "teacher": accuracy(teacher, data),
        "cross-entropy": accuracy(lab.plain(), data),
        "KD": accuracy(lab.distil("kd", loss(), teacher), data),
    }
