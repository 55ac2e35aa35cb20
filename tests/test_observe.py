"""Metrics that come with a loss's value: those of plain torch, from one reduce."""

from collections import Counter

import pytest
import torch
from accuracy import BACKENDS, F32, F64, SAMPLE, batch, has_kernels, make, only

import kdkernels as kd
from kdkernels import observe

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


def expected(s, t, y=None, T=1.0, T_teacher=None):
    lq, lp = (x.double() / x.new_tensor(T, dtype=F64) for x in (s, t))
    lp = lp if T_teacher is None else t.double() / T_teacher
    lse, (lq, lp) = [x.logsumexp(-1) for x in (lq, lp)], (x.log_softmax(-1) for x in (lq, lp))
    entropy = [-(x.exp() * torch.where(x.isneginf(), 0.0, x)).sum(-1) for x in (lq, lp)]
    ce = None if y is None else -lq.gather(-1, y.clamp(min=0)[..., None])[..., 0]
    same = (s.argmax(-1) == t.argmax(-1)).double()
    return kd.RowMetrics(*lse, *entropy, ce, same, torch.minimum(lq.exp(), lp.exp()).sum(-1))


def agree(got, exact, kept=None, bar=1e-11):
    for name, a, b in zip(kd.RowMetrics._fields, got, exact, strict=True):
        assert a.dtype == F64 and not a.requires_grad and a.shape == b.shape, name
        b = b if kept is None else torch.where(kept, b, torch.nan)
        torch.testing.assert_close(a, b, rtol=bar, atol=bar, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")


@on_every_backend
def test_metrics_are_those_of_plain_torch_and_the_loss_is_its_own(backend):
    dtype = F64 if backend in ("cpu", "reference") else F32
    x = batch(4, 23, 2.0, seed=7, s_dtype=dtype)
    x = x._replace(t=torch.where(torch.arange(4)[:, None] < 2, x.s + 0.1 * x.t, x.t), y=x.y.clone())
    x.y[1] = -100
    for case in [c for c in SAMPLE if has_kernels(c, backend) and c.needs_teacher]:
        if case.setting("standardize", False):
            continue
        loss = make(case)
        results = []
        for observed in (True, False):
            s = x.s.clone().requires_grad_()
            with only(backend):
                before = Counter(kd.backends.calls)
                value, metrics = loss.with_metrics(s, x.t, x.y) if observed else (loss(s, x.t, x.y), None)
                ran = kd.backends.calls - before
                value.backward()
            results.append((value.detach(), s.grad))
            if observed:
                assert list(ran.values()).count(1) == len(ran) and (backend, "spread") not in ran
                agree(metrics, expected(x.s, x.t, x.y, loss.temperature), x.y >= 0, 1e-11 if dtype == F64 else 2e-5)
        bar = dict(rtol=1e-12, atol=1e-12) if dtype == F64 else dict(rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(*results, **bar)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_options_of_a_call(backend, monkeypatch):
    monkeypatch.setattr(observe, "ELEMENTS", 50)  # two rows at a time
    g = torch.Generator().manual_seed(0)
    s, t = torch.randn(2, 3, 6, 23, generator=g, dtype=F64)
    s, t, y = s[:, :-1], t[:, :-1], torch.randint(20, (3, 5), generator=g)  # as of a language model: no copy
    temperature = torch.rand(3, 5, generator=g, dtype=F64) + 0.5
    mask = torch.arange(23) != 4
    y[y == 4] = 5
    with kd.use_backend(backend):
        loss = kd.ReverseKLLoss(reduction="none", teacher_temperature=0.7)
        value, metrics = loss.with_metrics(s, t, y, temperature=temperature, vocab_size=21, vocab_mask=mask)
        torch.testing.assert_close(value, loss(s, t, y, temperature=temperature, vocab_size=21, vocab_mask=mask))
        cut = [x[..., :21].masked_fill(~mask[:21], -torch.inf) for x in (s, t)]
        agree(metrics, expected(*cut, y, temperature[..., None].tolist(), 0.7))
        loss.temperature = 3.0  # prepared once more
        agree(loss.with_metrics(s, t, y)[1], expected(s, t, y, 3.0, 0.7))
        sums = 0.5 * kd.DKDLoss(temperature=2.0) + kd.ReverseKLLoss() + kd.CrossEntropyLoss()
        value, metrics = sums.with_metrics(s, t, y)
        torch.testing.assert_close(value, sums(s, t, y))
        agree(metrics, expected(s, t, y))
        z = kd.ForwardKLLoss(standardize=True).with_metrics(s, t)[1]
        scaled = [x / x.std(-1, keepdim=True) for x in (s, t)]
        agree(z._replace(cross_entropy=z.student_lse), expected(*scaled)._replace(cross_entropy=z.student_lse))


def test_without_a_teacher_labels_or_agreement():
    x = batch(4, 23)
    metrics = kd.BrierLoss().with_metrics(x.s, None, x.y)[1]
    assert [f for f in kd.RowMetrics._fields if getattr(metrics, f) is None] == [
        "teacher_lse", "teacher_entropy", "top1_agreement", "acceptance"]  # fmt: skip
    metrics = kd.HellingerLoss().with_metrics(x.s, x.t, agreement=False)[1]
    assert [f for f in kd.RowMetrics._fields if getattr(metrics, f) is None] == [
        "cross_entropy", "top1_agreement", "acceptance"]  # fmt: skip
    empty = kd.HellingerLoss().with_metrics(x.s[:0], x.t[:0])[1]
    assert all(m is None or m.shape == (0,) for m in empty)
    with pytest.raises(TypeError, match="agreement must be a bool"):
        kd.HellingerLoss().with_metrics(x.s, x.t, agreement=1)
    with pytest.raises(ValueError, match="needs teacher_logits"):
        kd.HellingerLoss().with_metrics(x.s)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_metrics_of_losses_that_make_no_log_partitions(backend):
    x = batch(6, 23, 2.0, seed=3)
    x.y[1] = -100
    groups = torch.arange(23) % 4
    losses = [kd.SpearmanLoss(), kd.PearsonLoss("probs", temperature=2.0), kd.AKLLoss(teacher_temperature=0.5),
              kd.GroupedKLLoss(groups), kd.ULDLoss(reduction="none"), kd.ForwardKLLoss() + kd.KendallLoss(top_k=8)]
    with kd.use_backend(backend):
        for loss in losses:
            s = x.s.clone().requires_grad_()
            value, metrics = loss.with_metrics(s, x.t, x.y, row_weight=torch.rand(6))
            own = loss.with_metrics(s, x.t, x.y)
            assert value.requires_grad and torch.equal(own[0], loss(s, x.t, x.y))
            agree(metrics, expected(x.s, x.t, x.y, loss.temperature, loss.teacher_temperature), x.y >= 0)
        loss = kd.SpearmanLoss()
        for loss.temperature in (1.0, 3.0):  # what is kept of it follows
            own = loss.with_metrics(x.s, x.t)[1]
            assert torch.allclose(own.student_entropy, expected(x.s, x.t, None, loss.temperature).student_entropy)
        metrics = kd.SpearmanLoss(kd_weight=0.0, ce_weight=1.0).with_metrics(x.s, None, x.y)[1]
        assert metrics.teacher_lse is None and metrics.student_lse.shape == (6,)


@on_every_backend
@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16])
def test_first_choices_are_those_of_torch(backend, dtype):
    """Ties: the first of equals, in whatever tile; giant, impossible and damaged classes; what is left out."""
    if dtype == F64 and backend not in ("cpu", "reference"):
        dtype = F32
    s, t = batch(9, 5003, 3.0, seed=5, s_dtype=dtype)[:2]
    s, t = s.clone(), t.to(dtype)
    t[0, 4000] = t[0, 17] = t[0].max() + 1
    s[0, 4000] = s[0, 17] = s[0].max() + 1  # both first at 17
    s[1, 4999] = s[1].max() + 1
    t[1, 4999] = t[1, 4998] = t[1].max() + 1  # one first at 4998
    s[2, 9], t[2, 5] = -3e30, 3e30
    s[3, :5000] = t[3, ::2] = -torch.inf
    s[4, 7], t[5, 4000] = torch.nan, torch.inf
    s[6, 5001] = 1e9
    mask = torch.arange(5003) % 3 != 1
    with only(backend):
        found = kd.ForwardKLLoss().with_metrics(s, t)[1]
        masked = kd.ForwardKLLoss().with_metrics(s, t, vocab_size=5002, vocab_mask=mask)[1]
    cut = [x[:, :5002].masked_fill(~mask[:5002], -torch.inf) for x in (s, t)]
    for got, pair in ((found, (s, t)), (masked, cut)):
        same = pair[0].argmax(-1) == pair[1].argmax(-1)
        q, p = (x.double().softmax(-1) for x in pair)
        assert torch.equal(got.top1_agreement, same.double())
        torch.testing.assert_close(got.acceptance, torch.minimum(q, p).sum(-1), rtol=1e-5, atol=1e-7, equal_nan=True)
