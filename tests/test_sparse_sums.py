"""Sums of losses of teachers that know some classes only: those of their terms apart."""

from collections import Counter

import pytest
import torch
from accuracy import F32, F64, batch

import kdkernels as kd

K, V = 5, 30
SUMS = {
    "cross-entropy": (kd.ForwardKLLoss(), kd.CrossEntropyLoss()),
    "Brier": (kd.ReverseKLLoss(), kd.BrierLoss()),
    "divergences": (kd.ForwardKLLoss(), 0.5 * kd.ReverseKLLoss(), kd.HellingerLoss()),
    "smoothed": (kd.ForwardKLLoss(ce_weight=0.5), 0.3 * kd.CrossEntropyLoss(0.1), kd.JSDLoss()),
    "separable": (kd.JSDLoss(), 2.0 * kd.TVDLoss(), kd.CrossEntropyLoss()),
    "temperatures": (kd.ForwardKLLoss(teacher_temperature=1.0, temperature=2.0), kd.ReverseKLLoss()),
}
MIXED = {"ranks": (kd.ForwardKLLoss(), kd.CrossEntropyLoss(), kd.SpearmanLoss()),
         "ranks with labels": (kd.BrierLoss(), kd.PearsonLoss(ce_weight=0.5))}  # fmt: skip
SHARED = torch.arange(V).where(torch.arange(V) % 3 > 0, -1)


def teachers(t, y):
    from_logits = kd.SparseTeacher.from_logits
    for tail in ("bucket", "spread", "renormalise"):
        yield f"sparse {tail}", from_logits(t, K, tail=tail, labels=y)
    yield "sparse, labels elsewhere", from_logits(t, K, tail="renormalise")
    yield "shared", kd.SharedVocab(SHARED, V)(t)
    yield "shared, renormalised", kd.SharedVocab(SHARED, V, tail="renormalise")(t)


def run(loss, s, *given, **call):
    s = s.clone().requires_grad_()
    value = loss(s, *given, **call)
    value.sum().backward()
    return value.detach(), s.grad


def apart(losses, s, *given, **call):
    values, slopes = zip(*(run(loss, s, *given, **call) for loss in losses), strict=True)
    return sum(values), sum(slopes)


def cases():
    x = batch(4, V, 2.0)
    for kind, teacher in teachers(x.t, x.y):
        for name, losses in (SUMS | (MIXED if "renormalise" in kind else {})).items():
            if name != "temperatures" or "spread" in kind or "shared" in kind or "elsewhere" in kind:
                yield f"{kind}: {name}", losses, teacher


@pytest.mark.parametrize("losses, teacher", [pytest.param(*rest, id=name) for name, *rest in cases()])
def test_a_sum_is_that_of_its_terms(losses, teacher):
    x, loss = batch(4, V, 2.0), sum(losses)
    calls = {}, dict(row_weight=torch.tensor([1.0, 0.0, 2.0, 3.0]), num_items=3)
    for call in calls:
        y = torch.where(torch.arange(4) == 2, -100, x.y)
        want = apart(losses, x.s, teacher, y, **call)
        torch.testing.assert_close(run(loss, x.s, teacher, y, **call), want)
        torch.testing.assert_close(loss.value_and_grad(x.s, teacher, y, **call), want)
    if isinstance(teacher, kd.SparseTeacher):
        eye, hidden = torch.eye(V, dtype=F64), x.s.clone().requires_grad_()
        value = kd.LinearLoss(loss, chunk=3)(hidden, eye, teacher_logits=teacher, labels=x.y)
        value.backward()
        torch.testing.assert_close((value.detach(), hidden.grad), apart(losses, x.s, teacher, x.y))


def test_the_cross_entropy_is_that_of_whole_rows():
    x = batch(4, V, 2.0)
    for tail in ("bucket", "renormalise"):
        teacher = kd.SparseTeacher.from_logits(x.t, K, tail=tail)
        kl = kd.ForwardKLLoss()(x.s, teacher)
        for loss, own in ((kd.CrossEntropyLoss(), torch.nn.functional.cross_entropy(x.s, x.y)),
                          (kd.BrierLoss(), (x.s.softmax(-1) - torch.eye(V)[x.y]).square().sum(-1).mean())):  # fmt: skip
            torch.testing.assert_close((kd.ForwardKLLoss() + loss)(x.s, teacher, x.y), kl + own)
    shared = kd.SharedVocab(SHARED[: V - 4], V)(x.t)  # the student's last classes are padding
    y = x.y % (V - 4)
    want = torch.nn.functional.cross_entropy(x.s[:, : V - 4], y)
    torch.testing.assert_close(kd.CrossEntropyLoss()(x.s, shared, y), want)
    torch.testing.assert_close((kd.ForwardKLLoss() + kd.CrossEntropyLoss())(x.s, shared, y),
                               want + kd.ForwardKLLoss()(x.s, shared))  # fmt: skip


def test_each_of_the_rows_and_terms_of_several_reductions():
    x = batch(4, V, 2.0)
    teacher = kd.SparseTeacher.from_logits(x.t, K)
    losses = kd.ForwardKLLoss(reduction="none"), kd.CrossEntropyLoss(reduction="none")
    torch.testing.assert_close(run(sum(losses), x.s, teacher, x.y), apart(losses, x.s, teacher, x.y))
    hidden, eye = x.s.clone().requires_grad_(), torch.eye(V, dtype=F64)
    value = kd.LinearLoss(sum(losses), chunk=3)(hidden, eye, teacher_logits=teacher, labels=x.y)
    value.sum().backward()
    torch.testing.assert_close((value.detach(), hidden.grad), apart(losses, x.s, teacher, x.y))
    weights = torch.linspace(0.5, 1.5, 4)
    loss = kd.AlphaBetaLoss(weights, 1 - weights) + kd.CrossEntropyLoss()
    value = kd.LinearLoss(loss, chunk=3)(hidden, eye, teacher_logits=teacher, labels=x.y)
    torch.testing.assert_close(value, apart(loss.terms, x.s, teacher, x.y)[0])


def test_terms_of_one_temperature_read_the_student_once():
    x = batch(4, 300, s_dtype=F32)
    teacher, before = kd.SparseTeacher.from_logits(x.t.float(), K), Counter(kd.backends.calls)
    (kd.ForwardKLLoss() + kd.ReverseKLLoss())(x.s, teacher)
    (kd.ForwardKLLoss())(x.s, teacher)
    made = [count for (_, name), count in (kd.backends.calls - before).items() if name == "bucket"]
    assert made == [2]


def test_what_is_refused():
    x = batch(4, V)
    loss, mixed = kd.ForwardKLLoss() + kd.CrossEntropyLoss(), kd.ForwardKLLoss() + kd.SpearmanLoss()
    sparse, shared = kd.SparseTeacher.from_logits(x.t, K), kd.SharedVocab(SHARED, V)(x.t)
    thin = kd.SparseTeacher.from_logits(x.t, K, tail="renormalise", sparse_gradient=True)
    two = kd.ForwardKLLoss(temperature=2.0, teacher_temperature=1.0) + kd.ReverseKLLoss()
    for call, message in (
        (lambda: loss(x.s, sparse), "CrossEntropyLoss.*needs labels"),
        (lambda: mixed(x.s, sparse), "SpearmanLoss compares classes one by one"),
        (lambda: two(x.s, sparse, temperature=1.0), "temperature would replace that of all terms"),
        (lambda: loss(x.s, thin, x.y), "sparse_gradient needs"),
        (lambda: loss(x.s, sparse, x.y + V), "labels must be in"),
        (lambda: kd.ForwardKLLoss().with_metrics(x.s, sparse), "with_metrics needs teacher_logits .*SparseTeacher"),
        (lambda: mixed.with_metrics(x.s, shared), "with_metrics needs teacher_logits of all classes"),
        (lambda: kd.ULDLoss().with_metrics(x.s, x.t[:, :10]), r"with_metrics needs .*\(4, 30\), got \(4, 10\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    slope = run(kd.ForwardKLLoss() + kd.ReverseKLLoss(), x.s, thin)[1]
    assert slope.is_sparse


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_groups_of_outcomes(backend):
    """The label's is DKD's, in the bucket too; one group is KL; a group for each class is none for each outcome."""
    x = batch(4, V, 2.0)
    kl, y = kd.ForwardKLLoss(), x.y.clone()
    pairs = ((kd.GroupedKLLoss("label", 0.7, 3.0, balanced=True), kd.DKDLoss(0.7, 3.0)), (kd.GroupedKLLoss(), kl),
             (kd.GroupedKLLoss("label"), kl))  # fmt: skip
    bucket = kd.SparseTeacher.from_logits(x.t, K)
    y[0] = x.t[0].argmin()  # in the bucket
    tails = [(tail, kd.SparseTeacher.from_logits(x.t, K, tail=tail, labels=y)) for tail in ("spread", "renormalise")]
    for kind, teacher in (("bucket", bucket), ("shared", kd.SharedVocab(SHARED, V)(x.t)), *tails):
        with kd.use_backend(backend):
            for one, other in pairs:
                torch.testing.assert_close(run(one, x.s, teacher, y), run(other, x.s, teacher, y))
            with pytest.raises(ValueError, match="GroupedKLLoss has a group for each class by its number"):
                kd.GroupedKLLoss(torch.arange(V) % 3)(x.s, teacher)
            if kind != "renormalise":
                with pytest.raises(ValueError, match="compares classes one by one"):
                    kd.GroupedKLLoss(lambda q, p: (q > p).long())(x.s, teacher)
