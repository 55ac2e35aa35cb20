"""The losses as people write them in torch: the definitions of tests/textbook.py, with torch's own KL divergence."""

import importlib.util
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

# A copy of its own: what is compared for accuracy keeps its own definitions.
_spec = importlib.util.spec_from_file_location("textbook_in_torch", Path(__file__).parents[1] / "tests" / "textbook.py")
textbook = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(textbook)


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
        scaled = (s, t) if temperature == 1 else (s / temperature, t / temperature)
        value = scale * case.formula(*scaled, y, **own).mean()
        return value + ce * F.cross_entropy(s, y) if ce else value

    return mean, case
