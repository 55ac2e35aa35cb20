"""Rank and correlation losses from their definitions, over all pairs of classes, with no help from the library.

A formula takes one pair of rows s, t (n,) of live classes in float64 and gives a number; autograd gives its gradient.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


def midranks(t: Tensor) -> Tensor:
    return (t[:, None] > t).double().sum(-1) + ((t[:, None] == t).double().sum(-1) + 1) / 2


def deviation(x: Tensor) -> Tensor:
    return ((x - x.mean()) ** 2).mean().sqrt()


def soft_ranks(s: Tensor, tau: float) -> Tensor:
    """LapSum: sum_j F((s_i - s_j) / (tau std)), F the distribution function of Laplace."""
    x = (s[:, None] - s) / (tau * deviation(s))
    below, zero = x < 0, torch.zeros_like(x)  # at 0 the slope is 1/2, which |x| would not know
    return torch.where(below, torch.where(below, x, zero).exp() / 2, 1 - torch.where(below, zero, -x).exp() / 2).sum(-1)


def rho(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.mean(), b - b.mean()
    return (a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt()


def spearman(s, t, tau=0.1, exact=False):
    return 1 - rho(soft_ranks(s, tau), midranks(t))


def pearson(s, t, space="logits"):
    if space == "logits":
        return 1 - rho(s, t)
    return 1 - rho(len(s) * s.softmax(-1) - 1, len(t) * t.softmax(-1) - 1)


def plackett_luce(s, t, weights="teacher"):
    reached = torch.where(t[:, None] >= t, s, -torch.inf).logsumexp(-1)
    w = t.softmax(-1) if weights == "teacher" else torch.full_like(t, 1 / len(t))
    return (w * (reached - s)).sum()


def kendall(s, t, mode="topk", shifts=16, tau=0.1, seed=None):
    a, n = tau * deviation(s), len(s)
    agree = (t[:, None] - t).sign() * ((s[:, None] - s) / a).tanh()
    if mode == "topk":
        return 1 - agree.sum() / (n * (n - 1))
    places = torch.rand(shifts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    i = torch.arange(n)
    return 1 - torch.stack([agree[i, (i + 1 + int(u * (n - 1))) % n].mean() for u in places]).mean()


def cmkd(s, t, whole_t, pearson_weight=1.0, spearman_weight=1.0, hard="spearman", tau=0.1):
    """The entropy is the teacher's over all of its classes, live in the student or not."""
    h = torch.special.entr(whole_t.softmax(-1)).sum() / math.log(len(whole_t))
    a, b = {"spearman": (1 - h, h), "pearson": (h, 1 - h), "both": (1.0, 1.0)}[hard]
    return a * pearson_weight * pearson(s, t) + b * spearman_weight * spearman(s, t, tau)


@dataclass(frozen=True, eq=False)
class Case:
    """A loss class by name, the options given to its constructor, and its formula."""

    name: str
    formula: Callable
    options: dict = field(default_factory=dict)

    def __str__(self):
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.options.items())])

    def live(self, s: Tensor, t: Tensor) -> Tensor:
        gone = s.isneginf() & t.isneginf() if self.options.get("space") == "probs" else s.isneginf() | t.isneginf()
        index = (~gone).nonzero()[:, 0]
        top = self.options.get("top_k", 128 if self.options.get("mode", "") == "topk" else None)
        if top is not None:
            first = sorted(index.tolist(), key=lambda i: (-t[i].item(), i))[:top]
            index = torch.tensor(sorted(first), dtype=torch.long)
        return index

    def row(self, s: Tensor, t: Tensor) -> Tensor:
        """The loss of one row (V,)."""
        options = {k: v for k, v in self.options.items() if k not in ("top_k", "temperature", "kd_weight")}
        T = self.options.get("temperature", 1.0)
        live = self.live(s, t)
        if self.formula is cmkd:
            options["whole_t"] = t[~t.isneginf()] / T
        s, t = s[live] / T, t[live] / T
        if len(live) < 2 or (self.formula is not plackett_luce and ((s == s[0]).all() or (t == t[0]).all())):
            return s.sum() * 0 + 1
        return self.options.get("kd_weight", 1.0) * self.formula(s, t, **options)

    def rows(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (N,) of s, t (N, V) and the gradients (N, V) of each by its own row, in float64."""
        s, t = s.detach().double().requires_grad_(), t.detach().double()
        value = torch.stack([self.row(a, b) for a, b in zip(s, t, strict=True)])
        return value.detach(), torch.autograd.grad(value.sum(), s)[0]


def dist(s, t, beta=1.0, gamma=1.0, temperature=1.0):
    """(N, V) -> the loss of the whole batch."""
    q, p = (s / temperature).softmax(-1), (t / temperature).softmax(-1)
    inter = torch.stack([1 - rho(a, b) for a, b in zip(q, p, strict=True)]).mean()
    intra = torch.stack([1 - rho(a, b) for a, b in zip(q.T, p.T, strict=True)]).mean()
    return temperature**2 * (beta * inter + gamma * intra)


CASES = [
    Case("PearsonLoss", pearson),
    Case("PearsonLoss", pearson, dict(space="probs", temperature=2.0)),
    Case("SpearmanLoss", spearman),
    Case("SpearmanLoss", spearman, dict(tau=1.0, top_k=20, kd_weight=3.0)),
    Case("SpearmanLoss", spearman, dict(tau=0.01, exact=True)),
    Case("PlackettLuceLoss", plackett_luce),
    Case("PlackettLuceLoss", plackett_luce, dict(weights="uniform", top_k=30, temperature=2.0)),
    Case("KendallLoss", kendall, dict(mode="topk", top_k=16)),
    Case("KendallLoss", kendall, dict(mode="shifts", shifts=5, tau=0.5, seed=3)),
    Case("CMKDLoss", cmkd, dict(tau=0.3)),
    Case("CMKDLoss", cmkd, dict(pearson_weight=0.5, spearman_weight=2.0, hard="pearson")),
]
