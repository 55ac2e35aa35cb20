"""SimKD of a language model: the student's last hidden states, projected, are the teacher's; its LM head is the
teacher's own.

    kdkernels distill --recipe simkd_lm

Claim: A student that reuses the teacher's classifier is better than one of its soft targets.

The mean squared error of the last hidden states of the responses' tokens, through a perceptron of one hidden layer, on
fixed texts; nothing else. The paper is about images: this form is ours.

Expected (mean of 3 seeds):

    SimKD 56.7 > supervised 63.4: no
    SimKD, given 54.7 > supervised, given 64.3: no
"""

import copy

from torch import nn

from .. import textlab
from ..lab import Update, frozen
from . import simkd, supervised

LAB, FIGURE = textlab.TextLab, textlab.FIGURE
SOURCE = simkd.SOURCE
TREND = [("SimKD", "supervised"), ("SimKD, given", "supervised, given")]


class Halves(nn.Module):
    """A language model as an encoder and a classifier, its embedding and its LM head no longer tied."""

    def __init__(self, model):
        super().__init__()
        classes, width = model.lm_head.weight.shape
        self.body, self.head = copy.deepcopy(model.model), nn.Linear(width, classes, bias=False)
        self.head.load_state_dict(model.lm_head.state_dict())

    def features(self, tokens):
        """The last hidden states of the rows that foretell the response."""
        return textlab.responses(self.body(input_ids=tokens).last_hidden_state)

    def classify(self, features):
        return self.head(features)


def through(student, teacher):
    """The student, a `Halves`, through a projector and the LM head of another."""
    narrow, wide = student.head.in_features, teacher.head.in_features
    projector = nn.Sequential(nn.Linear(narrow, wide), nn.GELU(), nn.Linear(wide, wide))
    return simkd.Reusing(student, teacher, projector)


def reusing(lab, teacher):
    return through(Halves(lab.student()), teacher)


def writer(model, net):
    """The language model that such a net is, in place of `model`."""
    model.model, model.lm_head = net.student.body, nn.Sequential(net.projector, net.teacher.head)
    return model


def run(lab):
    figures, teacher = supervised.baseline(lab), lab.teacher()
    net = reusing(lab, frozen(Halves(teacher)))
    update = Update(simkd.feature_loss(net, net.teacher), net.own(), textlab.LR, rows=True)
    lab.train("simkd", net, [update], teacher=teacher)
    return figures | lab.figures("SimKD", writer(lab.student(), net))
