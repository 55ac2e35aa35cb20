"""Losses that compare the order of the classes: histograms, scans and a table where others sort."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import metrics
from .compare import KENDALL, PLACKETT_LUCE, SPEARMAN, Comparison, bandwidth, correlation
from .options import check_bool, check_choice, check_count, check_number

__all__ = ["KendallLoss", "PlackettLuceLoss", "SpearmanLoss"]

_NEVER = -1e300  # exp of it is 0, and unlike -inf it has a difference


def _kernel_sums(x: Tensor, alive: Tensor) -> Tensor:
    """sum_{j < i} alive_j e^(x_j - x_i) of ascending x (N, V), by doubling: (N, V)."""
    total, step = alive.to(x.dtype), 1
    while step < x.shape[-1]:
        added = (x[:, :-step] - x[:, step:]).exp() * total[:, :-step]
        total, step = torch.cat((total[:, :step], total[:, step:] + added), -1), 2 * step
    return total - alive.to(x.dtype)


class SpearmanLoss(Comparison):
    """`1 - rho(R(s), rank(t))`, R the student's soft ranks. [Struski et al. 2025, LapSum; Spearman 1904]

    R_i = sum_j F((s_i - s_j) / a), F the Laplace distribution function, a = tau std(s): the loss depends on neither the
    scale nor the offset of the logits. tau -> 0 gives Spearman's rho, tau -> inf the correlation of the logits with the
    teacher's ranks. A peaked teacher makes the gradient small beside KL's: its norm is 1/120 of that for random normal
    logits of deviation 3 at V = 131072 (with top_k=128 1/1.5); choose kd_weight accordingly. Over the whole vocabulary
    nearly all of it goes to the tail; top_k brings it to the head (benchmarks/pages/rank_gradients.md has pictures).

    float64 rows and rows of fewer than 4096 live classes are sorted. Longer ones of 16 bits go through histograms of
    their bits, exactly. Longer float32 rows go through uniform bins with interpolation, at least 4096 of them and 32 to
    a bandwidth a (2^14 for the teacher): the gradient then errs by less than 1e-3 of its norm. Rows where it would be
    more are sorted: of heavy tails, or of a loss within 256 / V of 0 or 2. On a GPU they go through cells 2^-11
    deviations wide where most classes are, with the same bound; all are sorted at tau < 0.02, and those of a loss
    within 256 / V of 0 or 2 by a second launch, which looks for them itself, so that the host waits for nothing. Such a
    row moves about ten times the bytes.

    Args:
        tau: bandwidth > 0 in standard deviations of the row.
        top_k: compare the teacher's top_k classes only (ties go to the first); None for all.
        exact: sort float32 rows as well.
    """

    work = "3 w, 1 exp for each bin of a histogram, or for each class of a sort"
    kind = SPEARMAN

    def __init__(self, tau: float = 0.1, top_k: int | None = None, exact: bool = False, **options: Any):
        super().__init__(**options)
        self.tau, self.top_k, self.exact = tau, top_k, exact

    def check(self):
        check_number("tau", self.tau, above=0)
        if self.top_k is not None:
            check_count("top_k", self.top_k)
        check_bool("exact", self.exact)

    def settings(self):
        return self.tau, self.top_k or 0, self.exact

    def definition(self, s, t, live, args):
        n = live.sum(-1, keepdim=True)
        order = torch.sort(s.detach().masked_fill(~live, math.inf), dim=-1).indices
        x, alive = (s / bandwidth(s, live, args[:, 2])).gather(-1, order), live.gather(-1, order)
        x = torch.where(alive, x, x.detach().masked_fill(~alive, -math.inf).amax(-1, keepdim=True))
        below, above = _kernel_sums(x, alive), _kernel_sums(-x.flip(-1), alive.flip(-1)).flip(-1)
        place = torch.arange(s.shape[-1], dtype=s.dtype, device=s.device)
        soft = torch.where(alive, place + (1 - below + above - n) / 2, 0.0)
        ranks = metrics._rankdata(t.detach().masked_fill(~live, math.inf)) - (n + 1) / 2
        return 1 - correlation(soft, torch.where(live, ranks, 0.0).gather(-1, order))


class PlackettLuceLoss(Comparison):
    """`-sum_i w_i (s_i - log sum_{j: t_j <= t_i} e^{s_j})`: the teacher's order under the student. [Plackett 1975]

    ListMLE (Xia et al. 2008) with weights; classes with equal teacher logits are tied as Breslow (1974) ties them. The
    weights of a row sum to 1.

    Args:
        weights: "teacher" weighs each place by its probability, and so looks at the head; "uniform" by 1 / V.
        top_k: rank the teacher's top_k classes only (ties go to the first); None for all.
    """

    work = "3 w, 2 exp, a sort"
    kind = PLACKETT_LUCE
    needs_spread = scale_free = False

    def __init__(self, weights: str = "teacher", top_k: int | None = None, **options: Any):
        super().__init__(**options)
        self.weights, self.top_k = weights, top_k

    def check(self):
        check_choice("weights", self.weights, ("teacher", "uniform"))
        if self.top_k is not None:
            check_count("top_k", self.top_k)

    def settings(self):
        return 1.0, self.top_k or 0, self.weights == "teacher"

    def definition(self, s, t, live, args):
        t, order = torch.sort((t.detach() * args[:, 1:2]).masked_fill(~live, math.inf), dim=-1)
        alive = live.gather(-1, order)
        s = (s * args[:, :1]).gather(-1, order)
        log_d = torch.where(alive, s, _NEVER).logcumsumexp(-1)
        log_d = log_d.gather(-1, torch.searchsorted(t.contiguous(), t.contiguous(), right=True) - 1)
        scores = t if self.weights == "teacher" else torch.zeros_like(t)
        weight = torch.where(alive, scores, -math.inf).softmax(-1)
        return (weight * torch.where(alive, log_d - s, 0.0)).sum(-1)


class KendallLoss(Comparison):
    """`1 - mean_ij sgn(t_i - t_j) tanh((s_i - s_j) / a), a = tau std(s)`: a soft Kendall's tau. [Kendall 1938]

    Pairs that are tied in the teacher count 0; tau -> 0 gives tau-a.

    Args:
        mode: "topk" takes all pairs of the teacher's top_k classes. "shifts" takes the pairs (i, i + h) of the whole
            row, i + h modulo the number of live classes, for a few random h: an unbiased estimate.
        top_k: of mode "topk"; the cost is its square (ties go to the first).
        shifts: how many h.
        tau: bandwidth > 0 in standard deviations of the classes compared.
        seed: of the shifts; None draws new ones from torch's generator at each call.
    """

    work = "3 w, an exp for each pair"
    kind = KENDALL
    _places: Tensor | None

    def __init__(self, mode: str = "topk", top_k: int = 128, shifts: int = 16, tau: float = 0.1,
                 seed: int | None = None, **options: Any):  # fmt: skip
        super().__init__(**options)
        self.mode, self.top_k, self.shifts, self.tau, self.seed = mode, top_k, shifts, tau, seed

    def check(self):
        check_choice("mode", self.mode, ("topk", "shifts"))
        check_number("tau", self.tau, above=0)
        for name in ("top_k", "shifts"):
            check_count(name, getattr(self, name))
        if self.seed is not None:
            check_count("seed", self.seed, least=0)

    def settings(self):
        return self.tau, self.top_k if self.mode == "topk" else 0, 0.0

    def _prepare(self):
        super()._prepare()
        vars(self)["_places"] = None
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed)
            vars(self)["_places"] = torch.rand(self.shifts, generator=generator, dtype=torch.float64)

    def _draw(self):
        vars(self)["_drawn"] = self.columns()

    def columns(self):
        if self.mode == "topk":
            return None
        if "_drawn" in vars(self):
            return vars(self)["_drawn"]
        return torch.rand(self.shifts, dtype=torch.float64) if self._places is None else self._places

    def definition(self, s, t, live, args):
        a, n = bandwidth(s, live, args[:, 2]), live.sum(-1, keepdim=True)
        order = torch.sort((~live).byte(), dim=-1, stable=True).indices[:, : int(n.max())]
        s, t, live = (s / a).gather(-1, order), t.detach().gather(-1, order), live.gather(-1, order)
        if self.mode == "topk":
            agree = (t[:, :, None] - t[:, None]).sign() * (s[:, :, None] - s[:, None]).tanh()
            return 1 - (agree * (live[:, :, None] & live[:, None])).sum((-1, -2)) / (n * (n - 1))[:, 0]
        total = torch.zeros_like(s[:, 0])
        for shift in args[0, 5:]:
            other = (torch.arange(s.shape[-1], device=s.device) + 1 + (shift * (n - 1)).long()) % n
            agree = (t - t.gather(-1, other)).sign() * (s - s.gather(-1, other)).tanh()
            total = total + (agree * live).sum(-1)
        return 1 - total / (n[:, 0] * self.shifts)
