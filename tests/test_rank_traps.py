"""The traps of ranks: constant rows, NaN, classes left out, two zeros, giant ties, finite fills."""

import math

import pytest
import torch
from accuracy import BF16, F16, F32, F64
from test_ranks import CORNERS, batch, distance, gradients, on_both, run

import kdkernels as kd

LOSSES = [
    kd.SpearmanLoss(reduction="none"), kd.SpearmanLoss(top_k=50, reduction="none"), kd.PearsonLoss(reduction="none"),
    kd.PearsonLoss("probs", reduction="none"), kd.PlackettLuceLoss(reduction="none"),
    kd.KendallLoss(top_k=20, reduction="none"), kd.KendallLoss("shifts", seed=0, reduction="none"),
    kd.CMKDLoss(hard="both", reduction="none"),
]  # fmt: skip
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda x: f"{type(x).__name__}")
SIZES = pytest.mark.parametrize("V, dtype", [(60, F64), (60, BF16), (5000, F32), (5000, BF16), (5000, F16)], ids=str)


@on_both
@SIZES
@every_loss
def test_a_constant_row_has_loss_1_and_no_gradient(loss, V, dtype, backend):
    s, t = batch(4, V, dtype)
    s[0], t[1] = 0.3, -2.0
    s[2, 1:] = t[2, 1:] = -torch.inf
    s[3] = t[3] = -torch.inf
    with kd.use_backend(backend):
        value, gradient = run(loss, s, t)
    want = 2.0 if isinstance(loss, kd.CMKDLoss) else 1.0
    first = 2 if isinstance(loss, kd.PlackettLuceLoss) else 0  # an order can be likely under equal scores, and tied
    assert (value[first:] == want).all() and (gradient[first:] == 0).all()
    assert value.isfinite().all() and gradient.isfinite().all()


@on_both
@SIZES
@every_loss
def test_a_nan_spoils_its_row_and_no_other(loss, V, dtype, backend):
    s, t = batch(4, V, dtype)
    s[1, 3], s[3, V - 1] = torch.nan, torch.inf
    t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.itemsize])[2, 5] = -1  # a negative NaN
    with kd.use_backend(backend):
        value, gradient = run(loss, s, t)
        alone = run(loss, s[:1], t[:1])
    assert value[1:].isnan().all() and gradient[1:].isnan().all()
    assert torch.equal(value[:1], alone[0]) and torch.equal(gradient[:1], alone[1])


@on_both
@SIZES
@every_loss
def test_classes_left_out_are_as_if_they_were_not_there(loss, V, dtype, backend):
    """By -inf, by vocab_mask, by vocab_size, whatever they hold."""
    s, t = batch(3, V, dtype)
    out = torch.zeros(V, dtype=bool)
    out[V // 3 : V // 2] = out[-7:] = True
    junk = torch.full_like(s, torch.nan)
    with kd.use_backend(backend):
        value, gradient = run(loss, s[:, ~out], t[:, ~out])
        holes = run(loss, s.masked_fill(out, -torch.inf), t.masked_fill(out, -torch.inf))
        masked = run(loss, torch.where(out, junk, s), torch.where(out, junk, t), vocab_mask=~out)
        padded = run(loss, torch.cat((s[:, ~out], junk), -1), torch.cat((t[:, ~out], junk[:, :5]), -1),
                     vocab_size=int((~out).sum()))  # fmt: skip
    same = dict(rtol=0, atol=0) if backend == "cpu" else {}  # torch adds up in another order there
    for v, g in (holes, masked):
        torch.testing.assert_close(v, value, **same)
        torch.testing.assert_close(g[:, ~out], gradient, **same)
        assert (g[:, out] == 0).all()
    kept = gradient.shape[-1]
    torch.testing.assert_close(padded[0], value, **same)
    torch.testing.assert_close(padded[1][:, :kept], gradient, **same)
    assert (padded[1][:, kept:] == 0).all()


@on_both
@SIZES
@every_loss
def test_the_two_zeros_tie(loss, V, dtype, backend):
    s, t = (x.round() for x in batch(2, V, dtype))
    negative = torch.rand(V) < 0.5
    flip = lambda x: torch.where((x == 0) & negative, -0.0, x.masked_fill(x == 0, 0.0))  # noqa: E731
    assert flip(s).signbit().sum() > s.masked_fill(s == 0, 0.0).signbit().sum()
    with kd.use_backend(backend):
        want, found = run(loss, s + 0.0, t + 0.0), run(loss, flip(s), flip(t))
    assert all(torch.equal(a, b) for a, b in zip(want, found, strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_giant_ties_and_a_wide_vocabulary(dtype):
    """More ties than 16 bits count, and V^3 / 3 = 6e15."""
    s, t = batch(1, 262_144, dtype)
    s[:, :100_000], t[:, 50_000:200_000] = 1.5, -0.25
    found, exact = gradients(kd.SpearmanLoss(), s, t)
    assert distance(found[0], exact[0]) <= 1e-4
    if dtype != F16:  # where these numbers underflow
        assert distance(found[1], exact[1]) <= max(1e-3, CORNERS[dtype])


@pytest.mark.parametrize("fill", [-1e4, -3e38])
def test_a_finite_fill_is_finite(fill):
    s, t = batch(1, 8192, F32)
    s[:, 5], t[:, 5] = fill, fill
    for loss in (kd.SpearmanLoss(), kd.SpearmanLoss(top_k=64), kd.PlackettLuceLoss(), kd.KendallLoss()):
        value, gradient = run(loss, s, t)
        assert value.isfinite() and gradient.isfinite().all(), loss


def test_somewhere_a_gradient_is_not_zero():
    for loss in LOSSES:
        assert run(loss, *batch(2, 60))[1].abs().max() > 1e-6, loss
    assert math.isfinite(kd.CMKDLoss()(*batch(2, 60)).item())


@pytest.mark.parametrize("kind", ["ties", "zeros", "sorted", "one group", "masked"])
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_the_largest_of_a_row_wherever_they_stand(dtype, kind):
    """Which classes top_k takes, against a stable sort: they are those with a gradient."""
    V, g = 3000, torch.Generator().manual_seed(1)
    s, t = torch.randn(2, 3, V, generator=g).to(dtype)
    if kind in ("ties", "zeros"):
        t = (3 * t).round() if kind == "ties" else torch.where((t > 0) & (t < 2), 0.0, t)
    if kind == "zeros":
        t[:, ::2] = torch.where(t[:, ::2] == 0, -0.0, t[:, ::2])
    if kind == "sorted":
        t = t.sort(-1).values
    live = torch.ones(V, dtype=torch.bool)
    for k in (2, 10, 400, 2990):
        if kind == "one group":  # of which each has but one largest
            t[:, 5 :: 8 * k] += 100
        if kind == "masked":
            live[::3], k = False, min(k, 1990)
        first = t.double().masked_fill(~live, -math.inf).sort(dim=-1, descending=True, stable=True).indices[:, :k]
        own = torch.zeros_like(live.expand(3, V)).scatter(-1, first, True)
        want, slope = run(kd.SpearmanLoss(reduction="none"), s.double().masked_fill(~own, -math.inf), t.double())
        value, gradient = run(kd.SpearmanLoss(top_k=k, reduction="none", exact=True), s, t, vocab_mask=live)
        torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=1e-6)
        assert not gradient[~own].any() and (gradient - slope).norm() <= 0.01 * slope.norm()
