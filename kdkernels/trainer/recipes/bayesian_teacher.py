"""Bayesian teachers: the mean of what several plausible teachers say, in place of what one does.

    kdkernels distill --recipe bayesian_teacher

Claim: Bayesian teachers are better teachers than deterministic ones.

Laplace: a Gaussian posterior of the last layer around the trained one, whose precision is the Gauss-Newton matrix in
its Kronecker form A x G (A of the features, G of the logits; all of it would have 64,100 rows) plus delta I, inverted
exactly by the eigenvectors of both; delta is that of the largest marginal likelihood (MacKay's fixed point). The
predictive is by the probit approximation softmax(f / sqrt(1 + pi/8 var f)). (The paper's laplace-torch would bring nine
packages for these two eigenvalue problems, and takes weights and bias for independent.) Ensemble: the mean of softmax(t
/ T) of three teachers, given as an explicit distribution; seeds 0 to 2 have the same three. The paper's variational
teachers are not here.

Expected (mean of 3 seeds):

    KD, Laplace 71.6 > KD 75.3: no
    KD, ensemble 75.3 > KD 75.3: within noise
"""

import math

import torch

import kdkernels as kd

from ..images import accuracy
from ..lab import logits_of
from . import kd as hinton

SOURCE = "SGD-based knowledge distillation with Bayesian teachers (ICLR 2026)"
FIGURE = hinton.FIGURE
TREND = [("KD, Laplace", "KD"), ("KD, ensemble", "KD")]
T = 4.0


class LastLayer:
    """The posterior of a linear layer, of rows x (N, D) of its inputs, the 1 of the bias among them, and its logits f.

    Args:
        weights: the trained ones (C, D).
        prior: delta, the precision of the prior; none: that of the largest marginal likelihood.
    """

    def __init__(self, x, f, weights, prior=None):
        p = f.softmax(-1)
        # A is the sum over the rows and G their mean: A x G is the matrix of all of them.
        a, self.inputs = torch.linalg.eigh(x.T @ x)
        g, self.outputs = torch.linalg.eigh(torch.diag(p.mean(0)) - p.T @ p / len(p))
        self.precision = a.clamp(min=0)[:, None] * g.clamp(min=0)
        self.prior = prior or self.likeliest(weights.square().sum().item())

    def likeliest(self, size, delta=1.0):
        """size: the sum of the squares of the weights."""
        for _ in range(100):
            delta = (self.precision / (self.precision + delta)).sum().item() / size  # weights the data decide
        return delta

    def variance(self, x):
        """Of the logits of rows x, (N, C)."""
        return (x @ self.inputs).square() @ (self.precision + self.prior).reciprocal() @ self.outputs.square().T


@torch.no_grad()
def laplace(teacher, data, prior=None):
    """Logits (N, C) of the training pictures: the mean, shrunk by its uncertainty."""
    inputs = torch.cat([teacher.features(x).mean(2).flatten(1) for x in data.train[0].split(1000)]).double()
    x = torch.cat((inputs, torch.ones(len(inputs), 1, dtype=torch.float64)), 1)
    f, head = logits_of(teacher, data).double(), teacher.head
    variance = LastLayer(x, f, torch.cat((head.weight, head.bias[:, None]), 1).double(), prior).variance(x)
    return (f / (1 + math.pi / 8 * variance).sqrt()).float()


def mixture(logits):
    """Logits of the mean of the distributions softmax(l), l of `logits` (S, N, C)."""
    return logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))


def ensemble(logits):
    """What a loss at temperature T is given to be told mean_k softmax(t_k / T), t_k of `logits` (S, N, C)."""
    return T * mixture(logits / T)


def run(lab):
    figures, data = hinton.run(lab), lab.data()
    teachers = [lab.teacher(seed=seed) for seed in lab.teacher_seeds(3)]
    several = torch.stack([logits_of(teacher, data) for teacher in teachers])
    targets = {"Laplace": laplace(teachers[0], data), "ensemble": ensemble(several)}
    for name, logits in targets.items():
        student = lab.distil(f"kd-{name.lower()}", kd.KDLoss(temperature=T, alpha=0.9), logits)
        figures[f"KD, {name}"] = accuracy(student, data)
    return figures
