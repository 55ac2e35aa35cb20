"""LTKDLoss: groups rebalanced over the batch."""

import pytest
import torch
from accuracy import F64, batch
from hypothesis import given
from hypothesis import strategies as st
from textbook import ltkd
from torch.autograd import gradcheck

import kdkernels as kd

GROUPS = torch.tensor([0, 0, 1, 2, 1, 0, 2, 2, 1])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_agrees_with_the_textbook(backend, dtype):
    s, t, y = batch(40, 9, scale=2.0, seed=1)
    t[:, GROUPS == 0] += 3.0  # the head of a biased teacher
    s, t = s.to(dtype).requires_grad_(), t.to(dtype)
    exact = s.detach().double().requires_grad_()
    rows = 4.0 * ltkd(exact / 2, t.double() / 2, GROUPS, 0.7, 1.5)
    want = 3.0 * rows.mean() + 0.5 * torch.nn.functional.cross_entropy(exact, y)
    loss = kd.LTKDLoss(GROUPS, 0.7, 1.5, temperature=2.0, kd_weight=3.0, ce_weight=0.5)
    with kd.use_backend(backend):
        value = loss(s, t, y)
        (grad,) = torch.autograd.grad(value, s)
        both = loss.value_and_grad(s.detach(), t, y)
        per_row = kd.LTKDLoss(GROUPS.tolist(), 0.7, 1.5, temperature=2.0, reduction="none")(s.detach(), t)
    bar = {F64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(value.double(), want, rtol=min(bar, 1e-5), atol=0)
    (slope,) = torch.autograd.grad(want, exact)
    torch.testing.assert_close(grad.double(), slope, rtol=bar, atol=bar * slope.abs().max().item())
    torch.testing.assert_close(both[0], value.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(both[1], grad)
    torch.testing.assert_close(per_row.double(), rows.detach(), rtol=min(bar, 1e-5), atol=1e-7)


def test_the_mass_of_the_batch_is_uniform_for_rows_alike_and_moves_with_the_batch():
    """Of one row alone the groups are equal; another row with it changes what the first is told."""
    s, t, _ = batch(2, 9, scale=2.0)
    loss = kd.LTKDLoss(GROUPS, reduction="none")
    third, at_least = torch.full((3,), 1 / 3, dtype=F64), loss.minimizer(t[:1]).softmax(-1)
    torch.testing.assert_close(torch.zeros(3, dtype=F64).index_add(0, GROUPS, at_least[0]), third)
    torch.testing.assert_close(loss(loss.minimizer(t), t), torch.zeros(2, dtype=F64), rtol=0, atol=1e-14)
    alone, together = loss(s[:1], t[:1]), loss(s, t)[:1]
    assert (alone - together).abs() > 1e-3
    plain = kd.GroupedKLLoss(GROUPS, balanced=True, t_squared=True, reduction="none")(s, t)
    assert (plain - loss(s, t)).abs().min() > 1e-3
    one = kd.LTKDLoss(reduction="none")  # one group: nothing to balance
    torch.testing.assert_close(one(s, t), kd.ForwardKLLoss(reduction="none")(s, t))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_rows_and_classes_that_do_not_count(backend):
    s, t, y = batch(6, 12, scale=2.0)
    s, t, y = s.clone(), t.clone(), y % 9
    temperature, mask = torch.linspace(1.0, 2.0, 6, dtype=F64), torch.arange(12) != 4
    y = torch.where(y == 4, 0, y)
    kept = [0, 2, 4]
    y[1], weight = -100, torch.tensor([1.0, 2.0, 1.0, 0.0, 1.0, 0.0])
    s[1], t[3], t[5, 0] = torch.nan, torch.inf, torch.nan
    groups, call = torch.cat((GROUPS, torch.zeros(3, dtype=torch.int64))), dict(vocab_size=9, vocab_mask=mask)
    live = mask[:9]
    parts = [x[kept][:, :9][:, live] / temperature[kept, None] for x in (s, t)]
    want = (temperature[kept] ** 2 * ltkd(*parts, GROUPS[live])).sum() / 5
    with kd.use_backend(backend):
        got = kd.LTKDLoss(groups)(s, t, y, row_weight=weight, temperature=temperature, **call)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_a_group_without_classes_and_the_teachers_gradient():
    s, t, _ = batch(4, 9, scale=2.0)
    s, t = s.clone(), t.clone()
    s[:, GROUPS == 1] = t[:, GROUPS == 1] = -torch.inf
    live = GROUPS != 1
    got = kd.LTKDLoss(GROUPS, reduction="none")(s, t)
    torch.testing.assert_close(got, ltkd(s[:, live], t[:, live], GROUPS[live]), rtol=1e-12, atol=0)
    s, t, _ = batch(4, 9)
    leaf = t.clone().requires_grad_()
    (slope,) = torch.autograd.grad(kd.LTKDLoss(GROUPS)(s, leaf), leaf)
    shifted = kd.LTKDLoss(GROUPS).minimizer(t).requires_grad_()
    grouped = kd.GroupedKLLoss(GROUPS, balanced=True)
    torch.testing.assert_close(slope, torch.autograd.grad(grouped(s, shifted), shifted)[0])
    for backend in ("reference", "cpu"):
        with kd.use_backend(backend):
            assert gradcheck(lambda x: kd.LTKDLoss(GROUPS)(x, t), s.clone().requires_grad_())


def test_refuses():
    s, t, y = batch(3, 9)
    for groups in ("label", lambda log_q, log_p: log_q, [0.5]):
        with pytest.raises((TypeError, ValueError), match="groups"):
            kd.LTKDLoss(groups)
    with pytest.raises(ValueError, match="standardize"):
        kd.LTKDLoss(GROUPS, standardize=True)
    with pytest.raises(TypeError, match="with_metrics"):
        kd.LTKDLoss(GROUPS).with_metrics(s, t, y)
    with pytest.raises(ValueError, match="groups"):
        kd.LTKDLoss(GROUPS[:5])(s, t)
    with pytest.raises((TypeError, ValueError), match="LTKDLoss"):
        kd.LinearLoss(kd.LTKDLoss(GROUPS))(torch.randn(3, 2), torch.randn(9, 2), teacher_logits=t)


@pytest.mark.parametrize("make", [kd.LTKDLoss, kd.GroupedKLLoss])
@given(st.integers(1, 4), st.integers(0, 2**20), st.integers(-300, 300), st.permutations(range(7)))
def test_properties_with_groups(make, rows, seed, shift, order):
    """Blind to shifts, gradient rows sum to 0, not negative, 0 for equal groups, classes in any order with theirs."""
    g = torch.Generator().manual_seed(seed)
    s, t = (torch.randn(2, rows, 7, generator=g, dtype=torch.float64) * 256).round() / 256
    groups = torch.tensor([0, 1, 1, 2, 0, 2, 2])

    def run(s, t, groups):
        leaf = s.clone().requires_grad_()
        value = make(groups)(leaf, t)
        value.backward()
        return value.detach(), leaf.grad

    value, slope = run(s, t, groups)
    near = dict(rtol=1e-9, atol=1e-11)
    assert value > -1e-14
    torch.testing.assert_close(slope.sum(-1), torch.zeros(rows, dtype=slope.dtype), rtol=0, atol=1e-12)
    torch.testing.assert_close(run(s + shift, t - shift, groups), (value, slope), **near)
    torch.testing.assert_close(run(s[:, order], t[:, order], groups[order]), (value, slope[:, order]), **near)
    if make is kd.GroupedKLLoss:
        torch.testing.assert_close(run(t, t, groups), (torch.zeros_like(value), torch.zeros_like(slope)), **near)
