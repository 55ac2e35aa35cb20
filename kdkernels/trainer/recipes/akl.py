"""AKL: forward and reverse KL, weighed by where student and teacher differ.

    kdkernels distill --recipe akl

Claim: The adaptive mixture is better than the forward and the reverse KL.

w KL(p || q) + (1 - w) KL(q || p), w the share of the difference that lies in the teacher's head, its most likely tokens
of mass mu = 0.5. On fixed texts at T = 1.

Expected (mean of 3 seeds):

    AKL 64.0 > supervised 63.4: yes
    AKL 64.0 > reverse KL 63.5: yes
"""

import kdkernels as kd

from . import divergences

LAB, FIGURE = divergences.LAB, divergences.FIGURE
SOURCE = "Wu et al. 2025, Rethinking Kullback-Leibler divergence in knowledge distillation for large language models"
TREND = [("AKL", "supervised"), ("AKL", "reverse KL")]
LOSS = kd.AKLLoss(mu=0.5)


def run(lab):
    return divergences.run(lab, {"reverse KL": kd.ReverseKLLoss(), "AKL": LOSS})
