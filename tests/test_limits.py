"""Limits, identities, impossible classes, damaged rows, and the teacher's gradient."""

import math

import numpy as np
import pytest
import torch
from accuracy import BACKENDS, F32, F64, ON_BACKENDS, Batch, batch, faults, make, only, run, textbook
from textbook import Case, alpha_beta, forward_kl, kl, logp, renyi, reverse_kl

import kdkernels as kd

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
everywhere = pytest.mark.parametrize("backend, case", ON_BACKENDS, ids=str)


def dtype_of(backend):
    return F64 if backend in ("reference", "cpu") else F32


def close(a, b, factor=1e3):
    """Equal up to rounding of the arithmetic they ran in (a is the library's, b the textbook's)."""
    eps = torch.finfo(a.dtype).eps
    torch.testing.assert_close(a.double(), b.double(), rtol=factor * eps, atol=factor * eps, equal_nan=True)


def rows_for(backend, N=4, V=11, **kw) -> Batch:
    return batch(N, V, **kw).to(dtype_of(backend))


SPECIAL = [
    ((1.0, 0.0), lambda lp, lq: kl(lp, lq)),
    ((0.0, 1.0), lambda lp, lq: kl(lq, lp)),
    ((1.0, 1.0), lambda lp, lq: ((lp.exp() - lq.exp()) ** 2).sum(-1) / 2),
    ((0.5, 0.5), lambda lp, lq: 2 * (((lp / 2).exp() - (lq / 2).exp()) ** 2).sum(-1)),
    ((0.0, 0.0), lambda lp, lq: ((lp - lq) ** 2).sum(-1) / 2),
]


@on_every_backend
@pytest.mark.parametrize("point, formula", SPECIAL, ids=lambda x: str(x) if isinstance(x, tuple) else "")
def test_alpha_beta_at_its_special_points(point, formula, backend):
    rows = rows_for(backend)
    got = run(Case("AlphaBetaLoss", alpha_beta, dict(alpha=point[0], beta=point[1])), backend, rows)
    s = rows.s.double().requires_grad_()
    want = formula(logp(rows.t.double()), logp(s))
    close(got.value, want.detach())
    close(got.ds, torch.autograd.grad(want.sum(), s)[0])


LIMITS = [(0.0, 0.8), (0.6, 0.0), (0.5, -0.5), (-0.7, 0.7), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0)]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("limit", LIMITS, ids=str)
def test_alpha_beta_is_continuous(limit, backend):
    """From both sides of each limit, at every distance: never further off than the distance times the slope."""
    rows = rows_for(backend, V=7)
    case = lambda a, b: Case("AlphaBetaLoss", alpha_beta, dict(alpha=a, beta=b))  # noqa: E731
    at = run(case(*limit), backend, rows)
    for step in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-8, 1e-10, 1e-13):
        for sign in (1, -1):
            for da, db in ((1, 0), (0, 1), (1, 1), (1, -1)):
                near = run(case(limit[0] + sign * step * da, limit[1] + sign * step * db), backend, rows)
                for a, b in zip(near[:2], at[:2], strict=True):
                    distance = (a - b).norm() / b.norm()
                    # the loss is smooth in (alpha, beta), its logarithm's slope is of the order of max |log p|;
                    # below 1e-3 a cancellation of 1e-16 / step^2 must not show either
                    assert distance <= 40 * step + 1e-9, (limit, sign * step, (da, db), distance.item())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("step", [1e-2, 1e-3, 1e-4, 1e-6, 1e-9])
def test_renyi_is_continuous_at_one(step, backend):
    rows = rows_for(backend)
    at = run(Case("RenyiLoss", renyi, dict(alpha=1.0)), backend, rows)
    for sign in (1, -1):
        near = run(Case("RenyiLoss", renyi, dict(alpha=1.0 + sign * step)), backend, rows)
        assert (near.value - at.value).norm() <= (40 * step + 1e-5) * at.value.norm()
        assert (near.ds - at.ds).norm() <= (40 * step + 1e-5) * at.ds.norm()


@on_every_backend
def test_members_of_families_agree(backend):
    """Each pair is one divergence under two names."""
    rows = rows_for(backend)
    forward, reverse = (run(Case(n, f), backend, rows) for n, f in
                        [("ForwardKLLoss", forward_kl), ("ReverseKLLoss", reverse_kl)])  # fmt: skip
    for name, options, other in [
        ("RenyiLoss", dict(alpha=1.0), forward),
        ("AlphaBetaLoss", dict(alpha=1.0, beta=0.0), forward),
        ("AlphaBetaLoss", dict(alpha=0.0, beta=1.0), reverse),
        ("TTMLoss", dict(gamma=1.0), forward),
        ("WTTMLoss", dict(gamma=1.0), forward),
        ("TAIDLoss", dict(tau=1.0), forward),
        ("KDLoss", dict(alpha=1.0, temperature=1.0), forward),
    ]:
        got = run(Case(name, forward_kl, options), backend, rows)
        close(got.value, other.value)
        close(got.ds, other.ds)
    bhattacharyya = run(Case("RenyiLoss", renyi, dict(alpha=0.5)), backend, rows).value
    hellinger = run(Case("HellingerLoss", forward_kl), backend, rows).value
    close(1 - (-bhattacharyya / 2).exp(), hellinger)


@on_every_backend
@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.8])
def test_renyi_identity_of_ttm(gamma, backend):
    """KL(p^ || q) = T KL(p^ || q^) - (T - 1) H_gamma(q) + (T - 1) H(p^), T = 1 / gamma. [Zheng & Yang 2024, thm 3.1]"""
    rows, T = rows_for(backend), 1 / gamma
    ttm = run(Case("TTMLoss", forward_kl, dict(gamma=gamma)), backend, rows).value
    tempered = run(Case("ForwardKLLoss", forward_kl, dict(temperature=T)), backend, rows).value
    with only(backend):
        powers = kd.power_sum(rows.s, gamma)
    lp_hat = logp(gamma * rows.t.double())
    entropy = -(lp_hat.exp() * lp_hat).sum(-1)
    renyi_entropy = powers.double().log() / (1 - gamma)
    close(ttm, T * tempered.double() - (T - 1) * renyi_entropy + (T - 1) * entropy)


@on_every_backend
def test_forward_kl_of_a_class_impossible_for_the_student_only(backend):
    rows = rows_for(backend)
    s = rows.s.clone()
    s[1, 3] = s[2, 0] = -torch.inf
    got = run(Case("ForwardKLLoss", forward_kl), backend, Batch(s, rows.t, rows.y))
    assert got.value.isinf().tolist() == [False, True, True, False]
    close(got.ds, s.double().softmax(-1) - rows.t.double().softmax(-1))


@everywhere
@pytest.mark.parametrize("side", ["student", "teacher", "both", "mixed"])
def test_impossible_classes_agree_with_the_textbook(case, side, backend):
    """-inf logits, never at the label: values (which may be infinite), and gradients wherever they are defined."""
    if case.setting("standardize", False) and side != "both":
        return  # a mean over -inf is no number
    rows = rows_for(backend, N=3, V=9, scale=2.0, seed=5)
    s, t = rows.s.clone(), rows.t.clone()
    for row in range(3):
        first, second = ((rows.y[row] + k + row) % 9 for k in (1, 4))
        if side in ("student", "both", "mixed"):
            s[row, first] = -torch.inf
        if side in ("teacher", "both"):
            t[row, first] = -torch.inf
        if side == "mixed":
            t[row, second] = -torch.inf
    hurt = Batch(s, t, rows.y)
    got, want = run(case, backend, hurt, teacher_grad=case.needs_teacher), textbook(case, hurt)
    close(got.value, want.value)
    for a, b in zip(got[1:], want[1:], strict=True):
        if a is not None:
            defined = want.value.isfinite()[:, None] & b.isfinite()
            close(a[defined], b[defined])



@everywhere
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_the_other_rows_heaviest_class_is_impossible(case, side, backend):
    """As good as ever less likely: the same value and gradient, and inf where the value grows without bound."""
    if case.setting("standardize", False) or not case.needs_teacher:
        return
    rows = rows_for(backend, N=40, V=9, scale=2.0, seed=7)
    s, t = rows.s.clone(), rows.t.clone()
    hurt, other = (s, t) if side == "student" else (t, s)
    heaviest = other.argmax(-1, keepdim=True)
    hurt.scatter_(1, heaviest, -torch.inf)
    got = run(case, backend, Batch(s, t, rows.y))
    want, less = (textbook(case, Batch(s, t, rows.y))
                  for x in (-500.0, -600.0) if hurt.scatter_(1, heaviest, x) is hurt)  # fmt: skip
    finite = (want.value - less.value).abs() < 1e-6
    assert got.value[~finite].isposinf().all()
    close(got.value[finite], want.value[finite])
    bounded = (want.ds - less.ds).norm(dim=-1) < 1e-6
    if any(min(p.student, p.teacher) < 0 for p in make(case).all_points()):
        bounded &= finite  # of an infinite power the gradient is left undefined
    if case.setting("groups", None) == "label" and side == "student":
        bounded &= heaviest[:, 0] != rows.y  # and that of a group without mass
    close(got.ds[bounded], want.ds[bounded])


@everywhere
@pytest.mark.parametrize("mask", [-1e9, -1e16, -1e30, torch.finfo(F32).min])
def test_finite_masks_are_like_impossible_classes(case, mask, backend):
    """Whole tiles and segments of them."""
    if case.setting("standardize", False) or case.name == "LogitMSELoss" or _looks_at_every_class(case):
        return
    V, live = (40000, 100) if backend in ("reference", "cpu") else (300, 20)
    for dtype in {F32, dtype_of(backend)}:
        rows = batch(2, V, scale=2.0).to(dtype)
        s, t, y = rows.s, rows.t, rows.y % live
        s[:, live:], t[:, live:] = mask, mask
        got = run(case, backend, Batch(s, t, y))
        s[:, live:], t[:, live:] = -torch.inf, -torch.inf
        want = run(case, backend, Batch(s, t, y))
        close(got.value, want.value)
        close(got.ds, want.ds)


@everywhere
@pytest.mark.parametrize("mask", [-1e17, -1e25, torch.finfo(F32).min])
def test_finite_masks_of_one_side(case, mask, backend):
    """Where the other side's largest logits are among its classes: far away, and no NaN."""
    if case.setting("standardize", False) or case.name == "LogitMSELoss" or _looks_at_every_class(case):
        return
    wide = backend in ("reference", "cpu")
    V, live = (6000, 2000) if wide else (300, 200)
    for side, dtype in ((0, F32), (1, F64 if wide else F32)):
        rows = batch(2, V, scale=2.0).to(dtype)
        y, logits = rows.y % live, [rows.s.clone(), rows.t.clone()]
        logits[1 - side][:, live + 50] = 20.0
        logits[side][:, live:] = mask
        got = run(case, backend, Batch(*logits, y))
        want = run(case, "reference", Batch(*(z.double() for z in logits), y))
        small = (want.value.abs() < 1e6)[:, None]  # else the loss is as far away as the mask
        for a, b in ((got.value[:, None], want.value[:, None]), (got.ds, want.ds)):
            size = b.abs().amax(-1, keepdim=True).clamp(min=0.01)  # of terms of about 1
            bar = torch.where(small, 1e-4 * size, torch.inf)
            assert not a.isnan().any() and (~small | ((a.double() - b).abs() <= bar)).all(), dtype


def _looks_at_every_class(case):
    """A point that weighs all classes alike, masked or not, or negative powers of them."""
    return any(max(p.student, p.teacher) <= 0 or min(p.student, p.teacher) < 0 for p in make(case).all_points())


def exactly(s, t, a, b):
    """The definition, with the digits of numpy's longest float."""
    s, t = s.double().numpy().astype(np.longdouble), t.double().numpy().astype(np.longdouble)
    q, p = (np.exp(x - x.max(-1, keepdims=True)) for x in (s, t))
    q, p = q / q.sum(-1, keepdims=True), p / p.sum(-1, keepdims=True)
    a, b = np.longdouble(a), np.longdouble(b)
    terms = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
    return torch.from_numpy((-terms.sum(-1) / (a * b)).astype(np.float64))


NEAR = [(2.1e-3, 2.1e-3), (9e-3, 9e-3), (1.1e-2, 1.1e-2), (-5e-4, 4e-4), (5e-6, 5e-6), (0.5, -0.49991), (1e-9, 0.8),
        (0.8, 1e-5), (0.8, 5e-3), (-9e-3, 0.7)]  # fmt: skip


@on_every_backend
@pytest.mark.parametrize("scale", [1.0, 20.0])
@pytest.mark.parametrize("a, b", NEAR)
def test_alpha_beta_near_its_limits(a, b, scale, backend):
    """No further from the definition than a few times the textbook, where that still has digits."""
    for dtype in {F32, dtype_of(backend)}:
        V = 300 if backend in ("reference", "cpu") else 60
        s, t = (x.to(dtype) * scale for x in torch.randn(2, 40, V, generator=torch.Generator().manual_seed(3)))
        want = exactly(s, t, a, b)
        with kd.use_backend(backend):
            got = kd.AlphaBetaLoss(a, b, reduction="none")(s, t).double()
        own = (alpha_beta(s, t, None, a, b).double() - want).norm() / want.norm()
        error = (got - want).norm() / want.norm()
        # Of `exactly` at 5e-6; and of float32 sums where the quotient of a difference of 1e-2 begins (`_smooth`).
        floor = 1e-9 if dtype == F64 else 8 * 2.0**-24 / 1e-2
        assert error <= floor + 4 * own, (dtype, error.item(), own.item())


@everywhere
def test_damaged_rows_are_nan_alone(case, backend):
    rows = rows_for(backend, N=5)
    s, t = rows.s.clone(), rows.t.clone()
    s[0], t[0] = -torch.inf, -torch.inf
    s[1, 2], s[3, 4] = torch.nan, torch.inf
    got = run(case, backend, Batch(s, t, rows.y))
    assert got.value.isnan().tolist() == [True, True, False, True, False]
    assert got.ds.isnan().any(-1).tolist() == [True, True, False, True, False]
    clean = run(case, backend, rows)
    close(got.value[[2, 4]], clean.value[[2, 4]])
    close(got.ds[[2, 4]], clean.ds[[2, 4]])
    if case.needs_teacher:
        t = rows.t.clone()
        t[2, 1], t[4, 0] = torch.nan, torch.inf
        got = run(case, backend, Batch(rows.s, t, rows.y))
        assert got.value.isnan().tolist() == [False, False, True, False, True]
        assert got.ds.isnan().any(-1).tolist() == [False, False, True, False, True]


@everywhere
def test_one_class(case, backend):
    if case.setting("standardize", False):
        return
    rows = rows_for(backend, N=3, V=1, scale=5.0)
    got, want = run(case, backend, rows), textbook(case, rows)
    close(got.value, want.value)
    close(got.ds, want.ds)
    if not case.setting("z_loss", 0.0) and case.name != "LogitMSELoss":
        close(got.value, torch.zeros(3))
        close(got.ds, torch.zeros(3, 1))


@everywhere
def test_no_class_raises(case, backend):
    with kd.use_backend(backend), pytest.raises(ValueError, match=r"\(2, 0\)|class"):
        make(case)(torch.zeros(2, 0), torch.zeros(2, 0) if case.needs_teacher else None, torch.zeros(2, dtype=int))


@everywhere
def test_teacher_gradient(case, backend):
    if not case.needs_teacher:
        return
    small = backend == "triton"
    rows = batch(3 if small else 1024, 23, scale=2.0).to(dtype_of(backend))
    found = faults(case, rows, run(case, backend, rows, teacher_grad=True))
    assert not found, found


@on_every_backend
def test_wttm_weight_is_detached_only_on_request(backend):
    rows = rows_for(backend)
    kinds = [Case("WTTMLoss", forward_kl, dict(gamma=0.5, detach_weight=d)) for d in (False, True)]
    grads = [run(case, backend, rows, teacher_grad=True).dt for case in kinds]
    assert (grads[0] - grads[1]).norm() > 0.01 * grads[1].norm()
    assert math.isclose(grads[0].sum(-1).abs().max().item(), 0, abs_tol=1e-4)


@on_every_backend
def test_a_row_of_weight_0_passes_nothing_on(backend):
    rows = batch(4, 9).to(F32)
    s, t, weight = rows.s.clone(), rows.t.clone(), torch.tensor([1.0, 0.0, 2.0, 1.0])
    s[1], t[1, 3] = float("nan"), float("nan")
    leaf, kept = s.requires_grad_(), rows.s[[0, 2, 3]].requires_grad_()
    with only(backend):
        value = kd.KDLoss()(leaf, t, rows.y, row_weight=weight)
        value.backward()
        expected = kd.KDLoss()(kept, t[[0, 2, 3]], rows.y[[0, 2, 3]], row_weight=weight[[0, 2, 3]], num_items=4)
        expected.backward()
    assert torch.equal(value, expected) and not leaf.grad[1].any()
    assert torch.equal(leaf.grad[[0, 2, 3]], kept.grad)


def test_no_gradient_is_made_that_nobody_wants():
    s, t = batch(4, 9).to(F32)[:2]
    before = kd.backends.calls.copy()
    with torch.no_grad(), kd.use_backend("cpu"):
        assert not kd.ForwardKLLoss()(s.requires_grad_(), t).requires_grad
    assert {name for _, name in kd.backends.calls - before} == {"reduce", "rows"}
