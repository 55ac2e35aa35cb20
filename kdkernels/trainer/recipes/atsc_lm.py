"""Adaptive teaching with a shared classifier, of a language model: SimKD in which the teacher moves towards the student
and the LM head learns for both.

    kdkernels distill --recipe atsc_lm

Claim: Moving the teacher towards the student, and sharing a classifier that learns, is better than SimKD.

The two updates of `atsc` on the last hidden states: student, projector and the teacher's encoder (w = 1); then the
shared LM head, by the cross-entropy of the teacher's hidden states, at a tenth of the learning rate. Two teachers: a
projector and an LM head for each, logits averaged. The paper is about images: this form is ours.

Expected (mean of 3 seeds):

    ATSC 56.5 > SimKD 56.7: within noise
    ATSC 56.5 > supervised 63.4: no
    ATSC, two teachers 55.8 > ATSC 56.5: no
"""

from torch import nn

from .. import textlab
from ..lab import frozen
from . import atsc, simkd_lm

LAB, FIGURE = textlab.TextLab, textlab.FIGURE
SOURCE = atsc.SOURCE
TREND = [("ATSC", "SimKD"), ("ATSC", "supervised"), ("ATSC, two teachers", "ATSC")]


def movable(model):
    return simkd_lm.Halves(model).requires_grad_(True)


def writer(model, both):
    """The language model that a `Several` is, in place of `model`."""
    heads = [nn.Sequential(net.projector, net.teacher.head) for net in both.nets]
    model.model, model.lm_head = both.nets[0].student.body, atsc.Several(heads)
    return model


def run(lab):
    figures, teachers = simkd_lm.run(lab), [lab.teacher(seed=seed) for seed in lab.teacher_seeds(2)]
    pretrained = [frozen(simkd_lm.Halves(teacher)) for teacher in teachers]
    net = simkd_lm.reusing(lab, movable(teachers[0]))
    lab.train("atsc", net, atsc.updates(net, pretrained[0], textlab.LR), teacher=teachers[0])
    figures |= lab.figures("ATSC", simkd_lm.writer(lab.student(), net))
    student = simkd_lm.Halves(lab.student())
    both = atsc.Several([simkd_lm.through(student, movable(teacher)) for teacher in teachers])
    lab.train("atsc-two", both, atsc.together(both, pretrained, textlab.LR), teacher=teachers[0])
    return figures | lab.figures("ATSC, two teachers", writer(lab.student(), both))
