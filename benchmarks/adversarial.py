"""What breaks losses: inputs that are legal and where many give NaN, and features that are asked for; each is tried.

A function of (student, teacher, labels) survives a case if value and gradient are those of tests/textbook.py in
float64, within what its dtype allows; an infinite value where the truth is infinite. Functions of hidden states get the
logits as hidden states and the identity as head, which cannot make a logit of -inf: those cases are not theirs.
"""

from collections.abc import Callable

import textbook
import torch
from torch import Tensor

INF = torch.inf
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def cases() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Name -> student, teacher, labels."""
    g = torch.Generator().manual_seed(0)
    s, t = 3 * torch.randn(2, 3, 8, generator=g)
    y, seen = torch.tensor([1, 2, 3]), torch.ones(8)
    mask = lambda x, *at: x.index_fill(-1, torch.tensor(at), -INF)  # noqa: E731
    far = torch.tensor([0.0, -200, -300, -1, -250, -200, -2, -150])
    return {
        "a class masked (-inf) in both": (mask(s, 5, 6), mask(t, 5, 6), y),
        "masked in the teacher": (s, mask(t, 5), y),
        "masked in the student": (mask(s, 5), t, y),
        "both underflow": (far + s / 9, far + t / 9, y),
        "one underflows": (far + s, t, y),
        "disjoint certainty": (1000 * torch.eye(8)[:3], 1000 * torch.eye(8)[3:6], y),
        "giant, 1e4": (1e4 * s, 1e4 * t, y),
        "giant, 1e30": (1e30 * s, 1e30 * t, y),
        "all ties": (s, t.round(), y),
        "all equal": (s * 0, t * 0 + 7, y),
        "teacher = student": (s, s.clone(), y),
        "one class": (s[:, :1], t[:, :1], y * 0),
        "labels ignored": (s, t, torch.tensor([1, -100, 3])),
        "all labels ignored": (s, t, y * 0 - 100),
        "no rows": (s[:0], t[:0], y[:0]),
        "bfloat16": (s.bfloat16(), t.bfloat16(), y),
        "bfloat16, extremes": ((s.sign() * 3e38 * seen).bfloat16(), (t.sign() * 3e38 * seen).bfloat16(), y),
        "float16, extremes": ((s.sign() * 6e4 * seen).half(), (t.sign() * 6e4 * seen).half(), y),
        "subnormal": (s * 1e-42, t * 1e-42, y),
        "an offset of 1e6": (s.round() + 1e6, t.round() - 1e6, y),
    }


def definition(loss: str, **options) -> Callable:
    """The textbook's mean of a batch."""
    if loss == "SymmetricKL":
        ways = [definition(f"{way}KLLoss", **options) for way in ("Forward", "Reverse")]
        return lambda s, t, y: sum(f(s, t, y) for f in ways) / 2
    case = next(c for c in textbook.CASES if c.name == loss)
    return textbook.Case(loss, case.formula, options, case.shared).loss


def truth(loss: str, constant: bool, s: Tensor, t: Tensor, y: Tensor, **options) -> tuple[float, Tensor]:
    s, t = s.detach().double().clone().requires_grad_(), t.detach().double()
    value = definition(loss, **options)(s, t, y)
    gradient = torch.autograd.grad(value, s)[0] if value.requires_grad else torch.zeros_like(s)
    kept = y != -100
    if constant and kept.any():  # the cross-entropy with the teacher is above the KL by the teacher's entropy
        value = value + (0.5 if loss == "SymmetricKL" else 1) * torch.special.entr(t.softmax(-1)).sum(-1)[kept].mean()
    return value.item(), gradient


def verdict(function: Callable, s: Tensor, t: Tensor, y: Tensor, exact: tuple[float, Tensor]) -> str:
    """'ok', 'NaN', 'wrong' or what was raised."""
    leaf, (value, gradient) = s.clone().requires_grad_(), exact
    try:
        got = function(leaf, t, y)
        if got.requires_grad:
            got.backward()
    except Exception as error:  # another library's, to be reported
        return f"raises {type(error).__name__}"
    found = torch.zeros_like(s) if leaf.grad is None else leaf.grad
    got, found, near = got.item(), found.double(), TOLERANCE[s.dtype]
    if got != got or (value < INF and not (abs(got) < INF and found.isfinite().all())):
        return "NaN"
    if value == INF:
        return "ok" if got == INF else "wrong"
    size = gradient.norm().item()
    close = abs(got - value) <= near * max(abs(value), 1e-3)
    return "ok" if close and (found - gradient).norm().item() <= near * max(size, 1e-3) else "wrong"


def survived(function: Callable, loss: str, linear: bool = False, constant: bool = False) -> dict[str, str]:
    """Case -> verdict."""
    found = {}
    for name, (s, t, y) in cases().items():
        if linear and (s.isneginf().any() or t.isneginf().any()):
            continue
        found[name] = verdict(logits_of(function) if linear else function, s, t, y, truth(loss, constant, s, t, y))
    return found


def logits_of(function: Callable) -> Callable:
    """A function of hidden states and heads as one of logits."""

    def of_logits(s, t, y=None):
        head = torch.eye(s.shape[-1], dtype=s.dtype)
        return function(s, head.clone().requires_grad_(), t, head, y)

    return of_logits


def features(make: Callable, loss: str, linear: bool = False, constant: bool = False) -> dict[str, bool]:
    """What is asked for, tried: a temperature, labels that leave rows out, float64 to 12 digits, a gradient for the
    teacher, and for the gradient itself (double backward)."""
    lift, (s, t, y) = (logits_of if linear else lambda f: f), cases()["labels ignored"]
    plain = torch.tensor([1, 2, 3])

    def holds(check: Callable) -> bool:
        try:
            return bool(check())
        except Exception:  # another library's way to say no
            return False

    def right(function, s, t, y, near, **options):
        _, gradient = truth(loss, False, s, t, y, **options)
        leaf = s.clone().requires_grad_()
        function(leaf, t, y).backward()
        return (leaf.grad - gradient).norm() <= near * gradient.norm()

    def teacher_gradient():
        leaf, exact = t.clone().requires_grad_(), t.double().requires_grad_()
        function = lift(make())
        function(s.clone().requires_grad_(), leaf, plain).backward()
        definition(loss)(s.double(), exact, plain).backward()
        return (leaf.grad - exact.grad).norm() <= 1e-3 * exact.grad.norm()

    def twice():
        leaf = s.clone().requires_grad_()
        (once,) = torch.autograd.grad(lift(make())(leaf, t, plain), leaf, create_graph=True)
        return torch.autograd.grad(once.square().sum(), leaf)[0].isfinite().all()

    return {
        "temperature": holds(lambda: right(lift(make(temperature=2.0)), s, t, plain, 1e-3, temperature=2.0)),
        "ignored labels": holds(lambda: right(lift(make()), s, t, y, 1e-3)),
        "float64": holds(lambda: right(lift(make()), s.double(), t.double(), plain, 1e-12)),
        "teacher's gradient": holds(teacher_gradient),
        "double backward": holds(twice),
    }
