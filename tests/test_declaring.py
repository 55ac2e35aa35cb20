"""Declaring a loss: every moment, every kind of point and every function of the tape, on every backend."""

import pytest
import torch
from accuracy import BACKENDS, F32, F64, Bar, Batch, batch, excess, only
from torch import Tensor

import kdkernels as kd
from kdkernels import tape

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


class Moments:
    """What a loss knows at a point, from the definition."""

    def __init__(self, s, t, y, T, student=0.0, teacher=0.0, frozen=False, exclude_label=False, raw=False):
        if raw:
            s, t = s * T, t * T
        x = (student * s if student else 0 * s) + (teacher * t if teacher else 0 * t)
        if exclude_label:
            x = x.scatter(-1, y[:, None], -torch.inf)
        x = x.detach() if frozen else x
        pi = x.softmax(-1)
        self.lse = x.logsumexp(-1)
        self.s, self.t = (pi * s).sum(-1), (pi * t).sum(-1)
        ds, dt = s - self.s[:, None], t - self.t[:, None]
        self.ss, self.st, self.tt = (pi * ds * ds).sum(-1), (pi * ds * dt).sum(-1), (pi * dt * dt).sum(-1)


POINTS = {
    "student": dict(student=1.0),
    "teacher": dict(teacher=1.0),
    "both": dict(student=0.7, teacher=0.4),
    "negative": dict(student=1.5, teacher=-0.5),
    "uniform": dict(),
    "raw": dict(student=0.3, teacher=0.2, raw=True),
    "frozen": dict(student=0.6, teacher=0.4, frozen=True),
    "without the label": dict(student=1.0, teacher=0.5, exclude_label=True),
}
VALUES = {  # m is the moment at one point
    "lse": lambda m: m.lse,
    "means": lambda m: 2 * m.s - m.t,
    "covariances": lambda m: m.ss + 3 * m.st - m.tt / 2,
    "all": lambda m: m.lse * m.s + m.t * m.st - m.ss + m.tt,
}


def textbook(points, value, rows: Batch, T, dtype):
    s, t = (x.detach().to(dtype).requires_grad_() for x in rows[:2])
    rows_value = value(*(Moments(s / T, t / T, rows.y, T, **p) for p in points))
    grads = torch.autograd.grad(rows_value.sum(), (s, t), allow_unused=True)
    grads = [torch.zeros_like(s) if g is None else g for g in grads]
    return [rows_value.detach(), *grads]


def declared(points, value):
    row_value, declared_points = value, tuple(kd.Point(**p) for p in points)

    class Declared(kd.Loss):
        needs_labels = any(p.exclude_label for p in declared_points)

        def points(self):
            return declared_points

        def value(self, *moments, label=None):
            return row_value(*moments)

    return Declared


def check(backend, points, value, T=1.0, V=29):
    rows = batch(8, V, scale=1.5, seed=7).to(F32 if backend in ("triton", "cuda") else F64)
    s, t = (x.clone().requires_grad_() for x in rows[:2])
    with only(backend):
        got = declared(points, value)(temperature=T, reduction="none")(s, t, rows.y)
        got.sum().backward()
    grads = [torch.zeros_like(s) if x.grad is None else x.grad for x in (s, t)]
    want, own = (textbook(points, value, rows, T, dtype) for dtype in (F64, F32))
    for name, a, e, o in zip(("value", "ds", "dt"), [got.detach(), *grads], want, own, strict=True):
        assert not (why := excess(a, Bar(e, o, e, 9 * torch.finfo(F64).eps), rows.s.dtype)), f"{name}: {why}"


@on_every_backend
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("point", POINTS)
def test_moments(point, value, backend):
    if point == "frozen" and value in ("lse", "all"):
        value = "means"  # constant weights: only what is averaged varies
    check(backend, [POINTS[point]], VALUES[value], T=2.0)


@on_every_backend
@pytest.mark.parametrize("K", [1, 2, 4, 6, 7, 9])
def test_any_number_of_points(K, backend):
    points = [dict(student=1 - k / 10, teacher=k / 10 + 0.1) for k in range(K)]
    check(backend, points, lambda *m: sum((k + 1) * x.lse * x.s for k, x in enumerate(m)))


class Tilted(kd.Loss):
    """Log-partition at a point between the rows; `share` is a number, or one for each row."""

    def __init__(self, share, **options):
        super().__init__(**options)
        self.share = share

    def points(self):
        return kd.Point(student=1), kd.Point(student=1 - self.share, teacher=self.share)

    def value(self, q, m):
        return (q.lse - m.lse) * m.s


@pytest.mark.parametrize("temperature", [2.0, torch.tensor([1.0, 2.0])], ids=["one", "rows"])
def test_no_points_at_a_temperature(temperature):
    class Constant(kd.Loss):
        needs_teacher = False

        def points(self):
            return ()

        def value(self):
            return 3.0

    s = torch.randn(2, 5, requires_grad=True)
    value = Constant()(s, temperature=temperature)
    value.backward()
    assert value.isfinite() and not s.grad.any()


@on_every_backend
def test_points_of_their_own_for_every_row(backend):
    rows = batch(4, 9, seed=5).to(F32 if backend in ("triton", "cuda") else F64)
    share, per_row = torch.tensor([0.2, 0.5, 1.0, 2.0]), torch.tensor([1.0, 2.0, 0.5, 3.0])
    s = rows.s.clone().requires_grad_()
    with only(backend):
        got = Tilted(share, reduction="none")(s, rows.t, temperature=per_row)
        got.sum().backward()
        for i in range(4):
            one = rows.s[i].clone().requires_grad_()
            value = Tilted(share[i].item(), temperature=per_row[i].item())(one, rows.t[i])
            value.backward()
            torch.testing.assert_close(got[i], value)
            torch.testing.assert_close(s.grad[i], one.grad)
        with pytest.raises(ValueError, match="4 rows of point coefficients"):
            Tilted(share)(rows.s[:3], rows.t[:3])


FUNCTIONS = {
    "exp": lambda q, p: tape.exp(q.lse - p.lse),
    "expm1": lambda q, p: tape.expm1((q.lse - p.lse) / 100),
    "log": lambda q, p: tape.log(q.lse * p.lse),
    "log1p": lambda q, p: tape.log1p(q.lse / 50),
    "sqrt": lambda q, p: tape.sqrt(q.ss + p.tt),
    "softplus": lambda q, p: tape.softplus(10 * (q.s - p.s)) + tape.softplus(100 - q.s),
    "sigmoid": lambda q, p: tape.sigmoid(q.s - p.s),
    "logaddexp": lambda q, p: tape.logaddexp(q.lse, p.s),
    "times": lambda q, p: tape.times(tape.where(q.s > p.s, q.s, 0.0), p.lse),
    "where": lambda q, p: tape.where(q.s > p.s, q.s * p.s, q.lse),
    "less": lambda q, p: tape.where(q.s < p.s, q.s * p.s, q.lse),
    "detach": lambda q, p: tape.detach(q.s) * q.lse,
    "arithmetic": lambda q, p: 1 - (2 / q.lse - p.s) ** 3 + (-q.t) / 2 - (3 - p.t) * 2 + 0.5,
}


@on_every_backend
@pytest.mark.parametrize("name", FUNCTIONS)
def test_tape_functions(name, backend):
    check(backend, [dict(student=1.0), dict(teacher=1.0)], FUNCTIONS[name])


def test_a_traced_value_refuses_what_it_cannot_record():
    x = tape.Tape(1).input(0)
    with pytest.raises(TypeError, match="truth value"):
        bool(x > 0)
    with pytest.raises(TypeError, match="power"):
        x**0.5
    with pytest.raises(TypeError, match="power"):
        x**-1


def test_tape_functions_of_tensors():
    x = torch.tensor([-1000.0, -1.0, 0.0, 30.0, 1000.0], dtype=F64)
    softplus = torch.tensor([0.0, 0.31326168751822286, 0.6931471805599453, 30.000000000000094, 1000.0], dtype=F64)
    torch.testing.assert_close(tape.softplus(x), softplus, rtol=1e-15, atol=0)
    assert torch.equal(tape.times(torch.zeros(3), torch.tensor([torch.inf, torch.nan, 1.0])), torch.zeros(3))
    assert isinstance(tape.exp(1.0), Tensor)


@pytest.mark.parametrize("name, fits", [("both", False), ("uniform", True), ("raw", True), ("frozen", True)])
def test_covariances_under_standardisation(name, fits):
    """On kernels those of a tilted point had a gradient without its third moments."""

    class Spread(kd.Loss):
        def points(self):
            return (kd.Point(**POINTS[name]),)

        def value(self, m):
            return m.ss + m.st

    if not fits:
        with pytest.raises(ValueError, match=r"standardize=True takes covariances .* only of a point without coeff"):
            Spread(standardize=True)
        return
    s, t = torch.randn(2, 4, 9, dtype=F64, generator=torch.Generator().manual_seed(0))
    results = []
    for backend in ("reference", "cpu"):
        with only(backend):
            leaf = s.clone().requires_grad_()
            value = Spread(standardize=True)(leaf, t)
            value.backward()
        results.append((value.detach(), leaf.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
