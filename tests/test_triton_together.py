"""Spearman's loss and losses of the log-partition in one Triton kernel, against the textbook and one by one."""

from collections import Counter
from functools import cache

import pytest
import torch
import triton.language as tl
from accuracy import BF16, CASES, F16, F32, F64, make, only
from test_ranks import batch, distance
from textbook_ranks import CASES as OF_RANKS

import kdkernels as kd
from kdkernels.backends import triton_ranks
from kdkernels.backends.triton import triton_compare, triton_together

V, N, SHARE = 1100, 4, 100.0  # two tiles or three; Spearman's gradient is about as long as the others' with this weight
NAMES = ("ForwardKLLoss-temperature", "DKDLoss-alpha=0.5", "LogitMSE", "CrossEntropy", "TAIDLoss-tau=0.4")
FIRST = [next(case for case in CASES if str(case).startswith(name)) for name in NAMES]
SPEARMAN = next(case for case in OF_RANKS if str(case) == "SpearmanLoss")
DTYPES = [(BF16, BF16), (BF16, F16), (F32, F32), (F32, BF16)]
MASK, LABELS = torch.arange(V) % 3 != 1, torch.tensor([0, 3, -100, 1038])
CALLS = {
    "plain": {}, "masked": dict(vocab_mask=MASK), "padded": dict(vocab_size=1041),
    "weights": dict(row_weight=torch.tensor([0.5, 2.0, 1.0, 0.0]), num_items=7, temperature=torch.arange(1.0, 5.0)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def histograms(monkeypatch):
    monkeypatch.setattr(triton_compare, "SORTED", 400)
    monkeypatch.setattr(triton_ranks, "LEAST_LOSS", tl.constexpr(20))  # of so few classes all float32 rows were sorted


def logits(dtypes, holes=False):
    s, t = batch(N, V, kind="holes" if holes else "random", seed=3)
    return s.to(dtypes[0]), t.to(dtypes[1])


@cache
def ranks(dtypes, call):
    """Values and gradients of the rows' textbook Spearman."""
    s, t = logits(dtypes)
    kept = MASK if call == "masked" else torch.arange(V) < CALLS[call].get("vocab_size", V)
    value, some = SPEARMAN.rows(s[:, kept], t[:, kept])
    gradient = torch.zeros(s.shape, dtype=F64)
    gradient[:, kept] = some.double()
    return value, gradient


def exact(case, dtypes, call):
    s, t = (x.double() for x in logits(dtypes))
    value = case.loss(s.requires_grad_(), t, LABELS, **CALLS[call])
    (gradient,) = torch.autograd.grad(value, s)
    weight = CALLS[call].get("row_weight", torch.ones(N)) * (LABELS != -100) / CALLS[call].get("num_items", 3)
    own, slopes = ranks(dtypes, call)
    return value.detach() + SHARE * (weight * own).sum(), gradient + SHARE * weight[:, None] * slopes


def run(loss, s, t, labels=LABELS, by=1.0, backend="triton", **call):
    s, before = s.clone().requires_grad_(), Counter(kd.backends.calls)
    with only(backend):
        value = loss(s, t, labels, **call)
        (by * value).backward()
    return value.detach(), s.grad, kd.backends.calls - before


@pytest.mark.parametrize("call", range(len(CALLS)), ids=list(CALLS))
@pytest.mark.parametrize("first", range(len(FIRST)), ids=map(str, FIRST))
def test_a_sum_in_one_launch(first, call):
    """Each loss in each call, and in each pair of dtypes."""
    case, dtypes, call = FIRST[first], DTYPES[(first + call) % len(DTYPES)], list(CALLS)[call]
    value, gradient, calls = run(make(case) + SHARE * kd.SpearmanLoss(), *logits(dtypes), **CALLS[call])
    assert calls == (TOGETHER if F32 in dtypes else TOGETHER - LOOKS)
    want = exact(case, dtypes, call)
    if dtypes[0] == F32:  # cells of Spearman's histograms
        assert abs(value - want[0]) <= 1e-3 * want[0].abs() and distance(gradient, want[1]) <= 1e-3
    else:  # exact, and rounded once
        assert abs(value - want[0]) <= 1e-6 * want[0].abs()
        near = dict(rtol=0.51 * torch.finfo(BF16).eps, atol=1e-5 * want[1].abs().max().item())
        torch.testing.assert_close(gradient.double(), want[1], **near)
    assert (gradient[2] == 0).all() and gradient[0].abs().sum() > 0


KL, CE, RANKS = kd.ForwardKLLoss(temperature=2.0, ce_weight=0.3), kd.CrossEntropyLoss(0.1), kd.SpearmanLoss()
LOOKS = Counter({("triton", "spearman_sorted"): 1})  # for float32 rows whose loss is near 0 or 2
TOGETHER = Counter({("triton", "together"): 1, ("triton", "rescale"): 1}) + LOOKS


def one_by_one(terms, s, t, *labels, **call):
    found = [run(weight * loss, s, t, *labels, **call)[:2] for weight, loss in terms]
    return [sum(each) for each in zip(*found, strict=True)]


@pytest.mark.parametrize("first", [KL, CE], ids=["KL", "CE"])
def test_traps(first):
    """Spoilt, flat and empty rows, -inf in one row and in both, and labels that are none: as one by one."""
    s, t = logits((F32, F32), holes=True)
    s[:, 1050:], t[:, 1050:], labels = -torch.inf, -torch.inf, torch.tensor([1000, 1001, 1002, 1003])
    rows = {"holes": (s, t), "flat": (torch.zeros_like(s), t), "nan": (s.clone(), t), "inf": (s, t.clone())}
    rows["nan"][0][1, 900], rows["inf"][1][2, 901] = torch.nan, torch.inf
    ignored, strange = labels.clone(), labels.clone()
    ignored[1], strange[0] = -100, V
    calls = [(name, labels) for name in rows] + [("holes", ignored), ("holes", strange)]
    for name, y in calls:
        value, gradient, launched = run(first + 9 * RANKS, *rows[name], y)
        assert launched == TOGETHER
        want = one_by_one([(1, first), (9, RANKS)], *rows[name], y)
        near = dict(rtol=1e-5, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(value, want[0], atol=1e-6, **near)
        torch.testing.assert_close(gradient, want[1], atol=1e-8, **near)


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32)], ids=str)
def test_rows_that_nearly_agree_are_sorted(dtypes):
    """Their gradient by ranks is added to what is there; the others of the launch are not touched."""
    s, t = logits(dtypes)
    s[1], s[3] = t[1] + 0.03 * s[1], -t[3]
    want = run(KL + SHARE * RANKS, s.double(), t.double(), backend="reference")
    value, gradient, calls = run(KL + SHARE * RANKS, s, t)
    assert calls == TOGETHER
    torch.testing.assert_close(value.double(), want[0], rtol=1e-4, atol=0)
    for row, bound in ((0, 1e-3), (1, 1e-5), (3, 1e-5)):
        assert distance(gradient[row], want[1][row]) <= max(bound, 1.5 * torch.finfo(dtypes[0]).eps), row


def test_the_gradient_again_multiplied_and_in_a_buffer():
    s, t = logits((F32, F32))
    loss = KL + SHARE * RANKS
    value, gradient, _calls = run(loss, s, t)
    assert torch.equal(run(loss, s, t, by=4.0)[1], 4 * gradient)
    leaf = s.view(2, 2, V).clone().requires_grad_()
    with only("triton"):
        again = loss(leaf, t.view(2, 2, V), LABELS.view(2, 2))
        for by in (1.0, 3.0):
            (more,) = torch.autograd.grad(again, leaf, torch.tensor(by), retain_graph=True)
            torch.testing.assert_close(more.view(N, V), by * gradient)
        (more,) = torch.autograd.grad(again, leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match="not itself differentiable"):
            more.sum().backward()
        out = torch.ones_like(s)
        found, _ = loss.value_and_grad(s, t, LABELS, out=out, accumulate=True)
    assert torch.equal(found, value)
    torch.testing.assert_close(out - 1, gradient, rtol=1e-5, atol=1e-6)


def test_repeats_to_the_bit_however_many_programs(monkeypatch):
    found = []
    for scratch in (1 << 29, 1):
        monkeypatch.setattr(triton_compare, "SCRATCH", scratch)
        found.append(run(KL + SHARE * RANKS, *logits((BF16, BF16)))[:2])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("terms, kernels", [
    ([(1, KL), (50, RANKS), (50, RANKS)], ["together", "spearman"]),
    ([(1, KL), (1, kd.PearsonLoss()), (90, RANKS)], ["together", "pearson"]),
    ([(1, KL), (2, kd.SpearmanLoss(top_k=700))], ["step", "top", "spearman"]),
    ([(1, KL), (2, kd.SpearmanLoss(top_k=64))], ["step", "top", "spearman_sorted"]),
    ([(1, KL), (9, kd.SpearmanLoss(exact=True))], ["step", "spearman_sorted"]),
    ([(1, kd.JSDLoss()), (9, RANKS)], ["sums", "spearman"]),
    ([(1, kd.ForwardKLLoss(standardize=True)), (9, RANKS)], ["reduce", "spearman"]),
], ids=str)  # fmt: skip
def test_what_goes_one_by_one(terms, kernels):
    s, t = logits((F32, F32))
    value, gradient, calls = run(sum(weight * loss for weight, loss in terms), s, t)
    assert {("triton", name) for name in kernels} <= set(calls)
    assert calls["triton", "together"] == (kernels[0] == "together") and calls["triton", "spearman"] <= 1
    want = one_by_one(terms, s, t)
    torch.testing.assert_close(value, want[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, want[1], rtol=1e-5, atol=1e-7)


def test_cuda_has_it_from_triton_unless_it_was_asked_for(monkeypatch):
    """On a GPU with CUDA C++ kernels, which have a step of their own and no such sweep."""
    case, call, (s, t) = FIRST[0], "plain", logits((BF16, BF16))
    want, slope = exact(case, (BF16, BF16), call)
    with monkeypatch.context() as patch:
        patch.setattr(kd.backends, "pick", lambda *_logits: kd.backends._load("cuda"))
        found = {}
        for options in ({}, dict(top_k=64)):
            leaf, before = s.clone().requires_grad_(), Counter(kd.backends.calls)
            value = (make(case) + SHARE * kd.SpearmanLoss(**options))(leaf, t, LABELS)
            value.backward()
            found[len(options)] = value.detach(), leaf.grad, set(kd.backends.calls - before)
    assert found[0][2] == {("triton", "together")}
    assert found[1][2] == {("cuda", "step"), ("triton", "top"), ("triton", "spearman_sorted")}
    assert abs(found[0][0] - want) <= 1e-6 * want and distance(found[0][1], slope) <= torch.finfo(BF16).eps
    with kd.use_backend("cuda"), pytest.raises(kd.BackendUnavailable, match="'cuda' has no kernels for rank losses"):
        (KL + RANKS)(s.requires_grad_(), t, LABELS)


def test_float16_waits_for_the_factor():
    s, t = logits((F16, F16))
    value, gradient, calls = run(KL + SHARE * RANKS, s, t, by=2.0**16)
    assert calls["triton", "together"] == 0
    want = one_by_one([(1, KL), (SHARE, RANKS)], s, t, by=2.0**16)
    torch.testing.assert_close((value, gradient), tuple(want), rtol=0.01, atol=0.01)


def test_operator_passes_opcheck():
    s, t = logits((F32, F32))
    args, one = KL._single.args, torch.ones(1, dtype=F64)
    given = (s, t, LABELS, MASK, args, KL._single.code, one, one, 0.1, V, -100, False)
    torch.library.opcheck(triton_together.together, given)
