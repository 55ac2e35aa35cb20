"""Which divergence of the teacher's from the student's tokens: forward KL, reverse KL, or JSD between them.

    kdkernels distill --recipe divergences

Claim: For text that the student writes, the reverse KL and JSD are better than the forward KL.

On fixed texts at T = 1. The forward KL is that of `supervised`; the reverse KL does not spread over what the teacher
has and the student cannot have; JSD with beta = 0.5 mixes arithmetically.

Expected (mean of 3 seeds):

    reverse KL 63.5 > supervised 63.4: within noise
    JSD 64.1 > supervised 63.4: yes
"""

import kdkernels as kd

from .. import textlab
from . import supervised

LAB = textlab.TextLab
SOURCE = "Gu et al. 2024, MiniLLM (ICLR); Agarwal et al. 2024, On-policy distillation of language models (ICLR)"
FIGURE = textlab.FIGURE
TREND = [("reverse KL", "supervised"), ("JSD", "supervised")]
LOSSES = {"reverse KL": kd.ReverseKLLoss(), "JSD": kd.JSDLoss(beta=0.5)}


def run(lab, losses=None):
    figures = supervised.baseline(lab)
    for arm, loss in (losses or LOSSES).items():
        figures |= lab.figures(arm, lab.distil(arm.lower().replace(" ", "-"), loss))
    return figures
