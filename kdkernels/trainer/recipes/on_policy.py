"""On-policy distillation (GKD): the student learns from the teacher on what it writes itself.

    kdkernels distill --recipe on_policy

Claim: Learning on its own text makes a better student than learning on a fixed set.

A batch is, with probability lambda, the responses that the student writes to the prompts at T = 1, as it is at that
step and without a gradient through the writing, and otherwise the fixed texts; the loss is KL(p || q) in both cases
(the paper has the generalised JSD too: see `divergences`). lambda = 1 is on-policy, 0.5 the mixture, 0 `supervised`.

Expected (mean of 3 seeds):

    on-policy 63.7 > supervised 63.4: within noise
    mixed 63.4 > supervised 63.4: within noise
"""

import torch

import kdkernels as kd

from .. import textlab
from ..sampling import AS_IS
from . import supervised

LAB = textlab.TextLab
SOURCE = "Agarwal et al. 2024, On-policy distillation of language models (ICLR)"
FIGURE = textlab.FIGURE
TREND = [("on-policy", "supervised"), ("mixed", "supervised")]


def mixture(lab, share, taste=AS_IS):
    """tokens(net, batch): the student's own text in a share lambda of the batches."""

    def tokens(net, batch):
        own = torch.rand((), generator=batch.noise) < share
        return lab.written(net, batch.inputs, batch.noise, taste) if own else batch.inputs

    return tokens


def run(lab):
    figures = supervised.baseline(lab)
    for arm, share in (("mixed", 0.5), ("on-policy", 1.0)):
        figures |= lab.figures(arm, lab.distil(arm, kd.ForwardKLLoss(), mixture(lab, share)))
    return figures
