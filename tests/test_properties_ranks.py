"""What every loss that compares, sorts or transports whole rows must satisfy, whatever its formula."""

import pytest
import torch
from accuracy import F64, only
from hypothesis import given
from hypothesis import strategies as st
from textbook_ranks import CASES
from torch.autograd import gradcheck

import kdkernels as kd

MORE = (("DISTLoss", {}), ("DISTLoss", dict(temperature=2.0, beta=0.5)), ("ULDLoss", {}),
        ("ULDLoss", dict(temperature=3.0)), ("SinkhornLoss", {}), ("SinkhornLoss", dict(iterations=3)))  # fmt: skip
MADE = [*((case.name, case.options) for case in CASES), ("SpearmanLoss", dict(top_k=4)),
        ("PlackettLuceLoss", dict(top_k=3)), ("KendallLoss", dict(top_k=4)), *MORE]  # fmt: skip
NO_MINIMIZER = ("SpearmanLoss", "KendallLoss", "PlackettLuceLoss", "CMKDLoss", "SinkhornLoss")
NEAR = dict(rtol=1e-9, atol=1e-10)


def on_backends(without=()):
    """Names, options and backends; Sinkhorn's transport is torch's on any device."""
    made = [(*one, backend) for one in MADE if one[0] not in without for backend in ("cpu", "reference")]
    some = [one for one in made if one[0] != "SinkhornLoss" or one[2] == "reference"]
    return pytest.mark.parametrize("name, options, backend", some, ids=str)


@st.composite
def logits(draw):
    """Rows on a grid, so that adding an integer is exact, and of different logits: which of equals counts is free."""
    n, v, scale = draw(st.integers(1, 5)), draw(st.integers(2, 12)), draw(st.sampled_from([0.25, 1.0, 8.0]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    s, t = (scale * torch.randn(2, n, v, generator=g, dtype=F64) * 256).round() / 256
    return tuple(x + torch.randperm(v, generator=g) / 2**14 for x in (s, t))


def run(name, options, backend, s, t, *labels, **call):
    s, loss = s.clone().requires_grad_(), getattr(kd, name)(**options)
    with kd.use_backend(backend):
        value = loss(s, t, *labels, **call)
        value.sum().backward()
    return value.detach(), s.grad


@on_backends()
@given(rows=logits(), data=st.data())
def test_properties(name, options, backend, rows, data):
    (s, t), draw = rows, data.draw
    n, v = s.shape
    value, slope = run(name, options, backend, s, t)
    assert value > -1e-12 and value.isfinite() and slope.isfinite().all()
    size = 1 + slope.abs().max()
    torch.testing.assert_close(slope.sum(-1) / size, torch.zeros(n, dtype=F64), rtol=0, atol=1e-9)
    by = draw(st.integers(-300, 300)), draw(st.integers(-300, 300))
    torch.testing.assert_close(run(name, options, backend, s + by[0], t + by[1]), (value, slope), **NEAR)
    if options.get("mode") != "shifts":  # which draws its pairs by their places
        order = torch.tensor(draw(st.permutations(range(v))))
        moved = run(name, options, backend, s[:, order], t[:, order])
        torch.testing.assert_close(moved, (value, slope[:, order]), **NEAR)
    junk = draw(st.sampled_from([torch.nan, torch.inf, -torch.inf, 0.0, 1e30]))
    at = torch.tensor(draw(st.permutations(range(n + 2)))[:n])
    wide = [torch.full((n + 2, v), junk, dtype=F64).index_copy(0, at, x) for x in (s, t)]
    labels = torch.full((n + 2,), -100).index_fill(0, at, 0)
    want = torch.zeros(n + 2, v, dtype=F64).index_copy(0, at, slope)
    torch.testing.assert_close(run(name, options, backend, *wide, labels), (value, want), **NEAR)


@on_backends(without=("DISTLoss", "SinkhornLoss"))
@given(rows=logits(), chunk=st.integers(1, 4))
def test_chunks_are_the_whole(name, options, backend, rows, chunk):
    (s, t), hidden = rows, rows[0].clone().requires_grad_()
    eye = torch.eye(s.shape[1], dtype=F64)
    with kd.use_backend(backend):
        value = kd.LinearLoss(getattr(kd, name)(**options), chunk)(hidden, eye, teacher_logits=t)
        value.backward()
    torch.testing.assert_close((value.detach(), hidden.grad), run(name, options, backend, s, t), **NEAR)


@on_backends(without=NO_MINIMIZER)
@given(rows=logits())
def test_zero_at_the_minimizer(name, options, backend, rows):
    t = rows[1]
    if name == "DISTLoss":  # of one row a class varies not, and counts 1
        t = torch.cat((t, t.flip(-1) * 0.7))
    value, slope = run(name, options, backend, getattr(kd, name)(**options).minimizer(t), t)
    torch.testing.assert_close(value, torch.zeros((), dtype=F64), rtol=0, atol=1e-7 if name == "DISTLoss" else 1e-11)
    if name != "ULDLoss":  # whose absolute values have a kink there
        torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NO_MINIMIZER)
def test_no_minimizer(name):
    with pytest.raises(NotImplementedError, match=name):
        getattr(kd, name)().minimizer(torch.zeros(2, 3))


@pytest.mark.parametrize("name, options, backend", [
    *((*one, "cpu") for one in MORE[:2]), *((*one, "reference") for one in MORE),
], ids=str)  # fmt: skip
def test_gradcheck(name, options, backend):
    g = torch.Generator().manual_seed(0)
    s, t = torch.randn(2, 4, 7, generator=g, dtype=F64).requires_grad_()
    loss, labels = getattr(kd, name)(ce_weight=0.5, **options), torch.tensor([0, -100, 3, 5])
    with only(backend):
        assert gradcheck(lambda *x: loss(*x, labels), (s, t))
