"""The losses as people write them in torch: the definitions of tests/textbook.py, with torch's own KL divergence, and
of losses whose definition there goes over all pairs of classes the usual code, by sorting."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import kdkernels as kd

# A copy of its own: what is compared for accuracy keeps its own definitions.
_spec = importlib.util.spec_from_file_location("textbook_in_torch", Path(__file__).parents[1] / "tests" / "textbook.py")
textbook = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(textbook)
GROUPS = 8


def _kl(lp, lq):
    return F.kl_div(lq, lp, reduction="none", log_target=True).sum(-1)


def _dkd(s, t, y, alpha, beta):
    """As in the authors' code: the label's logit is pushed down by 1000 instead of being left out."""
    label = F.one_hot(y, s.shape[-1]).bool()
    p, q = t.softmax(-1), s.softmax(-1)
    coins = [torch.stack(((x * label).sum(-1), (x * ~label).sum(-1)), -1) for x in (p, q)]
    target = F.kl_div(coins[1].log(), coins[0], reduction="none").sum(-1)
    others = F.kl_div(F.log_softmax(s - 1000 * label, -1), F.softmax(t - 1000 * label, -1), reduction="none").sum(-1)
    return alpha * target + beta * others


textbook.kl = _kl


def loss(name: str, **options):
    """The mean loss of (student, teacher, labels) by the definition, and the `textbook.Case` it is."""
    case = next(c for c in textbook.CASES if c.name == name and c.options.items() >= options.items())
    if name == "DKDLoss":
        case = textbook.Case(name, _dkd, case.options, case.shared)
    temperature = case.setting("temperature", 1.0)
    term, ce = case.setting("kd_weight", 1.0), case.setting("ce_weight", 0.0)
    own = {k: v for k, v in case.options.items() if k not in case.SHARED and k not in case.shared.get("own", ())}
    scale = term * (temperature**2 if case.setting("t_squared", False) else 1)

    def mean(s, t, y):
        scaled = (s, t) if temperature == 1 or t is None else (s / temperature, t / temperature)
        value = scale * case.formula(*scaled, y, **own).mean()
        return value + ce * textbook.cross_entropy(s, y, case.setting("label_smoothing", 0.0),
                                                   case.setting("z_loss", 0.0)).mean() if ce else value  # fmt: skip

    return mean, case


def wide(x):
    return x if x.dtype == torch.float64 else x.float()


def akl(s, t, mu=0.5):
    """As in the authors' code: one sort of the teacher's row."""
    log_p, log_q = t.log_softmax(-1), s.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    top, order = p.detach().sort(-1, descending=True)
    head = top.cumsum(-1) <= mu
    head[:, 0] = True
    gap = (p - q).detach().abs().gather(-1, order)
    w = (gap * head).sum(-1) / gap.sum(-1)
    return (w * (p * (log_p - log_q)).sum(-1) + (1 - w) * (q * (log_q - log_p)).sum(-1)).mean()


def grouped(s, t):
    at = torch.arange(s.shape[-1], device=s.device) % GROUPS
    log_p, log_q = t.log_softmax(-1), s.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    P, Q = (x.new_zeros(len(x), GROUPS).index_add(-1, at, x).log() for x in (p, q))
    return ((P.exp() * (P - Q)).sum(-1) + (p * (log_p - P[:, at] - log_q + Q[:, at])).sum(-1)).mean()


def ltkd(s, t):
    return textbook.ltkd(s, t, torch.arange(s.shape[-1], device=s.device) % GROUPS).mean()


def sinkhorn(s, t):
    q, p = (s / 2).softmax(-1), (t / 2).softmax(-1)
    cost = torch.cdist(wide(q), wide(p), p=1.0)
    plan = (-cost / 0.1).exp()
    for _ in range(20):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0)
    return (plan * cost).sum() / len(q)


def hard_ranks(x):
    return x.argsort(-1).argsort(-1).float()


def scattered_ranks(x):
    """The same with one sort."""
    places = torch.arange(x.shape[-1], device=x.device).expand_as(x)
    return torch.empty_like(places).scatter_(-1, x.argsort(-1), places).to(wide(x).dtype)


def correlation(a, b):
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def one_minus_lapsum(s, t, tau=0.1):
    """Of each row, from soft ranks as one writes them in torch: a sort and two cumulative sums in the log domain."""
    s = wide(s)
    x, order = (s / (tau * s.std(-1, correction=0, keepdim=True))).sort(-1)
    below = (x.logcumsumexp(-1) - x).exp() - 1
    above = ((-x).flip(-1).logcumsumexp(-1).flip(-1) + x).exp() - 1
    soft = torch.arange(x.shape[-1], dtype=x.dtype, device=x.device) + (1 - below + above) / 2
    return 1 - correlation(soft, scattered_ranks(t).gather(-1, order))


def lapsum(s, t):
    return one_minus_lapsum(s, t).mean()


def hard_spearman(s, t):
    return (1 - correlation(hard_ranks(s), hard_ranks(t))).mean()


def scattered_spearman(s, t):
    return (1 - correlation(scattered_ranks(s), scattered_ranks(t))).mean()


def pearson(s, t):
    return (1 - correlation(wide(s), wide(t))).mean()


def pearson_of_probabilities(s, t):
    return (1 - correlation(wide(s).softmax(-1), wide(t).softmax(-1))).mean()


def plackett_luce(s, t):
    t, order = wide(t).sort(-1)
    s = wide(s).gather(-1, order)
    return (t.softmax(-1) * (s.logcumsumexp(-1) - s)).sum(-1).mean()


def kendall(s, t, k=128, tau=0.1):
    t, index = t.topk(min(k, t.shape[-1]), -1)
    s, k = wide(s.gather(-1, index)), t.shape[-1]
    s = s / (tau * s.std(-1, correction=0, keepdim=True))
    agree = (t[:, :, None] - t[:, None]).sign() * (s[:, :, None] - s[:, None]).tanh()
    return (1 - agree.sum((-1, -2)) / (k * (k - 1))).mean()


def dist(s, t):
    q, p = wide(s).softmax(-1), wide(t).softmax(-1)
    return (1 - correlation(q, p)).mean() + (1 - correlation(q.T, p.T)).mean()


def cmkd(s, t):
    p = wide(t).softmax(-1)
    h = torch.special.entr(p).sum(-1) / p.new_tensor(p.shape[-1]).log()
    return ((1 - h) * (1 - correlation(wide(s), wide(t))) + h * one_minus_lapsum(s, t)).mean()


USUAL = {
    "AKLLoss": akl, "GroupedKLLoss": grouped, "LTKDLoss": ltkd, "SinkhornLoss": sinkhorn, "SpearmanLoss": lapsum,
    "PearsonLoss": pearson, "PlackettLuceLoss": plackett_luce, "KendallLoss": kendall, "DISTLoss": dist,
    "CMKDLoss": cmkd,
}  # fmt: skip


def pair(name: str, classes: int) -> tuple[kd.BaseLoss, Callable]:
    """Of a class of the catalogue: a loss, and the same as a function of (student, teacher, labels) in torch.
    "SymmetricKL" is half of either KL."""
    if name == "SymmetricKL":
        (ours, one), (other, two) = (pair(f"{way}KLLoss", classes) for way in ("Forward", "Reverse"))
        return 0.5 * ours + 0.5 * other, lambda s, t, y: (one(s, t, y) + two(s, t, y)) / 2
    cls = kd.catalogue()[name]
    if name in USUAL:
        grouped = name in ("GroupedKLLoss", "LTKDLoss")
        made = cls(torch.arange(classes) % GROUPS) if grouped else cls()
        return made, lambda s, t, y: USUAL[name](s, t)
    if name == "CrossEntropyLoss":
        return cls(), lambda s, t, y: F.cross_entropy(s, y)
    if name == "ULDLoss":
        return cls(), lambda s, t, y: textbook.uld(s, t, y).mean()
    formula, case = loss(name)
    return cls(**case.options), formula
