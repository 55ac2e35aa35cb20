"""The rank losses' CUDA kernels in the emulator, against the reference, which other tests hold to the textbook."""

import pytest
import torch
from accuracy import BF16, F16, F32, only
from emulated import machine
from test_ranks import batch, run
from textbook_ranks import CASES

import kdkernels as kd
from kdkernels.backends import cuda

SPEARMAN = next(case for case in CASES if case.name == "SpearmanLoss")
LARGE = 2.0**12  # away from where float16 underflows


def compare(s, t, tau=0.1, form=0, call=None, **settings):
    """Losses and gradients by the kernels and by the reference; the widest cluster."""
    loss, call = kd.SpearmanLoss(tau=tau, reduction="none", kd_weight=LARGE), call or {}
    with kd.use_backend("reference"):
        exact = run(loss, s.double(), t.double(), **call)
    before, cuda.form = cuda.form, form
    try:
        with machine(**settings) as widest, only("cuda"):
            found, cluster = run(loss, s, t, **call), widest()
    finally:
        cuda.form = before
    return found, exact, cluster


def check(found, exact, dtype, alike=0.995):
    """The value to float64, the gradient to one rounding: nearly all classes are the exact one rounded."""
    torch.testing.assert_close(found[0].double() / LARGE, exact[0] / LARGE, rtol=1e-6, atol=1e-7, equal_nan=True)
    rounded = exact[1].to(dtype)
    assert torch.equal(found[1].isnan(), rounded.isnan())
    found, rounded = found[1].nan_to_num(0.0), rounded.nan_to_num(0.0)
    off = (found.double() - rounded.double()).norm() / rounded.double().norm().clamp(min=1e-30)
    assert off <= torch.finfo(dtype).eps / 20
    assert alike == 0 or (torch.equal(found == 0, rounded == 0) and (found == rounded).float().mean() >= alike)


@pytest.mark.parametrize("seed", [0, 1, 2], ids=lambda x: f"order{x}")
@pytest.mark.parametrize("kind", ["random", "ties", "holes", "heavy"])
def test_a_clusters_window(kind, seed):
    s, t = batch(3, 4103, BF16, kind=kind, seed=5)
    found, exact, cluster = compare(s, t, seed=seed, processors=8)
    assert cluster == 4
    check(found, exact, BF16)


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F16, F16), (F16, BF16), (BF16, F16)], ids=str)
@pytest.mark.parametrize("kind", ["random", "ties", "holes"])
def test_all_bit_patterns(kind, dtypes):
    s, t = (x.to(dtype) for x, dtype in zip(batch(3, 4103, kind=kind, seed=5), dtypes, strict=True))
    found, exact, cluster = compare(s, t, tau=0.03, major=8)
    assert cluster == 1
    check(found, exact, dtypes[0])


def test_clusters_and_forms_agree_to_the_bit():
    s, t = batch(2, 5000, BF16)
    results = [compare(s, t, form=form, processors=n) for form, n in ((0, 2), (0, 64), (1, 2))]
    assert [cluster for *_, cluster in results] == [4, 8, 1]
    found = [x for x, *_ in results]
    assert all(torch.equal(x[1], found[0][1]) for x in found[:2])
    assert (found[2][1] == found[0][1]).float().mean() > 0.999
    torch.testing.assert_close(found[2][0], found[0][0], rtol=1e-6, atol=1e-3)


def test_rows_that_the_window_does_not_hold():
    """Of single numbers beyond it, and of many that differ and share its first or its last bin."""
    s, t = batch(8, 4100, BF16)
    s[1, 7], t[2, 9], s[3, 11] = 300.0, 1e-9, -1e-12
    t[4, 5] = torch.nan
    t[5, :1500], t[5, 1500:3000] = 1e-9, 2e-9
    s[6, :700], s[6, 700:1500] = 300.0, 400.0
    s[7, :800], s[7, 800:1500], t[7, ::3], t[7, 1::3] = -3e-9, 1e-9, -400.0, -300.0
    found, exact, cluster = compare(s, t)
    assert cluster == 4
    check(found, exact, BF16)


@pytest.mark.parametrize("form", [0, 1])
def test_giant_ties_and_a_wide_vocabulary(form):
    """More ties than sums of ranks in 32 bits hold, and V^3 / 3 = 6e15."""
    s, t = batch(1, 262_143, BF16)
    s[:, :100_000], t[:, 50_000:200_000] = 1.5, -0.25
    found, exact, cluster = compare(s, t, form=form)
    assert cluster == (1 if form else 8)
    check(found, exact, BF16)


@pytest.mark.parametrize("form", [0, 1])
def test_traps(form):
    V = 4099
    s, t = batch(8, V, BF16)
    s[0], t[1] = 0.3, -2.0
    s[2, 3], t[3, 5], s[4, V - 1] = torch.nan, torch.inf, torch.nan
    s[5], t[5] = s[5].round(), t[5].round()
    s[5] = torch.where((s[5] == 0) & (torch.arange(V) % 2 == 0), -0.0, s[5])
    s[6, 1:] = -torch.inf
    mask, labels = torch.arange(V) % 7 != 2, torch.tensor([0, 1, 3, 3, -100, 5, 6, 7])
    junk = torch.full((8, 9), torch.nan, dtype=BF16)
    check(*compare(s, t, form=form)[:2], BF16)
    check(*compare(s, t, form=form, call=dict(labels=labels, vocab_mask=mask))[:2], BF16)
    wide = [torch.cat((x, junk), -1) for x in (s, t)]
    check(*compare(*wide, form=form, call=dict(vocab_size=V))[:2], BF16)
    labels[7] = V  # on a GPU nobody has looked at it before
    args, grad = torch.tensor([[1.0, 1.0, 0.1, 0.0, 0.0]], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    value, gradient = cuda._COMPARE[1](grad, s, t, labels, None, args, 1, V, -100, 0)
    assert value[7].isnan() and (gradient[7] == 0).all() and value[5].isfinite()


@pytest.mark.parametrize("tau", [1e-9, 0.01, 1.0, 1e6])
def test_bandwidths(tau):
    s, t = batch(1, 4096, BF16)
    check(*compare(s, t, tau=tau)[:2], BF16, alike=0.995 * (tau > 1e-3))  # below it nearly all of the slopes are 0


def test_agrees_with_the_textbook():
    s, t = batch(1, 4096, BF16)
    value, gradient = SPEARMAN.rows(s, t)
    with only("cuda"):
        found = run(kd.SpearmanLoss(reduction="none"), s, t)
    assert (found[0].double() - value).abs().max() <= 1e-6
    assert (found[1].double() - gradient).norm() <= torch.finfo(BF16).eps * gradient.norm()


def test_calls():
    """Leading shapes, strides, weights, per-row temperatures, a forward alone, repeated to the bit."""
    s, t = (x.view(2, 2, 4096).transpose(0, 1) for x in batch(4, 4096, BF16))
    weight, T = torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([[0.5, 1.0], [2.0, 3.0]])
    loss, call = kd.SpearmanLoss(t_squared=True), dict(row_weight=weight, temperature=T)
    with kd.use_backend("reference"):
        want = run(loss, s, t, **call)
    with only("cuda"):
        found, again, alone = run(loss, s, t, **call), run(loss, s, t, **call), loss(s, t, **call)
    torch.testing.assert_close(found[0], want[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(alone, want[0], rtol=1e-6, atol=1e-7)
    assert torch.equal(found[1], again[1]) and torch.equal(found[0], again[0])
    assert (found[1].double() - want[1].double()).norm() <= 1e-3 * want[1].double().norm()
    with only("cuda"):
        none = run(loss, s[:0], t[:0])
    assert none[0] == 0


def test_all_other_rank_losses_are_tritons():
    assert cuda.COMPARE(*(torch.empty(1, dtype=BF16),) * 2, kd.SpearmanLoss.kind, 4096, 0)
    s, t = batch(2, 60, F32)
    for loss in (kd.SpearmanLoss(), kd.PearsonLoss(), kd.KendallLoss()):
        with pytest.raises(kd.BackendUnavailable, match="no kernels for rank losses"), kd.use_backend("cuda"):
            loss(s, t)


def test_operators_pass_opcheck():
    s, t = batch(2, 4096, BF16)
    args, grad = torch.tensor([[1.0, 1.0, 0.1, 0.0, 0.0]], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    with only("cuda"):
        kd.SpearmanLoss()(s, t)
    ops = torch.ops.kdkernels
    torch.library.opcheck(ops.cuda_compare.default, (s, t, None, None, args, 1, 4096, -100, 0))
    torch.library.opcheck(ops.cuda_compare_step.default, (grad, s, t, None, None, args, 1, 4096, -100, 0, 0))
