"""Rank and correlation losses against their definitions, at their limits, and in the traps of ranks."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from accuracy import BF16, F16, F32, F64, only
from scipy.stats import somersd
from textbook_ranks import CASES, dist

import kdkernels as kd
from kdkernels import metrics

every_case = pytest.mark.parametrize("case", CASES, ids=str)
on_both = pytest.mark.parametrize("backend", ["cpu", "reference"])
in_every_dtype = pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
CORNERS = {  # what the definition gives in float64, rounded once, is off by this much of its norm
    F64: 1e-11, F32: 1e-5, BF16: torch.finfo(BF16).eps, F16: torch.finfo(F16).eps,
}  # fmt: skip


def make(case, **options):
    return getattr(kd, case.name)(**case.options, **options)


def batch(N, V, dtype=F64, scale=3.0, offset=0.0, kind="random", seed=0):
    g = torch.Generator().manual_seed(seed)
    t, noise = scale * torch.randn(2, N, V, generator=g, dtype=F64)
    s = 0.7 * t + 0.5 * noise
    if kind == "ties":
        s, t = (2 * s / scale).round() * scale, (t / scale).round() * scale
    elif kind == "heavy":
        s, t = s**3, t**3
    elif kind == "holes":
        s[:, : V // 8] = t[:, V // 2 : V // 2 + 2] = -torch.inf
    return (s + offset).to(dtype), (t + offset).to(dtype)


def run(loss, s, t, **call):
    s = s.detach().clone().requires_grad_()
    value = loss(s, t, **call)
    value.sum().backward()
    return value.detach(), s.grad


def distance(found, exact, s=None) -> float:
    """||found - exact|| / ||exact||; with s beside the size 1 / ||s - mean|| that a scale-free loss can reach."""
    found, exact = found.double(), exact.double()
    own = 0.0
    if s is not None:
        live = s.double().masked_fill(~s.isfinite(), 0.0)
        own = (1 / (live - live.mean(-1, keepdim=True)).norm(dim=-1).clamp(min=1e-3)).norm()
    return ((found - exact).norm() / (exact.norm() + own)).item()


REGIMES = {
    "V=2": dict(V=2), "V=3": dict(V=3), "V=37": dict(V=37), "V=257": dict(V=257), "small": dict(V=37, scale=0.01),
    "large": dict(V=37, scale=50.0), "offset": dict(V=37, offset=300.0), "ties": dict(V=37, kind="ties"),
    "holes": dict(V=37, kind="holes"), "heavy": dict(V=257, kind="heavy"),
}  # fmt: skip


@on_both
@in_every_dtype
@every_case
def test_agrees_with_the_textbook(case, dtype, backend):
    for name, regime in REGIMES.items():
        s, t = batch(4, dtype=dtype, **regime)
        value, gradient = case.rows(s, t)
        with only(backend):
            found = run(make(case, reduction="none"), s, t)
        off = (found[0].double() - value).norm() / (1 + value.norm())
        assert off <= (1e-11 if dtype == F64 else 1e-6), name
        assert distance(found[1], gradient, s) <= CORNERS[dtype], name


# --- wide rows: the definition is the reference backend, which the test above holds to the textbook


def gradients(loss, s, t):
    with kd.use_backend("reference"):
        exact = run(loss, s.double(), t.double())
    with only("cpu"):
        return run(loss, s, t), exact


@pytest.mark.parametrize("kind", ["random", "ties", "heavy", "holes"])
@pytest.mark.parametrize("tau", [0.01, 0.1, 1.0])
def test_spearman_of_bfloat16_numbers_is_exact(tau, kind):
    s, t = batch(2, 32768, BF16, kind=kind, seed=5)
    loss = kd.SpearmanLoss(tau=tau)
    (value, gradient), exact = gradients(loss, s.float(), t.float())  # float32: the gradient before its rounding
    assert distance(value, exact[0]) <= 1e-6 and distance(gradient, exact[1]) <= 1e-6
    with only("cpu"):
        assert torch.equal(run(loss, s, t)[1], gradient.to(BF16))


@pytest.mark.parametrize("dtype, bound", [(F32, 1e-3), (BF16, CORNERS[BF16]), (F16, CORNERS[F16])], ids=str)
@pytest.mark.parametrize("V", [4095, 4096, 4097, 32000, 50257, 128256])
def test_spearman_of_every_vocabulary(V, dtype, bound):
    """The second row starts where the first ends: odd sizes are aligned to nothing."""
    s, t = batch(2, V, dtype, seed=9)
    found, exact = gradients(kd.SpearmanLoss(reduction="sum", kd_weight=2.0**12), s, t)
    assert distance(found[0], exact[0]) <= (bound if dtype == F32 else 1e-6)
    assert distance(found[1], exact[1]) <= bound


@pytest.mark.parametrize("kind", ["random", "ties", "heavy", "holes"])
def test_spearman_of_float16_numbers_is_exact(kind):
    s, t = batch(2, 32768, F16, kind=kind, seed=5)
    loss = kd.SpearmanLoss(reduction="sum", kd_weight=2.0**12)  # away from where float16 underflows
    (value, gradient), exact = gradients(loss, s, t)
    assert distance(value, exact[0]) <= 1e-6
    error = (gradient.double() - exact[1]).abs()
    one_rounding = torch.finfo(F16).eps / 2 * exact[1].abs() + torch.finfo(F16).smallest_normal * torch.finfo(F16).eps
    assert (error <= one_rounding * 1.001).all()


@pytest.mark.parametrize("kind", ["random", "ties", "heavy", "holes"])
@pytest.mark.parametrize("tau", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("V", [5000, 131072])
def test_spearman_of_float32_rows(V, tau, kind):
    s, t = batch(1, V, F32, kind=kind, seed=7)
    for exact_option, bound in ((False, 1e-3), (True, 1e-5)):
        found, exact = gradients(kd.SpearmanLoss(tau=tau, exact=exact_option), s, t)
        assert distance(found[0], exact[0]) <= bound and distance(found[1], exact[1]) <= bound


@pytest.mark.parametrize("power", [1, 3])
@pytest.mark.parametrize("tau", [0.03, 0.1, 1.0])
def test_spearman_of_float32_rows_that_nearly_agree_or_disagree(tau, power):
    """The gradient is small there, what bins add to it is not."""
    g = torch.Generator().manual_seed(0)
    t, noise = torch.randn(2, 1, 8000, generator=g)
    for size in (0.3, 0.1, 0.03):
        for sign in (1, -1):
            found, exact = gradients(kd.SpearmanLoss(tau=tau), sign * (t + size * noise) ** power, t**power)
            assert distance(found[1], exact[1]) <= 1e-3, (size, sign)


def test_float32_student_with_a_teacher_of_ties():
    """A teacher of bfloat16 or float16 numbers in float32: many tied classes in one bin."""
    s, t = batch(2, 32768, F32, seed=8)
    for narrow in (BF16, F16):
        found, exact = gradients(kd.SpearmanLoss(), s, t.to(narrow).float())
        assert distance(found[1], exact[1]) <= 1e-3
        found, exact = gradients(kd.SpearmanLoss(), s, t.to(narrow))
        assert distance(found[1], exact[1]) <= 1e-3


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@every_case
def test_wide_rows_agree_with_the_definition(case, dtype):
    s, t = batch(2, 8192, dtype, seed=5)
    found, exact = gradients(make(case, reduction="sum"), s, t)
    binned = case.name in ("SpearmanLoss", "CMKDLoss") and dtype == F32 and not case.options.get("exact")
    assert distance(found[0], exact[0]) <= (1e-3 if binned else 1e-10 if dtype == F64 else 1e-5)
    assert distance(found[1], exact[1]) <= (1e-3 if binned else max(CORNERS[dtype], 1e-10))


@pytest.mark.parametrize("V", [257, 6000])
@pytest.mark.parametrize("noise", [0.5, 0.015], ids=["", "rho=0.9999"])
@every_case
def test_bfloat16_numbers_err_by_1e_6_before_the_gradient_is_rounded(case, noise, V):
    """In float32 the same numbers: the kernels know them by their bits."""
    t = batch(2, V, seed=6)[1]
    s, t = (x.to(BF16).float() for x in (t + noise * batch(2, V, seed=7)[1], t))
    found, exact = gradients(make(case, reduction="sum"), s, t)
    assert distance(found[0], exact[0]) <= 1e-6 and distance(found[1], exact[1]) <= 1e-6


def test_pearson_of_nearly_uniform_probabilities():
    """Power sums would lose 1.8e-2 of this."""
    s, t = batch(2, 131072, F32, scale=0.01)
    found, exact = gradients(kd.PearsonLoss("probs"), s, t)
    assert distance(found[0], exact[0]) <= 2e-7 and distance(found[1], exact[1]) <= 2e-7


# --- limits and invariants


@pytest.mark.parametrize("dtype, V", [(F64, 300), (F32, 300), (F32, 8192), (BF16, 8192), (F16, 8192)], ids=str)
@pytest.mark.parametrize("kind", ["random", "ties", "holes"])
def test_a_small_tau_gives_the_hard_rho(kind, dtype, V):
    s, t = batch(2, V, dtype, kind=kind)
    live = s[0].isfinite() & t[0].isfinite()
    hard = 1 - metrics.spearman(s[:, live], t[:, live])
    value, gradient = run(kd.SpearmanLoss(tau=1e-9, reduction="none", exact=True), s, t)
    torch.testing.assert_close(value.double(), hard, rtol=1e-6, atol=1e-7)
    assert gradient.isfinite().all()
    torch.testing.assert_close(run(kd.SpearmanLoss(tau=1e-9, reduction="none"), s, t)[0], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype, V", [(F64, 300), (F32, 300), (F32, 8192), (BF16, 8192)], ids=str)
def test_a_large_tau_gives_the_correlation_with_the_ranks(dtype, V):
    s, t = batch(2, V, dtype)
    ranks = metrics.rankdata(t)
    value, gradient = run(kd.SpearmanLoss(tau=1e6), s, t)
    want, slope = run(kd.PearsonLoss(), s, ranks)
    torch.testing.assert_close(value, want.to(value.dtype), rtol=0, atol=1e-6)
    binned = dtype == F32 and V > 4096
    assert distance(gradient, slope) <= (1e-3 if binned else max(1e-5, CORNERS[dtype]))


def test_kendalls_limit_is_somers():
    s, t = batch(1, 40, kind="random")
    for top_k in (40, 16):
        value = kd.KendallLoss(top_k=top_k, tau=1e-9)(s, t).item()
        order = t[0].argsort(descending=True)[:top_k]
        assert value == pytest.approx(1 - somersd(t[0, order].numpy(), s[0, order].numpy()).statistic, abs=1e-12)


@pytest.mark.parametrize("dtype, V", [(F64, 200), (F32, 6000), (BF16, 6000)], ids=str)
def test_gradients_are_orthogonal_to_shifts_and_scalings(dtype, V):
    s, t = batch(2, V, dtype)
    for loss in (kd.SpearmanLoss(), kd.PearsonLoss(), kd.KendallLoss(tau=0.5), kd.KendallLoss("shifts", seed=0)):
        s32 = s if dtype == F64 else s.float()  # of bfloat16: before the rounding
        gradient = run(loss, s32, t)[1].double()
        size = gradient.norm(dim=-1)
        for direction in (torch.ones_like(gradient), s.double() - s.double().mean(-1, keepdim=True)):
            component = (gradient * direction).sum(-1) / direction.norm(dim=-1)
            assert (component.abs() <= (1e-10 if dtype == F64 else 1e-6) * size).all(), loss


@pytest.mark.parametrize("V, dtype", [(200, F64), (6000, F32)], ids=str)
def test_rank_losses_know_no_scale_offset_or_order(V, dtype):
    s, t = batch(2, V, dtype)
    g = torch.randperm(V)
    for loss in (kd.SpearmanLoss(exact=True), kd.KendallLoss(tau=0.5)):
        value, gradient = run(loss, s, t)
        size = gradient.abs().max().item()
        close = dict(rtol=1e-4, atol=1e-4 * size) if dtype == F32 else dict(rtol=1e-9, atol=1e-9 * size)
        for other in (4 * s, s + 2.0):
            torch.testing.assert_close(run(loss, other, t.exp())[0], value, **close)
        torch.testing.assert_close(run(loss, 4 * s, t)[1], gradient / 4, **close)
        torch.testing.assert_close(run(loss, s[:, g], t[:, g])[1], gradient[:, g], **close)


@pytest.mark.parametrize("dtype, bound", [(F32, 1e-5), (BF16, 0.0), (F16, 0.0)], ids=str)
def test_bins_know_no_order(dtype, bound):
    """Float32 sums of a bin follow the order of its classes, counts of bits do not."""
    s, t = batch(2, 8192, dtype)
    g = torch.randperm(8192)
    value, gradient = run(kd.SpearmanLoss(kd_weight=2.0**12), s, t)
    other = run(kd.SpearmanLoss(kd_weight=2.0**12), s[:, g], t[:, g])
    assert distance(other[0], value) <= bound and distance(other[1], gradient[:, g]) <= bound


def test_monotone_maps_agree_or_disagree_completely():
    s, _ = batch(2, 5000, F32)
    for loss in (kd.SpearmanLoss(tau=1e-6), kd.KendallLoss(top_k=100, tau=1e-6)):
        assert loss(s, s.sinh()).item() == pytest.approx(0, abs=1e-6)
        assert loss(s, -(s**3)).item() == pytest.approx(2, abs=1e-6)


@pytest.mark.parametrize("V", [500, 9000])
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
def test_top_k_of_all_classes_is_the_whole_row(dtype, V):
    s, t = batch(2, V, dtype, kind="ties" if V == 500 else "random")
    for cls in (kd.SpearmanLoss, kd.PlackettLuceLoss):
        want, found = (run(cls(top_k=k), s, t) for k in (None, V))
        assert all(torch.equal(a, b) for a, b in zip(want, found, strict=True))


@on_both
def test_ties_at_the_edge_of_top_k_go_to_the_first(backend):
    t = torch.tensor([[1.0, 2.0, 2.0, -0.0, 0.0, 2.0]])
    with kd.use_backend(backend):
        gradient = run(kd.SpearmanLoss(top_k=2), torch.randn(1, 6), t)[1]
        assert (gradient == 0).all()  # two tied classes: a constant teacher
        gradient = run(kd.PlackettLuceLoss(top_k=5), torch.randn(1, 6), t)[1]
    assert gradient[0, 4] == 0 and (gradient[0, [0, 1, 2, 3, 5]] != 0).all()


def test_shifted_pairs_are_unbiased():
    s, t = batch(1, 60)
    loss = kd.KendallLoss("shifts", shifts=4, tau=0.5)
    estimates, slopes = [], []
    for seed in range(600):
        loss.seed = seed
        value, gradient = run(loss, s, t)
        estimates.append(value)
        slopes.append(gradient[0])
    want, slope = run(kd.KendallLoss("topk", top_k=60, tau=0.5), s, t)
    for found, exact in ((torch.stack(estimates), want), (torch.stack(slopes), slope[0])):
        error = found.std(0) / len(found) ** 0.5
        assert ((found.mean(0) - exact).abs() <= 4.5 * error).all()


def test_shifts_are_drawn_anew_unless_seeded():
    s, t = batch(1, 60)
    loss = kd.KendallLoss("shifts", shifts=2)
    torch.manual_seed(0)
    first, second = loss(s, t), loss(s, t)
    torch.manual_seed(0)
    assert torch.equal(loss(s, t), first) and not torch.equal(first, second)
    loss.seed = 1
    assert torch.equal(loss(s, t), loss(s, t))


def test_plackett_luce_is_the_strict_order_without_ties():
    s, t = batch(3, 5000)
    order = t.argsort(-1)
    strict = s.gather(-1, order).logcumsumexp(-1) - s.gather(-1, order)
    torch.testing.assert_close(kd.PlackettLuceLoss("uniform", reduction="none")(s, t), strict.mean(-1))
    weighted = (t.softmax(-1).gather(-1, order) * strict).sum(-1)
    torch.testing.assert_close(kd.PlackettLuceLoss(reduction="none")(s, t), weighted)


def test_plackett_luce_far_apart():
    """Scores beyond what exp can hold: the denominators are kept relative to the largest score so far."""
    s, t = batch(2, 300, scale=2000.0)
    for backend in ("cpu", "reference"):
        with kd.use_backend(backend):
            value, gradient = run(kd.PlackettLuceLoss("uniform"), s, t)
        order = t.argsort(-1)
        strict = (s.gather(-1, order).cummax(-1).values - s.gather(-1, order)).mean(-1)
        torch.testing.assert_close(value, strict.mean(), rtol=1e-3, atol=0)
        assert gradient.isfinite().all()


def test_distributions_of_whole_batches():
    s, t = batch(5, 12)
    for options in ({}, dict(beta=0.3, gamma=2.0, temperature=4.0)):
        want = s.clone().requires_grad_()
        value = dist(want, t, **options)
        value.backward()
        for backend in ("cpu", "reference"):
            with kd.use_backend(backend):
                found = run(kd.DISTLoss(**options), s, t)
                teacher = t.clone().requires_grad_()
                kd.DISTLoss(**options)(s, teacher).backward()
            torch.testing.assert_close(found[0], value.detach())
            torch.testing.assert_close(found[1], want.grad)
            assert teacher.grad.abs().sum() > 0
    labels = torch.tensor([0, 1, -100, 2, -100])
    torch.testing.assert_close(kd.DISTLoss()(s, t, labels), dist(s[labels >= 0], t[labels >= 0]))
    mask = torch.arange(12) != 4
    torch.testing.assert_close(kd.DISTLoss()(s, t, vocab_mask=mask), dist(s[:, mask], t[:, mask]))


PERMUTAHEDRON = """
import torch, torchsort
s, t = (3 * torch.randn(1, 1000) for _ in "st")
soft = torchsort.soft_rank(s, regularization_strength=1.0)
print(torch.corrcoef(torch.cat((soft, s))).abs()[0, 1].item())
"""


@pytest.mark.parametrize("N", [2, 3, 7, 11])
def test_dist_of_equal_rows(N):
    """Each class has the same probability in all rows of the student: the second term is 1, without a gradient."""
    row, t = torch.randn(100), 3 * torch.randn(N, 100)
    s = row.repeat(N, 1).requires_grad_()
    value = kd.DISTLoss(beta=0.0)(s, t)
    (gradient,) = torch.autograd.grad(value, s)
    assert value.item() == pytest.approx(1, abs=1e-9) and gradient.abs().max() == 0


@pytest.mark.parametrize("N, scale", [(3, 1.0), (16, 3.0), (16, 0.3), (16, 1e-3), (300, 1.0)])
def test_dist_between_rows_is_no_further_from_float64_than_torch(N, scale):
    s, t = batch(N, 500, torch.float32, scale)
    (exact, slope), (eager, eager_slope), (got, own) = (
        run(loss, x, y) for loss, x, y in [
            (lambda s, t: dist(s, t, beta=0.0), s.double(), t.double()), (lambda s, t: dist(s, t, beta=0.0), s, t),
            (kd.DISTLoss(beta=0.0), s, t)])  # fmt: skip
    assert (got - exact).abs() <= (eager - exact).abs() + 2e-7 * exact
    assert (own - slope).norm() <= (eager_slope - slope).norm() + 2e-7 * slope.norm()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_dist_counts_what_is_unlikely_everywhere(backend):
    """rho knows no scale: a class of probability 1e-300 in all rows counts as any other, and so does its gradient."""
    s, t = (3 * torch.randn(2, 6, 40)).double()
    far = torch.zeros(40, dtype=torch.float64).index_fill(0, torch.tensor([3, 20]), -700.0)
    with kd.use_backend(backend):
        value, slope = run(kd.DISTLoss(beta=0.0), s + far, t + far)
    want, exact = run(lambda s, t: dist(s, t, beta=0.0), s + far / 5, t + far / 5)  # squares of 1e-122
    torch.testing.assert_close((value, slope), (want, exact), rtol=1e-10, atol=1e-12)
    assert slope[:, 3].abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [20, 700, 3001])
def test_dist_of_damaged_masked_and_impossible_classes(dtype, V):
    """The kernels beside the definition, both gradients; a NaN spoils the batch, unless its row or class is none."""
    s, t = (2 * torch.randn(2, 3, 4, V + 3)).to(dtype)
    for gone in (s[0, 1, 4], t[1, 2, 5], s[..., 7], t[..., 7], s[..., 8]):
        gone.fill_(-torch.inf)
    y = torch.randint(V, (3, 4)).index_fill(1, torch.tensor([3]), -100)
    s[:, 3], t[..., 9] = torch.nan, torch.nan
    mask = (torch.arange(V) != 9) & (torch.arange(V) % 7 != 1)
    warm = torch.rand(3, 4, dtype=torch.float64) + 0.5
    more = dict(labels=y.where(mask[y.clamp(0)] | (y < 0), 0), vocab_size=V, vocab_mask=mask, temperature=warm)
    loss, results = kd.DISTLoss(t_squared=False, beta=0.0), []
    for backend in ("cpu", "reference"):
        leaves = [x.clone().requires_grad_() for x in (s, t)]
        with kd.use_backend(backend):
            value = loss(*leaves, **more)
            value.backward()
        results.append((value.detach(), *(x.grad for x in leaves)))
    for a, b in zip(*results, strict=True):
        bar = 1e-12 if a.dtype == torch.float64 else 4 * torch.finfo(a.dtype).eps
        assert a.isfinite().all() and (a - b).double().norm() <= bar * b.double().norm()
    s[1, 0, 2] = torch.nan
    value, slope = run(loss, s, t, **more)
    assert value.isnan() and slope[:, :3, :V].isnan().all() and slope[:, 3].eq(0).all()


def test_a_permutahedron_at_eps_1_is_pearson():
    """Projected ranks are affine in the logits there. In a process of its own: torchsort is built with fast-math."""
    if importlib.util.find_spec("torchsort") is None:
        pytest.skip("torchsort is not installed")
    shown = subprocess.run([sys.executable, "-c", PERMUTAHEDRON], capture_output=True, text=True, check=True).stdout
    assert float(shown) == pytest.approx(1, abs=1e-4)


MEMORY = """
from pathlib import Path
import torch, kdkernels as kd
status = lambda key: int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1024
for dtype, N in ((torch.float32, 256), (torch.bfloat16, 512)):
    s, t = (torch.randn(N, 65536).to(dtype) for _ in "st")
    for loss in (kd.SpearmanLoss(), kd.SpearmanLoss(top_k=128), kd.PearsonLoss(), kd.PearsonLoss("probs"),
                 kd.KendallLoss(), kd.PlackettLuceLoss(), kd.ForwardKLLoss() + kd.SpearmanLoss(), kd.CMKDLoss(),
                 kd.DISTLoss()):
        leaf = s.clone().requires_grad_()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = status("VmRSS")
        loss(leaf, t).backward()
        print(type(loss).__name__, status("VmHWM") - before - s.nbytes / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_buffer_is_as_large_as_the_logits():
    """64 MB of logits; beside the gradient a step takes what its threads keep of a row. DIST's two terms have a
    gradient each, and autograd makes their sum."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    most = [160 if name == "DISTLoss" else 32 for name, _ in lines]
    assert len(lines) == 18 and all(float(x) < bound for (_, x), bound in zip(lines, most, strict=True)), done.stdout
