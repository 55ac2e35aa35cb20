"""AlphaBetaLoss with alpha and beta of each row: every row is the loss made with its own numbers, limits included."""

import math

import pytest
import textbook
import torch
from accuracy import BACKENDS, F32, F64, batch, only

import kdkernels as kd

ORDERS = [(0.2, 0.7), (1.3, -0.4), (0.0, 0.8), (0.6, 0.0), (0.5, -0.5), (0.0, 0.0), (1.0, 1.0), (1.0, 0.0), (0.0, 1.0),
          (1e-9, 0.5), (0.5, 1e-7), (0.3, 1e-6 - 0.3), (1e-4, -2e-4), (1e-3, 0.04)]  # fmt: skip
EXACT = 9  # of them are limits or far from any: the textbook has digits there
A, B = torch.tensor(ORDERS, dtype=F64).T


def rows(dtype=F64, v=17):
    return batch(len(ORDERS), v, 2.0, seed=5, s_dtype=dtype)


def run(loss, x, backend, **call):
    s, t = (y.clone().requires_grad_() for y in x[:2])
    with only(backend):
        value = loss(s, t, **call)
        value.sum().backward()
    return value.detach(), s.grad, t.grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_row_is_its_own_loss(backend):
    dtype = F64 if backend in ("cpu", "reference") else F32
    bar = dict(rtol=1e-12, atol=1e-12) if dtype == F64 else dict(rtol=1e-4, atol=1e-5)
    got = run(kd.AlphaBetaLoss(A, B, reduction="none"), rows(dtype), backend)
    first = EXACT if backend == "triton" else 0  # its interpreter is slow, and the textbook has the others
    own = [run(kd.AlphaBetaLoss(*ORDERS[n]), [x[n] for x in rows(dtype)], backend) for n in range(first, len(ORDERS))]
    for actual, *parts in zip(got, *own, strict=True):
        torch.testing.assert_close(actual[first:], torch.stack(parts), **bar)
    s, t = (x.double().clone().requires_grad_() for x in rows(dtype)[:2])
    exact = torch.cat([textbook.alpha_beta(s[n : n + 1], t[n : n + 1], None, *ORDERS[n]) for n in range(EXACT)])
    exact.sum().backward()
    for actual, truth in zip(got, (exact.detach(), s.grad, t.grad), strict=True):
        torch.testing.assert_close(actual[:EXACT].double(), truth[:EXACT], **bar)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_options_of_a_call(backend):
    x = rows()
    temperature = torch.linspace(0.5, 3, len(ORDERS), dtype=F64)
    for options in (dict(), dict(standardize=True), dict(teacher_temperature=2.0)):
        got = run(kd.AlphaBetaLoss(A, 0.3, reduction="none", **options), x, backend, temperature=temperature)
        for n, a in enumerate(A.tolist()):
            loss = kd.AlphaBetaLoss(a, 0.3, **options)
            one = run(loss, [y[n] for y in x], backend, temperature=temperature[n].item())
            torch.testing.assert_close([y[n] for y in got], list(one), rtol=1e-11, atol=1e-11)
    mixed = kd.AlphaBetaLoss(A, B, temperature=2.0, reduction="none") + 0.5 * kd.ReverseKLLoss(reduction="none")
    parts = [weight * run(loss, x, backend)[1] for weight, loss in zip(mixed.weights, mixed.terms, strict=True)]
    torch.testing.assert_close(run(mixed, x, backend)[1], sum(parts), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_impossible_classes_stay_within_their_rows(backend):
    x = rows()
    s, t = (y.clone() for y in x[:2])
    s[:, 3] = t[:, 3] = -torch.inf  # dead
    s[:, 5] = -torch.inf  # the student rules a class out
    got = run(kd.AlphaBetaLoss(A, B, reduction="none"), (s, t), backend)
    for n, (a, b) in enumerate(ORDERS):
        one = run(kd.AlphaBetaLoss(a, b), (s[n], t[n]), backend)
        assert math.isinf(one[0]) == (b <= 0)  # q^b, or log q, at q = 0
        torch.testing.assert_close(got[0][n], one[0], rtol=1e-11, atol=1e-11)
        if one[0].isfinite():
            torch.testing.assert_close([y[n] for y in got[1:]], list(one[1:]), rtol=1e-11, atol=1e-11)


def test_a_chunk_of_rows_has_its_own():
    x, eye = rows(), torch.eye(17, dtype=F64)
    loss = kd.AlphaBetaLoss(A, B, reduction="none")
    torch.testing.assert_close(kd.LinearLoss(loss, chunk=4)(x.s, eye, x.t, eye), loss(x.s, x.t))
    cube = [y.view(2, len(ORDERS) // 2, -1) for y in x[:2]]
    alike = kd.AlphaBetaLoss(A.view(2, -1), B.view(2, -1).float().double(), reduction="none")
    torch.testing.assert_close(alike(*cube).reshape(-1), loss(x.s, x.t), rtol=1e-6, atol=1e-6)


def test_what_is_no_coefficient():
    x = rows()
    for value, kind, message in (
        (A.clone().requires_grad_(), ValueError, "alpha requires grad, but no gradient flows to it"),
        (A.bool(), TypeError, "alpha must be real numbers"),
        (A / 0, ValueError, "alpha must be finite"),
        ("0.2", TypeError, "alpha must be a number"),
    ):
        with pytest.raises(kind, match=message):
            kd.AlphaBetaLoss(value, B)
    with pytest.raises(ValueError, match="14 rows of point coefficients"):
        kd.AlphaBetaLoss(A, B)(x.s[:3], x.t[:3])
