"""Sums of losses are the sums of their values and gradients, from one read of the logits."""

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from accuracy import BACKENDS, F32, F64, Batch, batch, only
from hypothesis import given
from hypothesis import strategies as st
from textbook import forward_kl, reverse_kl

import kdkernels as kd

SUMS = {
    "shared points": [(0.7, kd.ForwardKLLoss()), (0.3, kd.ReverseKLLoss()), (1, kd.CrossEntropyLoss(0.1, 0.01))],
    "one temperature": [(2.0, kd.KDLoss(temperature=3.0)), (-0.5, kd.HellingerLoss(temperature=3.0))],
    "temperatures": [(1, kd.KDLoss(temperature=3.0, alpha=0.8)), (0.4, kd.DKDLoss(temperature=2.0, ce_weight=0.5)),
                     (0.1, kd.AlphaBetaLoss(0.0, 0.0, teacher_temperature=0.5)), (1, kd.CrossEntropyLoss())],
    "labels": [(1, kd.BrierLoss()), (0.01, kd.LogitMSELoss(temperature=2.0)), (1, kd.TAIDLoss())],
    "no teacher": [(1, kd.BrierLoss()), (0.5, kd.CrossEntropyLoss())],
    "z-scores": [(1, kd.ForwardKLLoss(standardize=True)), (0.5, kd.TAIDLoss(standardize=True, temperature=2.0)),
                 (0.5, kd.CrossEntropyLoss())],
}  # fmt: skip
SEPARABLE = {
    "jsd and kl": [(0.7, kd.ForwardKLLoss()), (0.3, kd.JSDLoss()), (1, kd.CrossEntropyLoss(label_smoothing=0.1))],
    "several": [(1, kd.JSDLoss(ce_weight=0.5)), (0.5, kd.TVDLoss(kd_weight=2.0)), (1, kd.SkewKLLoss()),
                (0.1, kd.DKDLoss())],
    "temperatures of separable": [(1, kd.ForwardKLLoss(temperature=3.0)),
                                  (2, kd.JSDLoss(temperature=2.0, teacher_temperature=0.5, t_squared=True)),
                                  (1, kd.SkewReverseKLLoss(temperature=2.0, teacher_temperature=0.5, t_squared=True))],
    "z-scores of separable": [(1, kd.TVDLoss(standardize=True)), (0.5, kd.TAIDLoss(standardize=True))],
}  # fmt: skip
SUMS |= SEPARABLE


def total(terms):
    return sum(weight * loss for weight, loss in terms)


def left_out(rows):
    return rows._replace(y=torch.where(torch.arange(len(rows.y)) == 1, -100, rows.y))


def results(loss, rows, backend, **call):
    s, t = (x.clone().requires_grad_() for x in rows[:2])
    with only(backend):
        value = loss(s, t, rows.y, **call)
        value.backward()
    return value.detach(), s.grad, t.grad


@pytest.mark.parametrize("V, ties", [(8, False), (8, True), (5000, False)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_both_divergences_of_giant_logits(backend, V, ties):
    """All weight is at the maxima: what one divergence gives a class is not lost in the other's 1e30 that cancels."""
    g = torch.Generator().manual_seed(0)
    s, t = 1e30 * torch.randn(2, 3, V, generator=g)
    if ties:
        s[0, 2] = s[0, 5] = s[0].max()
    rows = Batch(s, t, torch.zeros(3, dtype=torch.int64))
    own, other = (x.double().requires_grad_() for x in (s, t))
    exact = (forward_kl(own, other, None) + reverse_kl(own, other, None)).mean() / 2
    got = results(0.5 * kd.ForwardKLLoss() + 0.5 * kd.ReverseKLLoss(), rows, backend)
    assert abs(got[0] / exact - 1) < 1e-5
    for found, slope in zip(got[1:], torch.autograd.grad(exact, (own, other)), strict=True):
        for a, b in zip(found.double(), slope, strict=True):  # of each row: those of ties are as giant
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * b.abs().max().item())


@pytest.mark.parametrize(
    ("backend", "name"), [(b, n) for b in BACKENDS for n in SUMS if b != "cuda" or n not in SEPARABLE]
)
def test_a_sum_is_the_sum_of_its_terms(name, backend):
    dtype = F64 if backend in ("cpu", "reference") else F32
    rows, terms = left_out(batch(4, 23, 2.0, seed=1, s_dtype=dtype)), SUMS[name]
    tolerance = 1e-12 if dtype == F64 else 1e-5
    got = results(total(terms), rows, backend)
    parts = [[None if x is None else weight * x for x in results(loss, rows, backend)] for weight, loss in terms]
    for actual, *own in zip(got, *parts, strict=True):
        own = [x for x in own if x is not None]
        assert (actual is None) == (not own)
        if own:
            torch.testing.assert_close(actual, sum(own), rtol=tolerance, atol=tolerance)


def test_one_read_of_the_logits_and_each_point_once():
    loss, rows = total(SUMS["shared points"]), batch(4, 23)
    assert len(loss.all_points()) == 4  # q, p; of the cross-entropy q at temperature 1 and the counting measure
    before = Counter(kd.backends.calls)
    with only("cpu"):
        loss(rows.s.clone().requires_grad_(), rows.t, rows.y).backward()
    assert kd.backends.calls - before == {("cpu", "step"): 1}
    with only("cpu"):
        total(SEPARABLE["several"])(rows.s.clone().requires_grad_(), rows.t, rows.y).backward()
    assert (kd.backends.calls - before)["cpu", "separable_step"] == 1
    assert sum((kd.backends.calls - before).values()) == 2
    assert len((kd.ForwardKLLoss(temperature=2.0) + kd.KDLoss(temperature=1.0)).all_points()) == 4  # q at 1 serves CE


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_temperature_of_a_call(backend):
    rows = batch(4, 23)
    for temperature in (2.5, torch.tensor([1.0, 2.0, 0.5, 3.0])):
        terms = SUMS["one temperature"]
        got = results(total(terms), rows, backend, temperature=temperature)
        parts = [results(loss, rows, backend, temperature=temperature) for _, loss in terms]
        for actual, *own in zip(got, *parts, strict=True):
            torch.testing.assert_close(actual, sum(w * x for (w, _), x in zip(terms, own, strict=True)))
    with pytest.raises(ValueError, match=r"which have different ones: \[3.0, 2.0, 1.0, 1.0\]"):
        results(total(SUMS["temperatures"]), rows, backend, temperature=2.0)


def test_terms_may_change():
    rows, taid = batch(4, 23), kd.TAIDLoss(tau=0.2)
    loss = copy.deepcopy(taid) * 0.5 + taid
    first = loss(*rows)
    taid.tau, taid.kd_weight = 0.9, 2.0
    torch.testing.assert_close(loss(*rows) - first, taid(*rows) - kd.TAIDLoss(tau=0.2)(*rows))
    taid.ce_weight = 1.0
    with pytest.raises(ValueError, match="needs labels"):
        loss(rows.s, rows.t)
    taid.temperature = 2.0
    with pytest.raises(AttributeError, match="belongs to the terms of a sum"):
        loss.temperature = 2.0
    assert copy.deepcopy(loss)(*rows) == loss(*rows)
    loss.reduction = "sum"
    torch.testing.assert_close(loss(*rows) / 4, 0.5 * kd.TAIDLoss(tau=0.2)(*rows) + taid(*rows))


def test_separable_terms_that_are_not_one_sum_are_computed_one_by_one():
    class Squared(kd.SeparableLoss):
        def phi(self, log_q, log_p):
            return (kd.tape.exp(log_q) - kd.tape.exp(log_p)) ** 2

        def value(self, total):
            return kd.tape.sqrt(total)

    rows, jsd = batch(4, 23), kd.JSDLoss()
    for others in ([kd.TVDLoss(temperature=2.0)], [Squared(), kd.ForwardKLLoss()], [kd.AKLLoss()]):
        terms = [(0.5, jsd), *((1, x) for x in others)]
        assert isinstance(total(terms), kd.MixedSumLoss)
        torch.testing.assert_close(total(terms)(*rows), sum(w * x(*rows) for w, x in terms))
    alone = 0.5 * Squared() + kd.ForwardKLLoss()
    assert isinstance(alone, kd.SumLoss)
    torch.testing.assert_close(alone(*rows), 0.5 * Squared()(*rows) + kd.ForwardKLLoss()(*rows))
    loss = jsd + (tvd := kd.TVDLoss())
    tvd.temperature = 2.0
    with pytest.raises(ValueError, match="separable losses share a sum if they have the same temperature"):
        loss(*rows)
    with pytest.raises(ValueError, match="separable losses share a sum"):
        kd.SumLoss([(1, jsd), (1, tvd)])


@given(st.data())
def test_any_sum_with_separable_terms(data):
    draw = data.draw
    catalogue = [kd.JSDLoss(0.3), kd.TVDLoss(), kd.SkewKLLoss(0.2), kd.ForwardKLLoss(), kd.HellingerLoss(),
                 kd.DKDLoss(), kd.ReverseKLLoss(temperature=2.0), kd.CrossEntropyLoss(),
                 kd.SkewReverseKLLoss(0.3, ce_weight=0.2)]  # fmt: skip
    weight = st.floats(-2, 2).map(lambda x: round(x, 3))
    terms = draw(st.lists(st.tuples(weight, st.sampled_from(catalogue)), min_size=1, max_size=5))
    rows = left_out(batch(draw(st.integers(2, 4)), draw(st.integers(2, 40)), 2.0, seed=draw(st.integers(0, 99))))
    got = results(kd.SumLoss(terms), rows, "cpu")
    parts = [[0.0 if x is None else weight * x for x in results(loss, rows, "cpu")] for weight, loss in terms]
    for actual, *own in zip(got, *parts, strict=True):
        if actual is not None:
            torch.testing.assert_close(actual, sum(own) + torch.zeros_like(actual), rtol=1e-11, atol=1e-12)


def test_sums_of_sums():
    a, b, c = kd.ForwardKLLoss(), kd.ReverseKLLoss(), kd.CrossEntropyLoss()
    loss = 0.5 * (2 * a + (b + c) * 3) + a
    assert loss.weights == (1.0, 1.5, 1.5, 1) and list(loss.terms) == [a, b, c, a]
    assert sum([a]) is a and len(sum([a, b]).terms) == 2


def test_in_a_linear_loss_and_without_a_graph():
    rows, loss = batch(6, 23), total(SUMS["temperatures"])
    value, gradient = loss.value_and_grad(*rows)
    exact = results(loss, rows, "cpu")
    torch.testing.assert_close((value, gradient), exact[:2])
    eye = torch.eye(23, dtype=F64)
    torch.testing.assert_close(kd.LinearLoss(loss, chunk=2)(rows.s, eye, rows.t, eye, rows.y), value)


def test_cross_entropy_is_that_of_torch():
    rows = left_out(batch(4, 23))
    for smoothing in (0.0, 0.3):
        for reduction in ("mean", "sum", "none"):
            expected = F.cross_entropy(rows.s, rows.y, label_smoothing=smoothing, reduction=reduction)
            got = kd.CrossEntropyLoss(smoothing, reduction=reduction)(rows.s, labels=rows.y)
            torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match=r"CrossEntropyLoss .* needs labels"):
        kd.CrossEntropyLoss()(rows.s)


def test_what_makes_no_sum():
    a, b = kd.ForwardKLLoss(), kd.PearsonLoss()
    for make, kind, message in (
        (lambda: a + 1.0, TypeError, "a sum takes losses, got float"),
        (lambda: kd.SumLoss([(1, b)]), TypeError, "takes losses of the log-partition .*, got PearsonLoss"),
        (lambda: a * torch.tensor(2.0), TypeError, "multiplied by a number, got Tensor"),
        (lambda: a * True, TypeError, "multiplied by a number, got bool"),
        (lambda: a * a, TypeError, "multiplied by a number, got ForwardKLLoss"),
        (lambda: a * float("nan"), ValueError, "must be finite"),
        (lambda: a + kd.ForwardKLLoss(reduction="sum"), ValueError, "the same reduction, got \\['mean', 'sum'\\]"),
        (lambda: a + kd.ForwardKLLoss(ignore_index=0), ValueError, "the same ignore_index"),
        (lambda: a + kd.ForwardKLLoss(standardize=True), ValueError, "standardize, or none"),
        (lambda: kd.SumLoss([]), ValueError, "needs a term"),
        (lambda: (a + a).minimizer(torch.zeros(2, 3)), NotImplementedError, "compromise"),
    ):
        with pytest.raises(kind, match=message):
            make()


def test_compiled():
    taid = kd.TAIDLoss(temperature=2.0)
    loss, rows = kd.ForwardKLLoss() + 0.5 * taid, batch(4, 23)
    compiled = torch.compile(lambda s, t, y: loss(s, t, y), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*rows), loss(*rows))
