"""Bayesian teachers: the mean of what several plausible teachers say, in place of what one does.

    kdkernels distill --recipe bayesian_teacher

Laplace: a Gaussian posterior of the last layer around the trained one, with the Kronecker-factored Gauss-Newton matrix
A x G (A of the features, G of the logits) and a prior precision of 1, whose predictive is by the probit approximation
softmax(f / sqrt(1 + pi/8 var f)). Ensemble: the mean of softmax(t / T) of three teachers, given as an explicit
distribution. The paper's variational teachers are not here. Expected: a little above KD.
"""

import math

import torch

import kdkernels as kd

from ..images import accuracy
from ..lab import logits_of
from . import kd as hinton

SOURCE = "SGD-based knowledge distillation with Bayesian teachers (ICLR 2026)"
CLAIM = "Bayesian teachers are better teachers than deterministic ones."
FIGURE = hinton.FIGURE
TREND = [("KD, Laplace", "KD"), ("KD, ensemble", "KD")]
PRIOR, T = 1.0, 4.0


@torch.no_grad()
def laplace(teacher, data, prior=PRIOR):
    """Logits (N, C) of the training pictures: the mean, shrunk by its uncertainty."""
    inputs = torch.cat([teacher.features(x).mean(2).flatten(1) for x in data.train[0].split(1000)]).double()
    x = torch.cat((inputs, torch.ones(len(inputs), 1, dtype=torch.float64)), 1)
    f = logits_of(teacher, data).double()
    p = f.softmax(-1)
    # A sums over the pictures and G is their mean: A x G is the matrix of all of them, the prior on both sides of it.
    A, G = x.T @ x, torch.diag(p.mean(0)) - p.T @ p / len(p)
    root = math.sqrt(prior)
    spread = (x @ torch.linalg.inv(A + root * torch.eye(len(A), dtype=A.dtype)) * x).sum(1)
    variance = spread[:, None] * torch.linalg.inv(G + root * torch.eye(len(G), dtype=G.dtype)).diagonal()
    return (f / (1 + math.pi / 8 * variance).sqrt()).float()


def mixture(logits):
    """Logits of the mean of the distributions softmax(l), l of `logits` (S, N, C)."""
    return logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))


def ensemble(logits):
    """What a loss at temperature T is given to be told mean_k softmax(t_k / T), t_k of `logits` (S, N, C)."""
    return T * mixture(logits / T)


def run(lab):
    figures, data = hinton.run(lab), lab.data()
    teachers = [lab.teacher(seed=1000 + k) for k in range(3)]
    several = torch.stack([logits_of(teacher, data) for teacher in teachers])
    targets = {"Laplace": laplace(teachers[0], data), "ensemble": ensemble(several)}
    for name, logits in targets.items():
        student = lab.distil(f"kd-{name.lower()}", kd.KDLoss(temperature=T, alpha=0.9), logits)
        figures[f"KD, {name}"] = accuracy(student, data)
    return figures
