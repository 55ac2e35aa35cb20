"""Every loss from its definition, on log-probabilities, with no help from the library.

The formulas run in whatever dtype they are given: in float64 they are the truth the kernels are held to, and in
float32 their own error is the bar a kernel has to meet. `CASES` at the end lists what the tests run: one line a loss.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


def logp(x: Tensor) -> Tensor:
    return x.log_softmax(-1)


def weigh(w: Tensor, x: Tensor) -> Tensor:
    """w * x, with 0 * anything = 0 (the convention of p log p at p = 0), in the gradient as well."""
    return w * x.where(w > 0, torch.zeros_like(x))


def kl(lp: Tensor, lq: Tensor) -> Tensor:
    """sum_i p_i log(p_i / q_i) from log-probabilities."""
    return weigh(lp.exp(), lp - lq).sum(-1)


# --- the distillation terms: student logits s, teacher logits t (both already divided by their temperature), label y


def forward_kl(s, t, y):
    return kl(logp(t), logp(s))


def reverse_kl(s, t, y):
    return kl(logp(s), logp(t))


def ttm(s, t, y, gamma):
    """KL(p^ || q), p^ = p^gamma / sum p^gamma."""
    return kl(logp(gamma * logp(t)), logp(s))


def wttm(s, t, y, gamma, normalize_weight=False, detach_weight=False):
    """U KL(p^ || q), U = sum p^gamma, between 1 and V^(1 - gamma)."""
    weight = (gamma * logp(t)).exp().sum(-1)
    if normalize_weight:
        weight = weight / t.shape[-1] ** (1 - gamma)
    if detach_weight:
        weight = weight.detach()
    return weight * ttm(s, t, y, gamma)


def alpha_beta(s, t, y, alpha, beta):
    """-1/(ab) sum [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)] and its limits. [Cichocki et al. 2011, eq. 19]"""
    lp, lq, a, b = logp(t), logp(s), alpha, beta
    if a == 0 and b == 0:
        terms = (lp - lq) ** 2 / 2
    elif a == 0:
        terms = (weigh((b * lq).exp(), b * (lq - lp)) - (b * lq).exp() + (b * lp).exp()) / b**2
    elif b == 0:
        terms = (weigh((a * lp).exp(), a * (lp - lq)) - (a * lp).exp() + (a * lq).exp()) / a**2
    elif a + b == 0:
        gap = a * (lp - lq)
        terms = torch.where(gap == torch.inf, gap, gap.exp() - 1 - gap) / a**2
    else:
        mixed = (a * lp + b * lq).exp()
        terms = -(mixed - a / (a + b) * ((a + b) * lp).exp() - b / (a + b) * ((a + b) * lq).exp()) / (a * b)
    return terms.sum(-1)


def renyi(s, t, y, alpha):
    """log(sum p^a q^(1-a)) / (a - 1); at a = 1, KL(p || q); at a = 0, 0."""
    lp, lq = logp(t), logp(s)
    if alpha == 1:
        return kl(lp, lq)
    if alpha == 0:
        return lq.logsumexp(-1) / (alpha - 1)
    return (alpha * lp + (1 - alpha) * lq).logsumexp(-1) / (alpha - 1)


def hellinger(s, t, y):
    """1 - sum sqrt(p q)."""
    return 1 - ((logp(t) + logp(s)) / 2).exp().sum(-1)


def without(lp: Tensor, y: Tensor) -> Tensor:
    """(N, V), (N,) -> (N, V - 1): the entries of the classes other than y."""
    others = torch.ones_like(lp, dtype=torch.bool).scatter(-1, y[:, None], False)
    return lp[others].view(len(lp), lp.shape[-1] - 1)


def decoupled(lp, lq, y):
    """KL between the coins (p_y, 1 - p_y), (q_y, 1 - q_y); KL of the renormalised other classes; 1 - p_y."""
    other_p, other_q = without(lp, y), without(lq, y)
    coin_p = torch.stack((lp.gather(-1, y[:, None])[:, 0], other_p.logsumexp(-1)), -1)
    coin_q = torch.stack((lq.gather(-1, y[:, None])[:, 0], other_q.logsumexp(-1)), -1)
    return kl(coin_p, coin_q), kl(logp(other_p), logp(other_q)), coin_p[:, 1].exp()


def dkd(s, t, y, alpha, beta):
    """alpha KL of target or not + beta KL of the others."""
    target, others, _ = decoupled(logp(t), logp(s), y)
    return alpha * target + beta * others


def brier(s, t, y):
    return ((logp(s).exp() - torch.nn.functional.one_hot(y, s.shape[-1])) ** 2).sum(-1)


def logit_mse(s, t, y):
    return ((s - torch.nn.functional.one_hot(y, s.shape[-1])) ** 2).sum(-1)


def nothing(s, t, y):
    """No term beside those that all losses share."""
    return s.new_zeros(len(s))


def taid(s, t, y, tau):
    """KL(u || q), u = softmax((1 - tau) s + tau t) held constant: the gradient is q - u."""
    if tau == 1:
        mix = t
    elif tau == 0:
        mix = s
    else:
        mix = (1 - tau) * s + tau * t
    return kl(logp(mix).detach(), logp(s))


def kl_to_mixture(lp, lq, share):
    """KL(p || share p + (1 - share) q), from the ratios q / p: no rounding as large as a log-probability's."""
    ratio = torch.logaddexp(lp.new_tensor(math.log(share)), math.log(1 - share) + (lq - lp))
    return weigh(lp.exp(), -ratio).sum(-1)


def jsd(s, t, y, beta=0.5):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; KL(p || q) at 0, KL(q || p) at 1."""
    lp, lq = logp(t), logp(s)
    if beta in (0, 1):
        return kl(lq, lp) if beta else kl(lp, lq)
    return beta * kl_to_mixture(lp, lq, beta) + (1 - beta) * kl_to_mixture(lq, lp, 1 - beta)


def skew_kl(s, t, y, alpha=0.1):
    """KL(p || alpha p + (1 - alpha) q)."""
    lp, lq = logp(t), logp(s)
    return kl_to_mixture(lp, lq, alpha) if alpha else kl(lp, lq)


def skew_reverse_kl(s, t, y, alpha=0.1, detach_mixture=False):
    """KL(q || alpha q + (1 - alpha) p)."""
    lp, lq = logp(t), logp(s)
    if detach_mixture:
        lm = torch.logaddexp(lq.detach() + math.log(alpha), lp + math.log(1 - alpha))
        return kl(lq, lm)
    return kl_to_mixture(lq, lp, alpha) if alpha else kl(lq, lp)


def tvd(s, t, y):
    """sum |p - q| / 2."""
    return (logp(t).exp() - logp(s).exp()).abs().sum(-1) / 2


def as_large(p):
    """(V,) -> (V,): the mass of the entries that are as large, or larger."""
    values, inverse, counts = p.unique(return_inverse=True, return_counts=True)
    return (values * counts).flip(0).cumsum(0).flip(0)[inverse]


def akl(s, t, y, mu=0.5):
    """w KL(p || q) + (1 - w) KL(q || p), w the constant share of sum |p - q| in the head of the sorted teacher."""
    lp, lq = logp(t), logp(s)
    p, gap = lp.exp().detach(), (lp.exp() - lq.exp()).abs().detach()
    reached = torch.stack([as_large(row) for row in p])
    head = (reached <= mu) | (p == p.amax(-1, keepdim=True))
    w = torch.where(gap.sum(-1) > 0, (gap * head).sum(-1) / gap.sum(-1), 0.5)
    return weigh(w, kl(lp, lq)) + weigh(1 - w, kl(lq, lp))


def uld(s, t, y):
    """sum |q_(i) - p_(i)|, both sorted."""
    return (logp(s).exp().sort(-1).values - logp(t).exp().sort(-1).values).abs().sum(-1)


def grouped_kl(s, t, y, groups=None, between=1.0, within=1.0, balanced=False):
    """between KL(P || Q) + within sum_g w_g KL(p_g || q_g) of group masses P, Q; w = P, or 1."""
    lp, lq, total = logp(t), logp(s), 0
    groups = torch.zeros(s.shape[-1], dtype=torch.int64) if groups is None else torch.as_tensor(groups)
    for g in groups.unique():
        inside_p, inside_q = lp[:, groups == g], lq[:, groups == g]
        P, Q = inside_p.logsumexp(-1), inside_q.logsumexp(-1)
        weight = 1 if balanced else P.exp()
        total = total + between * P.exp() * (P - Q) + within * weight * kl(logp(inside_p), logp(inside_q))
    return total


def by_label(s, t, y, groups, between, within):
    """The same where the groups of a row are its label and the other classes."""
    target, others, mass = decoupled(logp(t), logp(s), y)
    return between * target + within * mass * others


def ltkd(s, t, groups, between=1.0, within=1.0):
    """between KL(P' || Q) + within sum_g KL(p_g || q_g), rows; P' is P over its sum in the batch, normalised. [LTKD]"""
    p, q = t.softmax(-1), s.softmax(-1)
    which = [groups == g for g in groups.unique()]
    P, Q = (torch.stack([x[:, g].sum(-1) for g in which], -1) for x in (p, q))
    balanced = P / P.sum(0)
    balanced = balanced / balanced.sum(-1, keepdim=True)
    inner = [kl((p[:, g] / p[:, g].sum(-1, keepdim=True)).log(), logp(s[:, g])) for g in which]
    return between * kl(balanced.log(), Q.log()) + within * sum(inner)


def sinkhorn(q, p, epsilon=0.1, iterations=20):
    """sum_ij P_ij |q_i - p_j| / N, P by alternating normalisation; q, p (N, V) probabilities."""
    cost = (q[:, None] - p).abs().sum(-1)
    plan = (-cost / epsilon).exp()
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0)
    return (plan * cost).sum() / len(q)


# --- what all losses share


def cross_entropy(s, y, label_smoothing=0.0, z_loss=0.0):
    """-log q_y, smoothed towards the uniform distribution, plus z_loss * logsumexp(s)^2."""
    lq = logp(s)
    ce = -lq.gather(-1, y[:, None])[:, 0]
    if label_smoothing:
        ce = (1 - label_smoothing) * ce - label_smoothing * lq.mean(-1)
    return ce + z_loss * s.logsumexp(-1) ** 2 if z_loss else ce


def standardized(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)


@dataclass(frozen=True, eq=False)
class Case:
    """A loss class by name, the options given to its constructor, its formula and what the class presets."""

    name: str
    formula: Callable
    options: dict = field(default_factory=dict)
    shared: dict = field(default_factory=dict)  # settings every loss has, as this class presets them

    SHARED = ("temperature", "teacher_temperature", "t_squared", "kd_weight", "ce_weight", "label_smoothing", "z_loss",
              "standardize")  # fmt: skip

    def __str__(self):
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.options.items())])

    def setting(self, key, default):
        return self.options.get(key, self.shared.get(key, default))

    @property
    def needs_teacher(self):
        return self.formula not in (brier, logit_mse, nothing)

    @property
    def needs_labels(self):
        return self.formula in (brier, logit_mse, dkd, by_label) or self.setting("ce_weight", 0.0) != 0

    def rows(self, s, t=None, y=None, temperature=None, vocab_mask=None) -> Tensor:
        """(N, V), (N, V), (N,) -> (N,): the loss of every row; classes impossible on both sides are deleted."""
        dead = s.isneginf() if t is None or not self.needs_teacher else s.isneginf() & t.isneginf()
        if vocab_mask is not None:
            dead = dead | ~vocab_mask
        if dead.any():
            return torch.cat([self.delete(dead[i], i, s, t, y, temperature) for i in range(len(s))])
        if s.shape[-1] == 0:
            return s.new_full((len(s),), torch.nan)
        return self.living(s, t, y, temperature)

    def delete(self, dead, i, s, t, y, temperature):
        if temperature is not None and torch.is_tensor(temperature):
            temperature = temperature[i : i + 1]
        label = None if y is None else (~dead).long().cumsum(0)[y[i : i + 1]] - 1
        return self.rows(s[i : i + 1, ~dead], None if t is None else t[i : i + 1, ~dead], label, temperature)

    def living(self, s, t, y, temperature):
        T = self.setting("temperature", 1.0) if temperature is None else temperature
        T = torch.as_tensor(T, dtype=s.dtype, device=s.device).reshape(-1)
        T_teacher = self.setting("teacher_temperature", None)
        T_teacher = T if T_teacher is None else s.new_tensor([T_teacher])
        z = standardized if self.setting("standardize", False) else lambda x: x
        params = {k: v for k, v in self.options.items() if k not in self.SHARED and k not in self.shared.get("own", ())}
        term = self.formula(z(s) / T[:, None], None if t is None else z(t) / T_teacher[:, None], y, **params)
        if self.setting("t_squared", False):
            term = term * T**2
        total = self.setting("kd_weight", 1.0) * term
        if ce := self.setting("ce_weight", 0.0):
            total = total + ce * cross_entropy(s, y, self.setting("label_smoothing", 0.0), self.setting("z_loss", 0.0))
        return total

    def loss(self, s, t=None, y=None, *, row_weight=None, num_items=None, temperature=None, vocab_size=None,
             vocab_mask=None, reduction="mean", ignore_index=-100):  # fmt: skip
        """The whole loss on logits (..., V): what the public call returns."""
        shape, V = s.shape[:-1], s.shape[-1]
        flat = lambda x, *tail: None if x is None else x.expand((*shape, *tail)).reshape(-1, *tail)  # noqa: E731
        s, t, y, row_weight = flat(s, V), flat(t, V), flat(y), flat(row_weight)
        if torch.is_tensor(temperature) and temperature.dim():
            temperature = flat(temperature)
        if vocab_size is not None:
            s, t = s[:, :vocab_size], None if t is None else t[:, :vocab_size]
            vocab_mask = None if vocab_mask is None else vocab_mask[..., :vocab_size]
        keep = s.new_ones(len(s), dtype=torch.bool) if y is None else y != ignore_index
        at = lambda x: x[keep] if torch.is_tensor(x) and x.dim() else x  # noqa: E731
        kept = self.rows(at(s), at(t), at(y), at(temperature), vocab_mask) if keep.any() else s[keep].sum(-1)
        if row_weight is not None:
            kept = kept * at(row_weight)
        if reduction == "none":
            return s.new_zeros(len(s)).masked_scatter(keep, kept).view(shape)
        if reduction == "sum" or len(kept) == 0:
            return kept.sum()
        divide = {"mean": int(keep.sum()) if num_items is None else num_items, "batchmean": shape[0] if shape else 1}
        return kept.sum() / divide[reduction]


def power_transform(x, gamma):
    return (gamma * x).softmax(-1)


def power_sum(x, gamma):
    return (gamma * logp(x)).exp().sum(-1)


def kd_shared(alpha, temperature=2.0):
    """KDLoss = (1 - alpha) CE + alpha T^2 KL, in the settings every loss has."""
    return dict(kd_weight=alpha, ce_weight=1 - alpha, temperature=temperature, t_squared=True, own=("alpha",))


T2 = dict(t_squared=True)
CASES = [
    Case("KDLoss", forward_kl, dict(alpha=0.3, temperature=3.0), kd_shared(0.3)),
    Case("KDLoss", forward_kl, dict(alpha=1.0), kd_shared(1.0)),
    Case("ForwardKLLoss", forward_kl),
    Case("ForwardKLLoss", forward_kl, dict(temperature=2.0, teacher_temperature=0.7, kd_weight=0.4, ce_weight=0.6)),
    Case("ForwardKLLoss", forward_kl, dict(standardize=True, temperature=2.0, t_squared=True)),
    Case("ReverseKLLoss", reverse_kl),
    Case("ReverseKLLoss", reverse_kl, dict(temperature=4.0, ce_weight=0.5, label_smoothing=0.1, z_loss=0.01)),
    Case("TTMLoss", ttm, dict(gamma=0.3)),
    Case("WTTMLoss", wttm, dict(gamma=0.5)),
    Case("WTTMLoss", wttm, dict(gamma=0.1, normalize_weight=True, detach_weight=True, ce_weight=1.0)),
    Case("AlphaBetaLoss", alpha_beta, dict(alpha=0.2, beta=0.7)),
    Case("AlphaBetaLoss", alpha_beta, dict(alpha=1.3, beta=-0.4)),
    Case("AlphaBetaLoss", alpha_beta, dict(alpha=0.0, beta=0.8)),
    Case("AlphaBetaLoss", alpha_beta, dict(alpha=0.6, beta=0.0)),
    Case("AlphaBetaLoss", alpha_beta, dict(alpha=0.5, beta=-0.5)),
    Case("AlphaBetaLoss", alpha_beta, dict(alpha=0.0, beta=0.0)),
    Case("RenyiLoss", renyi, dict(alpha=0.5)),
    Case("RenyiLoss", renyi, dict(alpha=2.0)),
    Case("RenyiLoss", renyi, dict(alpha=1.0)),
    Case("HellingerLoss", hellinger),
    Case("DKDLoss", dkd, dict(alpha=1.0, beta=8.0), T2),
    Case("DKDLoss", dkd, dict(alpha=0.5, beta=2.0, temperature=4.0), T2),
    Case("CrossEntropyLoss", nothing, dict(label_smoothing=0.1, z_loss=0.01), dict(kd_weight=0.0, ce_weight=1.0)),
    Case("BrierLoss", brier),
    Case("LogitMSELoss", logit_mse),
    Case("TAIDLoss", taid, dict(tau=0.4)),
    Case("JSDLoss", jsd),
    Case("JSDLoss", jsd, dict(beta=0.9, temperature=2.0, t_squared=True, ce_weight=0.5)),
    Case("JSDLoss", jsd, dict(beta=0.0)),
    Case("JSDLoss", jsd, dict(beta=1.0)),
    Case("SkewKLLoss", skew_kl),
    Case("SkewKLLoss", skew_kl, dict(alpha=0.5, standardize=True)),
    Case("SkewKLLoss", skew_kl, dict(alpha=0.0)),
    Case("SkewReverseKLLoss", skew_reverse_kl),
    Case("SkewReverseKLLoss", skew_reverse_kl, dict(alpha=0.001)),
    Case("SkewReverseKLLoss", skew_reverse_kl, dict(alpha=0.3, detach_mixture=True)),
    Case("TVDLoss", tvd),
    Case("AKLLoss", akl),
    Case("AKLLoss", akl, dict(mu=0.8, temperature=2.0, ce_weight=0.5)),
    Case("GroupedKLLoss", grouped_kl, dict(between=2.0, within=0.5)),
    Case("GroupedKLLoss", by_label, dict(groups="label", between=0.5, within=3.0, temperature=2.0, t_squared=True,
                                         ce_weight=0.4)),
    Case("TAIDLoss", taid, dict(tau=0.8, temperature=2.0, standardize=True)),
]
