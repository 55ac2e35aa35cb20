"""Sums of losses of several families: those of the losses one by one, in one launch where the C++ backend can."""

from collections import Counter

import pytest
import torch
from accuracy import BF16, F16, F32, F64, batch, only

import kdkernels as kd

KL, TOP, WHOLE = kd.ForwardKLLoss(temperature=2.0), kd.SpearmanLoss(top_k=3), kd.SpearmanLoss()
SUMS = {
    "a few classes": [(0.7, KL), (0.5, TOP)],
    "whole rows": [(1, kd.DKDLoss()), (-2.0, WHOLE), (0.3, kd.PearsonLoss("probs", temperature=3.0))],
    "both": [(1, KL), (2.0, kd.KendallLoss("shifts", shifts=3, seed=1)), (1, kd.KendallLoss(top_k=4)), (0.1, WHOLE)],
    "orders": [(0.5, kd.CrossEntropyLoss(0.1)), (1, kd.PlackettLuceLoss(top_k=5)), (1, kd.PlackettLuceLoss("uniform"))],
    "three families": [(1, KL), (0.2, kd.ReverseKLLoss()), (1, TOP), (1, kd.DISTLoss()), (1, kd.JSDLoss())],
    "a cross-entropy of its own": [(1, KL), (1, kd.SpearmanLoss(ce_weight=0.5)), (3, kd.PearsonLoss())],
    "no log-partition": [(1, WHOLE), (0.5, kd.PearsonLoss())],
}  # fmt: skip
ONE_LAUNCH = ("a few classes", "whole rows", "both", "orders")
every_sum = pytest.mark.parametrize("name", SUMS)


def added(terms):
    return sum(weight * loss for weight, loss in terms)


def results(terms, rows, one_by_one=False, by=1.0, **call):
    s = rows.s.clone().requires_grad_()
    losses = [weight * loss(s, rows.t, rows.y, **call) for weight, loss in terms] if one_by_one else \
        [added(terms)(s, rows.t, rows.y, **call)]  # fmt: skip
    (by * sum(losses).sum()).backward()
    return sum(losses).detach(), s.grad


def left_out(rows):
    return rows._replace(y=torch.where(torch.arange(len(rows.y)) == 1, -100, rows.y))


CALLS = {
    "plain": {}, "weights": dict(row_weight=torch.tensor([1.0, 2.0, 0.0, 0.5, 3.0]), num_items=3),
    "masked": dict(vocab_mask=torch.arange(200) % 3 != 1), "padded": dict(vocab_size=190),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@every_sum
def test_a_sum_is_the_sum_of_its_terms(name, dtype, call):
    rows = left_out(batch(5, 200, 2.0, seed=1, s_dtype=dtype))
    if call != "plain":  # whose classes are kept by every mask
        rows = rows._replace(y=torch.where(rows.y == -100, -100, rows.y // 3 * 3 % 189))
    if call == "masked":
        rows = rows._replace(s=rows.s.clone(), t=rows.t.clone())
        rows.s[:, 5], rows.t[:, 9] = -torch.inf, -torch.inf
        if any(type(loss) in (kd.DKDLoss, kd.JSDLoss, kd.ReverseKLLoss) for _, loss in SUMS[name]):
            rows.t[:, 5], rows.s[:, 9] = -torch.inf, -torch.inf
    got = results(SUMS[name], rows, **CALLS[call])
    want = results(SUMS[name], rows, one_by_one=True, **CALLS[call])
    for actual, expected in zip(got, want, strict=True):
        # The gradient of each term is rounded to the student's dtype, and so is each sum of two.
        unit = len(SUMS[name]) * torch.finfo(actual.dtype).eps
        torch.testing.assert_close(actual, expected, rtol=2 * unit, atol=unit * expected.abs().max().item())
        assert expected.abs().sum() > 0


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("N, V", [(5, 9000), (101, 40)])
@pytest.mark.parametrize("name", ONE_LAUNCH)
def test_many_and_long_rows_in_one_launch(name, N, V, dtype):
    rows = left_out(batch(N, V, 2.0, seed=2, s_dtype=dtype))
    before = Counter(kd.backends.calls)
    with only("cpu"):
        got = results(SUMS[name], rows)
    assert kd.backends.calls - before == {("cpu", "together_step"): 1}
    want = results(SUMS[name], rows, one_by_one=True)
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-8)
    unit = 2 * len(SUMS[name]) * torch.finfo(BF16).eps  # the gradient of each term is rounded, and each sum of two
    near = dict(rtol=unit, atol=unit / 2 * want[1].abs().max().item()) if dtype == BF16 else dict(rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(got[1], want[1], **near)


@every_sum
def test_on_the_reference(name):
    rows = left_out(batch(4, 23))
    with only("reference"):
        got = results(SUMS[name], rows)
    torch.testing.assert_close(got, results(SUMS[name], rows, one_by_one=True), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ONE_LAUNCH)
def test_spoilt_and_flat_rows(name):
    rows = batch(5, 40, s_dtype=F32)
    s, t = rows.s.clone(), rows.t.clone()
    s[0, 3], t[1, 4], s[2] = torch.nan, torch.inf, 1.5
    for part in (slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 5)):
        some = rows._replace(s=s[part], t=t[part], y=rows.y[part])
        got, want = results(SUMS[name], some), results(SUMS[name], some, one_by_one=True)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7, equal_nan=True)


def test_the_gradient_again_and_multiplied():
    rows = batch(4, 300, s_dtype=BF16)
    for by in (2.0, 3.0):
        want = results(SUMS["both"], rows, one_by_one=True, by=by)[1]
        torch.testing.assert_close(results(SUMS["both"], rows, by=by)[1], want, rtol=0.04, atol=1e-5)
    s = rows.s.float().requires_grad_()
    value = added(SUMS["whole rows"])(s, rows.t, rows.y)
    first, second = (torch.autograd.grad(value, s, retain_graph=True)[0] for _ in "ab")
    assert torch.equal(first, second)
    (again,) = torch.autograd.grad(value, s, torch.tensor(3.0), create_graph=True)
    torch.testing.assert_close(again, 3 * first)


def test_logits_of_any_strides_and_a_gradient_in_a_buffer():
    rows, loss = batch(6, 50), added(SUMS["both"])
    value, gradient = results(SUMS["both"], rows)
    for s, t in ((rows.s.view(2, 3, 50), rows.t.view(2, 3, 50)), (rows.s.T.contiguous().T, rows.t)):
        y, out = rows.y.view(s.shape[:-1]), torch.ones_like(s)
        got = loss.value_and_grad(s, t, y, out=out, accumulate=True)
        assert got[1] is out
        torch.testing.assert_close((got[0], out.reshape(6, 50) - 1), (value, gradient))
        torch.testing.assert_close(loss.value_and_grad(s, t, y)[1].reshape(6, 50), gradient)


@pytest.mark.parametrize("name", ["both", "three families"])
def test_where_no_gradient_can_be_made_at_once(name):
    rows, terms = batch(4, 23), SUMS[name]
    want = results(terms, rows)[0]
    with torch.no_grad():
        torch.testing.assert_close(added(terms)(*rows), want)
    halves = batch(4, 300, s_dtype=F16)
    pair = (results(terms, halves, one_by_one=way)[1] for way in (False, True))
    torch.testing.assert_close(*pair, rtol=0.01, atol=1e-4)
    t = rows.t.clone().requires_grad_()
    (KL + kd.PearsonLoss())(rows.s, t).backward()
    kinds = [type(loss)(reduction="none") for loss in (kd.ForwardKLLoss(), kd.PearsonLoss(), kd.SpearmanLoss())]
    each = (kinds[0] + 2 * kinds[1] + kinds[2])(*rows)
    torch.testing.assert_close(each, kinds[0](*rows) + 2 * kinds[1](*rows) + kinds[2](*rows))
    other = rows.t.clone().requires_grad_()
    (KL(rows.s, other) + kd.PearsonLoss()(rows.s, other)).backward()
    torch.testing.assert_close(t.grad, other.grad)


def test_temperature_of_a_call():
    rows, terms = batch(4, 60), [(1, kd.ForwardKLLoss(t_squared=True)), (1, kd.PearsonLoss("probs", t_squared=True))]
    for temperature in (2.5, torch.tensor([1.0, 2.0, 0.5, 3.0])):
        want = results(terms, rows, one_by_one=True, temperature=temperature)
        torch.testing.assert_close(results(terms, rows, temperature=temperature), want)


def test_terms_may_change_and_stand_in_a_linear_loss():
    rows, rank = batch(6, 23), kd.SpearmanLoss(top_k=4)
    loss = kd.ForwardKLLoss() + 0.5 * rank
    loss.terms[0].temperature, rank.top_k = 3.0, None
    want = kd.ForwardKLLoss(temperature=3.0)(*rows) + 0.5 * kd.SpearmanLoss()(*rows)
    torch.testing.assert_close(loss(*rows), want)
    s = rows.s.clone().requires_grad_()
    loss(s, rows.t, rows.y).backward()
    hidden, eye = rows.s.clone().requires_grad_(), torch.eye(23, dtype=F64)
    value = kd.LinearLoss(loss, chunk=2)(hidden, eye, rows.t, eye, rows.y)
    value.backward()
    torch.testing.assert_close((value, hidden.grad), (want, s.grad))


def test_nested_and_refused():
    a, b = kd.ForwardKLLoss(), kd.PearsonLoss()
    loss = 0.5 * (a + 2 * (b + kd.ReverseKLLoss())) + b
    assert type(loss) is kd.MixedSumLoss and loss.weights == (0.5, 1.0, 1.0, 1)
    assert type(sum([a, kd.ReverseKLLoss()])) is kd.SumLoss and sum([b]) is b
    assert not (a + kd.DISTLoss()).rowwise
    for make, kind, message in (
        (lambda: b + 1.0, TypeError, "a sum takes losses, got float"),
        (lambda: b * True, TypeError, "multiplied by a number, got bool"),
        (lambda: a + kd.PearsonLoss(reduction="sum"), ValueError, "the same reduction, got \\['mean', 'sum'\\]"),
        (lambda: a + kd.PearsonLoss(ignore_index=0), ValueError, "the same ignore_index"),
        (lambda: kd.MixedSumLoss([]), ValueError, "a sum of losses needs a term"),
        (lambda: loss.minimizer(torch.zeros(2, 3)), NotImplementedError, "compromise"),
        (lambda: loss(torch.zeros(2, 3)), ValueError, "needs teacher_logits"),
    ):
        with pytest.raises(kind, match=message):
            make()


@pytest.mark.parametrize("others", [[kd.SpearmanLoss()], [kd.PearsonLoss("probs"), kd.ReverseKLLoss()], [KL, KL]])
def test_coefficients_of_each_row_in_a_linear_loss(others):
    rows, eye = batch(5, 23), torch.eye(23, dtype=F64)
    first = kd.AlphaBetaLoss(torch.linspace(0.2, 1.0, 5), 0.2)
    loss = sum(others, first)
    hidden = rows.s.clone().requires_grad_()
    for _ in "ab":
        got = kd.LinearLoss(loss, chunk=2)(hidden, eye, rows.t, eye)
        (slope,) = torch.autograd.grad(got, hidden)
        want = results([(1, x) for x in (first, *others)], rows._replace(y=None), one_by_one=True)
        torch.testing.assert_close((got.detach(), slope), want)
        first.alpha = torch.linspace(1.0, 2.0, 5)


@pytest.mark.parametrize("reduction, dtype", [("none", F64), ("mean", F16), ("mean", F64)], ids=str)
@pytest.mark.parametrize("also", [None, kd.ForwardKLLoss, "sparse"])
def test_random_shifts_are_drawn_once_a_linear_call(also, reduction, dtype):
    """The whole rows' loss draws once, and the backward that makes its chunks again must not see other pairs."""
    rows, eye = batch(5, 23), torch.eye(23, dtype=dtype)
    loss = kd.KendallLoss("shifts", shifts=2, tau=1.0, reduction=reduction)
    loss = loss + also(reduction=reduction) if isinstance(also, type) else loss
    s, t = (x.to(dtype) for x in (rows.s, rows.t))
    t = kd.SparseTeacher.from_logits(t, 12, tail="renormalise") if also == "sparse" else t
    found = []
    for run in (loss, lambda s, t: kd.LinearLoss(loss, chunk=2)(s, eye, teacher_logits=t)):
        torch.manual_seed(3)
        leaf = s.clone().requires_grad_()
        value = run(leaf, t)
        for _ in "ab":
            leaf.grad = None
            (4 * value.sum()).backward(retain_graph=True)
        found.append((value.detach(), leaf.grad))
    near = dict(rtol=0.01, atol=0.002) if dtype == F16 else {}
    torch.testing.assert_close(*found, **near)
