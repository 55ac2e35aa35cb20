"""Agreement of two rows of numbers by rank: exact, over any leading shape, without a gradient. scipy's numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, call

__all__ = ["kendall_tau", "rankdata", "spearman"]


def rankdata(a: Tensor) -> Tensor:
    """Ranks from 1 to V, ties averaged: scipy.stats.rankdata(a, axis=-1). [Kendall 1945]

    Args:
        a: (..., V) float64, float32, float16 or bfloat16. -0 and 0 tie; infinities are numbers; a row that holds a NaN
            has NaN ranks.

    Returns:
        (..., V) float64.

    Raises:
        TypeError, ValueError: a is not such a tensor.
    """
    call.check_logits("a", a)
    return _run("rankdata", a.detach()).view(a.shape)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rho, Pearson's correlation of the ranks with ties averaged: scipy.stats.spearmanr. [Spearman 1904]

    Args:
        a, b: (..., V) as for `rankdata`, of one shape.

    Returns:
        (...) float64; NaN where a row holds a NaN or is constant.

    Raises:
        TypeError, ValueError: an argument is not such a tensor, or their shapes or devices differ.
    """
    return _pair("spearman", a, b)


def kendall_tau(a: Tensor, b: Tensor) -> Tensor:
    """Kendall's tau-b, (P - Q) / sqrt((n0 - n1)(n0 - n2)): scipy.stats.kendalltau. [Kendall 1945; Knight 1966]

    P and Q count the pairs in which a and b agree and disagree, n0 all pairs, n1 and n2 those tied in a and in b.
    O(V log V).

    Args:
        a, b: (..., V) as for `rankdata`, of one shape.

    Returns:
        (...) float64; NaN where a row holds a NaN or is constant.

    Raises:
        TypeError, ValueError: an argument is not such a tensor, or their shapes or devices differ.
    """
    return _pair("kendall_tau", a, b)


def _pair(name: str, a: Tensor, b: Tensor) -> Tensor:
    call.check_logits("a", a)
    call.check_logits("b", b)
    if a.shape != b.shape:
        raise ValueError(f"b must have a's shape {tuple(a.shape)}, got {tuple(b.shape)}")
    if a.device != b.device:
        raise ValueError(f"b must be on a's device {a.device}, got {b.device}")
    return _run(name, a.detach(), b.detach()).view(a.shape[:-1])


@torch.no_grad()
def _run(name: str, *rows: Tensor) -> Tensor:
    backend = backends.pick(*rows)
    operators = getattr(backend, "METRICS", None)
    if operators is not None:
        return operators[name](*map(call.dense, rows))
    return globals()[f"_{name}"](*(x.reshape(-1, x.shape[-1]) for x in rows))


def _runs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Order of x (N, V) by value; first and one past the last position of the run of equals at each position."""
    ordered, order = torch.sort(x, dim=-1, stable=True)
    ordered = ordered.contiguous()
    return order, torch.searchsorted(ordered, ordered), torch.searchsorted(ordered, ordered, right=True)


def _rankdata(a: Tensor) -> Tensor:
    a = a.double()
    order, first, end = _runs(a)
    ranks = torch.empty_like(a).scatter_(-1, order, (first + end + 1).double() / 2)
    return ranks.masked_fill_(a.isnan().any(-1, keepdim=True), torch.nan)


def _spearman(a: Tensor, b: Tensor) -> Tensor:
    r, q = (2 * _rankdata(x) - (x.shape[-1] + 1) for x in (a, b))
    return (r * q).sum(-1) / (r * r).sum(-1).sqrt() / (q * q).sum(-1).sqrt()


def _dense_ranks(x: Tensor) -> Tensor:
    """0 for the smallest value of a row (N, V), 1 for the next one, ...; int64."""
    order, first, _ = _runs(x)
    step = torch.zeros_like(first)
    step[:, 1:] = first[:, 1:] != first[:, :-1]
    return torch.empty_like(first).scatter_(-1, order, step.cumsum(-1))


def _kendall_tau(a: Tensor, b: Tensor) -> Tensor:
    spoilt = a.isnan().any(-1) | b.isnan().any(-1)
    r, q = (_dense_ranks(x.double().nan_to_num(0.0)) for x in (a, b))
    size = a.shape[-1]
    both = q * size + r
    tied_a, tied_b, tied = (_tied_pairs(x) for x in (r, q, both))
    sequence = r.gather(-1, both.argsort(-1))  # by b, equal ones by a
    pairs = size * (size - 1) // 2
    balance = pairs - tied_a - tied_b + tied - 2 * _inversions(sequence)
    tau = balance.double() / (pairs - tied_a).double().sqrt() / (pairs - tied_b).double().sqrt()
    return tau.clamp(-1, 1).masked_fill(spoilt | (tied_a == pairs) | (tied_b == pairs), torch.nan)


def _tied_pairs(x: Tensor) -> Tensor:
    _, first, end = _runs(x)
    return (end - first - 1).sum(-1) // 2


def _inversions(x: Tensor) -> Tensor:
    """Pairs of x (N, V) in which an earlier number is larger; decided at the highest bit that differs."""
    found = torch.zeros_like(x[:, 0])
    place = torch.arange(x.shape[-1], device=x.device).expand_as(x)
    for bit in reversed(range(int(x.max()).bit_length())):
        one, group = (x >> bit) & 1, x >> (bit + 1)
        start = torch.searchsorted(group.contiguous(), group.contiguous())
        before = one.cumsum(-1) - one  # in the row; less those before the group
        found += ((before - before.gather(-1, start)) * (1 - one)).sum(-1)
        x = x.gather(-1, ((x >> bit) * x.shape[-1] + place).argsort(-1))  # stable by what is decided so far
    return found
