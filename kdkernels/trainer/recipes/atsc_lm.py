"""Adaptive teaching with a shared classifier, of a language model: SimKD in which the teacher moves towards the student
and the LM head learns for both.

    kdkernels distill --recipe atsc_lm

The two updates of `atsc` on the last hidden states: student, projector and the teacher's encoder (w = 1); then the
shared LM head, by the cross-entropy of the teacher's hidden states, at a tenth of the learning rate. The paper is about
images: this form is ours. Expected, as there: above SimKD.
"""

from .. import textlab
from ..lab import frozen
from . import atsc, simkd_lm

LAB, FIGURE = textlab.TextLab, textlab.FIGURE
SOURCE = atsc.SOURCE
CLAIM = atsc.CLAIM
TREND = [("ATSC", "SimKD"), ("ATSC", "supervised")]


def run(lab):
    figures, pretrained = simkd_lm.run(lab), frozen(simkd_lm.Halves(lab.teacher()))
    net = simkd_lm.reusing(lab, simkd_lm.Halves(lab.teacher()).requires_grad_(True))
    lab.train("atsc", net, atsc.updates(net, pretrained, textlab.LR))
    return figures | lab.figures("ATSC", simkd_lm.writer(lab, net))
