"""The rank losses' Triton kernels in the interpreter, against the textbook and, where rows are wide, the reference."""

import pytest
import torch
from accuracy import BF16, F16, F32, only
from test_rank_traps import LOSSES
from test_ranks import CORNERS, batch, distance, make, run
from textbook_ranks import CASES

import kdkernels as kd
from kdkernels.backends.triton import triton_compare
from kdkernels.rankops import SPEARMAN

REGIMES = {
    "odd": (dict(V=37), F32), "two": (dict(V=2), F32), "ties": (dict(V=50, kind="ties"), BF16),
    "holes": (dict(V=64, kind="holes"), F16), "offset": (dict(V=257, offset=300.0), F32),
    "heavy": (dict(V=101, kind="heavy"), F32),
}  # fmt: skip
WIDE = triton_compare.SORTED + 403
every_loss = pytest.mark.parametrize("loss", LOSSES[:-1], ids=lambda x: f"{type(x).__name__}")


@pytest.mark.parametrize("case", [c for c in CASES if c.name != "CMKDLoss"], ids=str)
def test_agrees_with_the_textbook(case):
    for name, (regime, dtype) in REGIMES.items():
        s, t = batch(2, dtype=dtype, **regime)
        value, gradient = case.rows(s, t)
        with only("triton"):
            found = run(make(case, reduction="none"), s, t)
        assert (found[0].double() - value).norm() <= 1e-6 * (1 + value.norm()), name
        assert distance(found[1], gradient, s) <= CORNERS[dtype], name


def wide(loss, s, t):
    with kd.use_backend("reference"):
        exact = run(loss, s.double(), t.double())
    with only("triton"):
        return run(loss, s, t), exact


@pytest.mark.parametrize("dtype, kind, tau, bound", [
    (BF16, "random", 0.1, 1e-6), (BF16, "holes", 0.01, 1e-6), (F16, "ties", 1.0, 1e-6), (F16, "heavy", 0.1, 1e-6),
    (F32, "random", 0.1, 1e-3), (F32, "holes", 0.03, 1e-3), (F32, "heavy", 1.0, 1e-3), (F32, "ties", 0.1, 1e-3),
    (F32, "random", 0.01, 1e-6), (BF16, "random", 1e6, 1e-6), (F32, "random", 1e5, 1e-3), (BF16, "ties", 1e-9, 1e-6),
], ids=str)  # fmt: skip
def test_wide_rows_of_spearman(dtype, kind, tau, bound):
    """By histograms, 16-bit rows exactly; small taus are sorted. The gradient before it is rounded."""
    s, t = batch(2, WIDE, dtype, kind=kind, seed=5)
    args = torch.tensor([[1.0, 1.0, tau, 0.0, 0.0]], dtype=torch.float64)
    found = triton_compare._run(torch.ones(1, dtype=torch.float64), s, t, None, None, args, SPEARMAN, WIDE, -100, 0)
    with kd.use_backend("reference"):
        exact = run(kd.SpearmanLoss(tau=tau, reduction="none"), s.double(), t.double())
    assert found.out.dtype == F32
    assert distance(found.value, exact[0]) <= bound and distance(found.out, exact[1]) <= bound


@pytest.mark.parametrize("size, sign, power, tau", [
    (0.32, 1, 1, 0.1), (0.32, -1, 3, 0.03), (0.1, 1, 1, 0.1), (0.1, -1, 3, 1.0), (0.03, 1, 3, 0.03), (0.03, -1, 1, 0.1),
], ids=str)  # fmt: skip
def test_wide_float32_rows_that_nearly_agree_or_disagree(size, sign, power, tau):
    """The gradient is small there, what cells add to it is not: such rows are sorted, and no others of the launch."""
    g = torch.Generator().manual_seed(0)
    t, noise = torch.randn(2, 2, WIDE, generator=g)
    s = sign * (t + torch.tensor([[size], [0.5]]) * noise) ** power
    found, exact = wide(kd.SpearmanLoss(tau=tau, reduction="none"), s, t**power)
    with kd.use_backend("triton"):
        value = kd.SpearmanLoss(tau=tau, reduction="none")(s, t**power)
    assert torch.equal(value, found[0])
    for row in range(2):
        bound = 1e-5 if torch.minimum(exact[0][row], 2 - exact[0][row]) * WIDE < 256 else 1e-3
        assert distance(found[0][row], exact[0][row]) <= bound and distance(found[1][row], exact[1][row]) <= bound, row


def test_wide_rows_of_two_dtypes_and_the_exact_option():
    s, t = batch(2, WIDE, F32, seed=7)
    found, exact = wide(kd.SpearmanLoss(), s, t.to(BF16))
    assert distance(found[1], exact[1]) <= 1e-3
    found, exact = wide(kd.SpearmanLoss(exact=True), s, t)
    assert distance(found[0], exact[0]) <= 1e-6 and distance(found[1], exact[1]) <= 1e-5


@pytest.mark.parametrize("name, options", [
    ("PearsonLoss", dict(space="probs")), ("PlackettLuceLoss", {}), ("PlackettLuceLoss", dict(top_k=300)),
    ("KendallLoss", dict(mode="shifts", shifts=3, seed=1)), ("SpearmanLoss", dict(top_k=300)),
    ("SpearmanLoss", dict(top_k=4200)),
], ids=str)  # fmt: skip
def test_wide_rows_of_the_others(name, options):
    s, t = batch(1, WIDE, F32, seed=5)
    found, exact = wide(getattr(kd, name)(**options), s, t)
    bound = 1e-3 if options.get("top_k") == 4200 else 1e-5
    assert distance(found[0], exact[0]) <= bound and distance(found[1], exact[1]) <= bound


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@every_loss
def test_traps(loss, dtype):
    """Constant and spoilt rows, what is left out, and the two zeros: all the answers of the reference."""
    s, t = batch(6, 60, dtype)
    s[0], t[1] = 0.3, -2.0
    s[2, 1:] = t[2, 1:] = -torch.inf
    s[3, 3], t[4, 5] = torch.nan, torch.inf
    s[5] = s[5].round()
    s[5, ::3] = torch.where(s[5, ::3] == 0, -0.0, s[5, ::3])
    mask, labels = torch.arange(60) % 7 != 2, torch.tensor([0, 1, 2, 3, 4, 5])
    for call in ({}, dict(vocab_mask=mask), dict(vocab_size=41), dict(labels=torch.where(labels == 4, -100, labels))):
        with kd.use_backend("reference"):
            value, gradient = run(loss, s, t, **call)
        with kd.use_backend("triton"):
            found = run(loss, s, t, **call)
        torch.testing.assert_close(found[0], value, rtol=1e-5, atol=1e-6, equal_nan=True)
        slack = dict(rtol=1e-4, atol=1e-6) if dtype == F32 else dict(rtol=0.01, atol=1e-5)
        torch.testing.assert_close(found[1], gradient, equal_nan=True, **slack)
        assert torch.equal(found[1] == 0, gradient == 0) or dtype == BF16


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_traps_of_wide_rows(dtype):
    s, t = batch(6, WIDE, dtype)
    s[0], t[1] = 0.3, -2.0
    s[2, 3], t[3, 5] = torch.nan, torch.inf
    s[4], t[4] = s[4].round(), t[4].round()
    s[4, 1000:3000], t[5, 2000:] = -torch.inf, -3.0
    flipped = torch.where((s == 0) & (torch.rand(s.shape) < 0.5), -0.0, s)
    loss = kd.SpearmanLoss(reduction="none")
    with kd.use_backend("reference"):
        value, gradient = run(loss, s.double(), t.double())
    with kd.use_backend("triton"):
        found, other = run(loss, s, t), run(loss, flipped, t)
    assert torch.equal(found[1].nan_to_num(9.0), other[1].nan_to_num(9.0))
    torch.testing.assert_close(found[0].double(), value, rtol=1e-3, atol=1e-4, equal_nan=True)
    assert found[0][2:4].isnan().all() and found[1][2:4].isnan().all()
    assert (found[0][:2] == 1).all() and (found[1][:2] == 0).all() and (found[1][4, 1000:3000] == 0).all()
    assert distance(found[1][4:], gradient[4:]) <= max(1e-3, CORNERS[dtype])


def test_ties_at_the_edge_of_top_k_go_to_the_first():
    t = torch.tensor([[1.0, 2.0, 2.0, -0.0, 0.0, 2.0]])
    for dtype in (F32, BF16, F16):
        with kd.use_backend("triton"):
            gradient = run(kd.PlackettLuceLoss(top_k=5), torch.randn(1, 6).to(dtype), t.to(dtype))[1]
            assert gradient[0, 4] == 0 and (gradient[0, [0, 1, 2, 3, 5]] != 0).all()
            gradient = run(kd.PlackettLuceLoss(top_k=2), torch.randn(1, 6).to(dtype), -t.to(dtype))[1]
            assert (gradient[0, 3:5] != 0).all() and (gradient[0, [0, 1, 2, 5]] == 0).all()


def test_repeats_to_the_bit_however_many_programs(monkeypatch):
    top = kd.PlackettLuceLoss(top_k=50)
    for dtype, V, loss in ((BF16, WIDE, kd.SpearmanLoss()), (F32, WIDE, kd.SpearmanLoss()), (F32, 99, top)):
        s, t = batch(2, V, dtype)
        results = []
        for scratch in (1 << 29, 1):
            monkeypatch.setattr(triton_compare, "SCRATCH", scratch)
            with kd.use_backend("triton"):
                results.append(run(loss, s, t))
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))


def test_calls():
    """Leading shapes, strides, labels, weights, temperatures of rows, the teacher's gradient, a forward alone."""
    s, t = (x.view(2, 3, 40).transpose(0, 1) for x in batch(6, 40, F32))
    labels, weight = torch.tensor([[0, -100], [1, 2], [3, -100]]), torch.tensor([[1.0, 2.0], [0.0, 3.0], [1.0, 1.0]])
    T = torch.tensor([[0.5, 1.0], [2.0, 3.0], [4.0, 5.0]])
    losses = [kd.SpearmanLoss(), kd.PlackettLuceLoss(), kd.PearsonLoss("probs"), kd.KendallLoss(top_k=9)]
    for loss in losses:
        for options in ({}, dict(reduction="none", t_squared=True)):
            for name, value in options.items():
                setattr(loss, name, value)
            call = dict(labels=labels, row_weight=weight, temperature=T)
            with kd.use_backend("reference"):
                want = run(loss, s, t, **call)
            with only("triton"):
                found = run(loss, s, t, **call)
                alone = loss(s, t, **call)
            torch.testing.assert_close(found[0], want[0], rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(alone, want[0], rtol=1e-5, atol=1e-7)
            assert distance(found[1], want[1]) <= 1e-5
    u = t.clone().requires_grad_()
    with only("triton"):
        kd.PearsonLoss("probs")(s, u).backward()
        torch.testing.assert_close(u.grad, run(kd.PearsonLoss("probs"), t, s)[1], rtol=1e-4, atol=1e-8)


def test_operators_pass_opcheck():
    s, t = batch(3, 40, F32)
    args, grad = torch.tensor([[1.0, 1.0, 0.1, 0.0, 0.0]], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    torch.library.opcheck(triton_compare.compare, (s, t, None, None, args, 1, 40, -100))
    torch.library.opcheck(triton_compare.compare_step, (grad, s, t, None, None, args, 1, 40, -100, 0))


def test_a_vocabulary_beyond_what_counts_hold_is_refused(monkeypatch):
    monkeypatch.setattr(triton_compare, "MOST", 30)
    with pytest.raises(ValueError, match="vocab_size must be <= 30"), kd.use_backend("triton"):
        kd.SpearmanLoss()(*batch(1, 40, F32))
