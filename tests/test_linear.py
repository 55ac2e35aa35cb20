"""LinearLoss: chunks are the whole, in value and gradients, in less memory; and what it refuses."""

import copy
import gc
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import pytest
import textbook_ranks
import torch
import torch.distributed.fsdp
import torch.nn.functional as F
from accuracy import BF16, F16, F32, F64, SAMPLE, Jeffreys, SquaredDistance, has_kernels, make, only, rms
from allocations import Widest, allocations
from textbook import CASES
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import kdkernels as kd
from kdkernels.sweep import Inputs

EVERYWHERE = [(b, case) for b in ("reference", "cpu") for case in CASES if has_kernels(case, b)]
everywhere = pytest.mark.parametrize("backend, case", EVERYWHERE, ids=str)
NATIVE = pytest.mark.parametrize("backend", ["reference", "cpu"])
N, H, H2, V = 13, 6, 5, 19
OPTIONS = dict(student_logit_scale=0.7, teacher_logit_scale=1.6, student_softcap=3.0, teacher_softcap=4.0)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On small products, threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Batch(NamedTuple):
    hidden: Tensor
    head: Tensor
    bias: Tensor | None
    t_hidden: Tensor
    t_head: Tensor
    t_bias: Tensor | None
    labels: Tensor

    def leaves(self):
        """The student's, to be differentiated."""
        own = (None if x is None else x.detach().clone().requires_grad_() for x in self[:3])
        return self._replace(hidden=next(own), head=next(own), bias=next(own))

    def to(self, dtype):
        return self._replace(**{n: x.to(dtype) for n, x in self._asdict().items() if n != "labels" and x is not None})

    def plain(self, hidden, head, bias, options):
        """The student's and the teacher's logits, whole."""
        for side, h, w, b in (("student", hidden, head, bias), ("teacher", self.t_hidden, self.t_head, self.t_bias)):
            logits, cap = F.linear(h, w, b) * options.get(f"{side}_logit_scale", 1), options.get(f"{side}_softcap")
            yield logits if cap is None else cap * torch.tanh(logits / cap)


def batch(dtype=F64, n=N, v=V, v2=None, seed=0, lead=()) -> Batch:
    g = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(*shape, generator=g, dtype=F64)  # noqa: E731
    y = torch.randint(v, (*lead, n), generator=g)
    y[..., 2:5] = -100
    v2 = v2 or v
    return Batch(new(*lead, n, H), new(v, H), new(v), new(*lead, n, H2), new(v2, H2), new(v2), y).to(dtype)


def fused(loss, x: Batch, call=None, weight=None, **options):
    """Value and the gradients of hidden, head and bias, from hidden states."""
    x, call = x.leaves(), call or {}
    teacher = dict(teacher_bias=x.t_bias) if "teacher_logits" not in call else {}
    hidden = (None, None) if "teacher_logits" in call else (x.t_hidden, x.t_head)
    value = kd.LinearLoss(loss, **options)(x.hidden, x.head, *hidden, x.labels, student_bias=x.bias, **teacher, **call)
    value.backward(torch.ones_like(value) if weight is None else weight)
    return value.detach(), x.hidden.grad, x.head.grad, x.bias.grad if x.bias is not None else None


def plain(loss, x: Batch, call=None, weight=None, **options):
    """The same from the loss of the whole logits."""
    x = x.leaves()
    s, t = x.plain(x.hidden, x.head, x.bias, options)
    value = loss(s, t if loss.needs_teacher else None, x.labels, **(call or {}))
    value.backward(torch.ones_like(value) if weight is None else weight)
    return value.detach(), x.hidden.grad, x.head.grad, x.bias.grad if x.bias is not None else None


def same(got, want, tolerance=1e-12):
    for name, a, b in zip(("value", "hidden", "head", "bias"), got, want, strict=True):
        if b is None:
            assert a is None, name
            continue
        assert a.dtype == b.dtype and a.shape == b.shape, name
        size = b.abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(size, 1e-3), msg=lambda m: f"{name}: {m}")  # noqa: B023


@everywhere
def test_chunks_are_the_whole(case, backend, monkeypatch):
    """For every loss, with bias, scale, soft-cap, weights and ignored rows; the textbook says so too. Two rows of a
    teacher's logits at a time."""
    monkeypatch.setattr(kd.linear, "BLOCK_CPU", 2)
    x, call = batch(), dict(row_weight=torch.linspace(0, 2, N))
    with only(backend):
        want = plain(make(case), x, call, **OPTIONS)
        for chunk in (1, 5, N, "auto"):
            same(fused(make(case), x, call, chunk=chunk, **OPTIONS), want)
    leaves = x.leaves()
    s, t = leaves.plain(*leaves[:3], OPTIONS)
    value = case.loss(s, t if case.needs_teacher else None, x.labels, **call)
    grads = torch.autograd.grad(value, leaves[:3])
    same(want, (value.detach(), *grads), 1e-11)


@NATIVE
@pytest.mark.parametrize("case", textbook_ranks.CASES, ids=str)
def test_losses_of_whole_rows(case, backend):
    """Ranks and correlations, with a cross-entropy, weights and ignored rows; and what relates rows raises."""
    x, call = batch(), dict(row_weight=torch.linspace(0, 2, N))
    for reduction, weight in (("mean", None), ("none", torch.linspace(-1, 1, N))):
        loss = getattr(kd, case.name)(**case.options, ce_weight=0.5, reduction=reduction)
        with only(backend) if case.name != "CMKDLoss" else kd.use_backend(backend):
            want = plain(loss, x, call, weight, **OPTIONS)
            for chunk in (5, "auto"):
                same(fused(loss, x, call, weight, chunk=chunk, **OPTIONS), want, 1e-11)
    with pytest.raises(ValueError, match="DISTLoss relates rows to each other"):
        kd.LinearLoss(kd.DISTLoss())


@pytest.mark.parametrize("case", [c for c in SAMPLE if c.name in ("KDLoss", "DKDLoss", "TAIDLoss")], ids=str)
def test_triton(case):
    x = batch(F32, n=4)
    with only("triton"):
        got = fused(make(case), x, chunk=3)
    same(got, plain(make(case), x), 1e-5)


OF_ONES_OWN = [Jeffreys, SquaredDistance, partial(kd.GroupedKLLoss, torch.arange(V) % 3, within=0.5),
               partial(kd.GroupedKLLoss, "label", balanced=True)]  # fmt: skip


@NATIVE
@pytest.mark.parametrize("make_it", OF_ONES_OWN, ids=["points", "separable", "groups of classes", "groups by label"])
def test_a_loss_of_ones_own(make_it, backend):
    x, call = batch(), dict(row_weight=torch.linspace(0, 2, N))
    for reduction, weight in (("mean", None), ("none", torch.linspace(-1, 1, N))):
        loss = make_it(temperature=2.0, ce_weight=0.5, reduction=reduction)
        with only(backend):
            want = plain(loss, x, call, weight, **OPTIONS)
            for chunk in (1, 4, "auto"):
                same(fused(loss, x, call, weight, chunk=chunk, **OPTIONS), want)


class PerRow(kd.Loss):
    """A point for each row."""

    def points(self):
        return kd.Point(student=1), kd.Point(teacher=torch.linspace(0.5, 2, N, dtype=F64))

    def value(self, q, p):
        return q.lse + p.lse - p.s


@NATIVE
def test_points_of_each_row_are_cut_with_the_rows(backend):
    with only(backend):
        same(fused(PerRow(), batch(), chunk=4), plain(PerRow(), batch()))
        with pytest.raises(ValueError, match="13 rows of point coefficients, student_hidden 26"):
            fused(PerRow(), batch(n=2 * N), chunk=N)


CALLS = [
    ("mean", {}),
    ("mean", dict(num_items=7)),
    ("mean", dict(num_items=torch.tensor(7.0))),
    ("sum", {}),
    ("batchmean", {}),
    ("none", {}),
    ("mean", dict(temperature=3.0)),
    ("mean", dict(temperature=torch.tensor(3.0))),
]


@NATIVE
@pytest.mark.parametrize("reduction, call", CALLS, ids=str)
@pytest.mark.parametrize("name", ["KDLoss", "DKDLoss"])
def test_reductions(name, reduction, call, backend):
    """The denominator is that of all chunks; rows of any leading shape, weights and temperatures of each."""
    x, loss = batch(lead=(2,)), getattr(kd, name)(reduction=reduction)
    rows = torch.linspace(0.5, 2, 2 * N, dtype=F64).view(2, N)
    weight = rows.flip(0) if reduction == "none" else torch.tensor(1 / 3, dtype=F64)
    for more in (dict(row_weight=rows), dict(temperature=rows)):
        given = more | call
        with only(backend):
            got, want = (f(loss, x, given, weight, **o) for f, o in ((fused, dict(chunk=7)), (plain, {})))
        same(got, want)


@NATIVE
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "none"])
def test_a_single_row(reduction, backend):
    x, loss = batch(), kd.KDLoss(reduction=reduction)
    one = x._replace(hidden=x.hidden[0], t_hidden=x.t_hidden[0], labels=x.labels[0])
    with only(backend):
        same(fused(loss, one), plain(loss, one))


@NATIVE
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("junk", [math.nan, math.inf, 1e300])
def test_rows_that_do_not_count_do_not_poison(junk, reduction, backend):
    """Ignored, or of weight 0: their hidden states' gradient is 0, and the head's is that of the other rows."""
    x, loss = batch(), kd.KDLoss(reduction=reduction)
    weight = torch.ones(N, dtype=F64)
    weight[7] = 0
    kept = [i for i in range(N) if i not in (2, 3, 4, 7)]
    bad = x._replace(hidden=x.hidden.clone(), t_hidden=x.t_hidden.clone())
    bad.hidden[[2, 3, 4, 7]] = junk
    bad.t_hidden[[2, 3, 4, 7]] = junk
    few = x._replace(hidden=x.hidden[kept], t_hidden=x.t_hidden[kept], labels=x.labels[kept])
    mean = reduction == "mean"
    items = dict(num_items=10) if mean else {}
    with only(backend):
        for chunk in (1, 4, N):
            value, hidden, *rest = fused(loss, bad, dict(row_weight=weight), chunk=chunk)
            want, want_hidden, *want_rest = fused(loss, few, items, chunk=N)
            assert (hidden[[2, 3, 4, 7]] == 0).all() and (mean or (value[[2, 3, 4, 7]] == 0).all())
            same((value if mean else value[kept], hidden[kept], *rest), (want, want_hidden, *want_rest))


@NATIVE
@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean", "none"])
def test_no_rows(reduction, backend):
    """N = 0, or no row kept: value 0, gradients of zeros, of head and bias as well."""
    nobody = batch()
    for x in (batch(n=0), nobody._replace(labels=torch.full((N,), -100), hidden=nobody.hidden * math.nan)):
        with kd.use_backend(backend):
            value, *grads = fused(kd.ForwardKLLoss(reduction=reduction), x, chunk=4)
        assert value.shape == (x.labels.shape if reduction == "none" else ()) and (value == 0).all()
        for grad, like in zip(grads, x[:3], strict=True):
            assert grad.shape == like.shape and (grad == 0).all()


@everywhere
def test_padded_vocabularies(case, backend):
    """Rows of the heads past vocab_size are not read, whatever they hold, and have gradient 0."""
    x = batch(v=V - 4)
    junk = lambda w, k: torch.cat([w, w.new_full((k, *w.shape[1:]), math.nan)])  # noqa: E731
    padded = x._replace(head=junk(x.head, 4), bias=junk(x.bias, 4), t_head=junk(x.t_head, 7), t_bias=junk(x.t_bias, 7))
    with only(backend):
        value, hidden, head, bias = fused(make(case), padded, dict(vocab_size=V - 4), chunk=4)
        same((value, hidden, head[: V - 4], bias[: V - 4]), fused(make(case), x, chunk=4))
    assert (head[V - 4 :] == 0).all() and (bias[V - 4 :] == 0).all()


@NATIVE
def test_masked_classes(backend):
    call = dict(vocab_mask=torch.arange(V) % 5 != 3)
    x = batch()
    x = x._replace(labels=torch.where(call["vocab_mask"][x.labels.clamp(min=0)], x.labels, -100))
    with only(backend):
        same(fused(kd.KDLoss(), x, call, chunk=4), plain(kd.KDLoss(), x, call))


@NATIVE
def test_teacher_logits_in_place_of_hidden_states(backend):
    x = batch()
    logits = dict(teacher_logits=F.linear(x.t_hidden, x.t_head, x.t_bias))
    with only(backend):
        for call in ({}, dict(vocab_size=V - 2)):
            x = x._replace(labels=x.labels.clamp(max=V - 3))
            same(fused(kd.KDLoss(), x, logits | call, chunk=4), plain(kd.KDLoss(), x, call))
        alone = x._replace(t_hidden=None, t_head=None, t_bias=None)
        same(fused(kd.BrierLoss(), alone, chunk=4), plain(kd.BrierLoss(), x))


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "spread"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_sparse_teacher_in_place_of_hidden_states(tail, reduction):
    class Mixtures(kd.Loss):
        """-log sum_i p_i^a q_i^(1-a), a of each row."""

        def points(self):
            a = torch.linspace(0.1, 0.9, 15, dtype=F64)
            return kd.Point(student=1), kd.Point(teacher=1), kd.Point(student=1 - a, teacher=a)

        def value(self, q, p, m):
            return (q.lse + p.lse) / 2 - m.lse

    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(3, 5, 4, generator=g, dtype=F64), torch.randn(40, 4, generator=g, dtype=F64)
    t, T = torch.randn(3, 5, 40, generator=g, dtype=F64), torch.rand(3, 5, generator=g, dtype=F64) + 0.5
    sparse = kd.SparseTeacher.from_logits(t, 6, tail=tail)
    y = sparse.indices[..., 2].clone()
    y[1, 2] = -100
    for loss in (kd.DKDLoss(teacher_temperature=1.0, ce_weight=0.5, reduction=reduction),
                 Mixtures(teacher_temperature=1.0, reduction=reduction)):  # fmt: skip
        found = []
        for chunk in (None, 4):
            leaves = hidden.clone().requires_grad_(), head.clone().requires_grad_()
            if chunk is None:
                value = loss(leaves[0] @ leaves[1].T, sparse, y, temperature=T)
            else:
                value = kd.LinearLoss(loss, chunk)(*leaves, labels=y, teacher_logits=sparse, temperature=T)
            found.append((value, *torch.autograd.grad(value.sum(), leaves)))
        for got, want in zip(found[1], found[0], strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="SparseTeacher must have the rows"):
        kd.LinearLoss(loss)(hidden[:2], head, teacher_logits=sparse)


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_teacher_of_another_vocabulary(tail, reduction):
    """From its own head, wider than its vocabulary, or from its logits."""
    x, places = batch(v2=V + 6), torch.full((V - 2,), -1)
    places[::2] = torch.randperm(V + 4, generator=torch.Generator().manual_seed(0))[: len(places[::2])]
    shared = kd.SharedVocab(places, V + 4, tail=tail)
    mask, weight = torch.arange(V) != 4, torch.linspace(0.5, 2.0, N)
    x = x._replace(labels=torch.where(x.labels >= 0, x.labels % 4, x.labels))
    for loss in (kd.KDLoss(temperature=1.5, reduction=reduction), kd.JSDLoss(ce_weight=0.2, reduction=reduction),
                 kd.ForwardKLLoss(reduction=reduction) + 0.3 * kd.CrossEntropyLoss(reduction=reduction)):  # fmt: skip
        for size in (None, V - 1):
            call = dict(row_weight=weight, vocab_mask=mask, vocab_size=size)
            y = x.leaves()
            s, t = x.plain(*y[:3], {})
            value = loss(s, shared(t), x.labels, **call)
            slope = torch.ones_like(value)
            want = value.detach(), *torch.autograd.grad(value, y[:3], slope)
            for known in ({}, dict(teacher_logits=t)):
                same(fused(loss, x, dict(shared_vocab=shared, **call, **known), chunk=4), want)
    same(fused(kd.BrierLoss(), x, dict(shared_vocab=shared)), fused(kd.BrierLoss(), x, dict(vocab_size=V - 2)))
    x, options = x._replace(t_bias=None), dict(shared_vocab=shared)
    sparse = dict(teacher_logits=kd.SparseTeacher.from_logits(t, 3))
    for error, message, call in ((TypeError, "shared_vocab must be a SharedVocab", dict(shared_vocab=places)),
                                 (ValueError, "pass teacher_logits=shared_vocab", options | sparse),
                                 (ValueError, "the 23 classes", options | dict(teacher_logits=t[:, :20])),
                                 (ValueError, "vocab_size must be >= 17", options | dict(vocab_size=9))):  # fmt: skip
        with pytest.raises(error, match=message):
            fused(kd.ForwardKLLoss(), x, call)


def test_a_tied_head_is_a_constant_in_the_teachers_place():
    x = batch()
    hidden, head = x.hidden.clone().requires_grad_(), x.head.clone().requires_grad_()
    other = torch.randn(N, H, dtype=F64)
    kd.LinearLoss(kd.ForwardKLLoss(), 4)(hidden, head, other, head).backward()
    want = torch.autograd.grad(kd.ForwardKLLoss()(hidden @ head.T, other @ head.T.detach()), (hidden, head))
    same((hidden.grad, hidden.grad, head.grad, None), (want[0], *want, None))


class Count(torch.utils._python_dispatch.TorchDispatchMode):
    """How many products there were."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_is_not_wanted_is_not_computed(reduction):
    """Four products a chunk with all gradients, one less with a frozen head or hidden states, two in a forward."""
    loss, again = kd.LinearLoss(kd.KDLoss(reduction=reduction), 4), 2 if reduction == "none" else 0
    for own, products in [("hidden head", 4), ("hidden", 3), ("head", 3), ("", 2)]:
        x, counter = batch(F32, n=16), Count()
        hidden, head = x.hidden.requires_grad_("hidden" in own), x.head.requires_grad_("head" in own)
        with counter:
            value = loss(hidden, head, x.t_hidden, x.t_head, x.labels)
            if own:
                value.sum().backward()
        assert counter.count == 4 * (products + (again if own else 0)), own
        assert (hidden.grad is not None) == ("hidden" in own) and (head.grad is not None) == ("head" in own)
        counter = Count()
        with torch.no_grad(), counter:
            quiet = loss(hidden, head, x.t_hidden, x.t_head, x.labels)
        assert counter.count == 8 and not quiet.requires_grad
        torch.testing.assert_close(quiet, value.detach())
        with torch.inference_mode():
            torch.testing.assert_close(loss(hidden, head, x.t_hidden, x.t_head, x.labels).clone(), value.detach())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
def test_backward_again(dtype, reduction):
    """A retained graph gives the same again, an incoming gradient scales it, .grad adds up, nothing is overwritten."""
    x = batch(dtype).leaves()
    loss = kd.LinearLoss(kd.KDLoss(reduction=reduction), 4)
    value = loss(x.hidden, x.head, x.t_hidden, x.t_head, x.labels, student_bias=x.bias, teacher_bias=x.t_bias)
    one = torch.ones_like(value)
    ask = lambda g, **kw: torch.autograd.grad(value, x[:3], g, retain_graph=True, **kw)  # noqa: E731
    first = ask(one)
    kept = [g.clone() for g in first]
    again, scaled, zero, linked = ask(one), ask(4 * one), ask(0 * one), ask(one, create_graph=True)
    for a, b, c, d, e, f in zip(first, kept, again, scaled, zero, linked, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c) and torch.equal(4 * a, d) and (e == 0).all()
        assert torch.equal(a, f) and f.requires_grad
    with pytest.raises(NotImplementedError, match="LinearLoss is not itself differentiable"):
        linked[0].sum().backward()
    for _ in range(2):
        (loss(x.hidden, x.head, x.t_hidden, x.t_head, x.labels, student_bias=x.bias, teacher_bias=x.t_bias).sum()
         / 2).backward()  # fmt: skip
    for leaf, a in zip(x[:3], first, strict=True):
        torch.testing.assert_close(leaf.grad, a, rtol=4 * torch.finfo(dtype).eps, atol=1e-5 if dtype == F16 else 1e-7)


def test_options_are_those_of_the_forward():
    """The loss may be annealed, and another backend chosen, between forward and backward."""
    x, loss = batch()._replace(bias=None, t_bias=None), kd.TAIDLoss(tau=0.4, reduction="none")
    y = x.leaves()
    with kd.use_backend("reference"):
        value = kd.LinearLoss(loss, 4)(y.hidden, y.head, y.t_hidden, y.t_head, y.labels)
    loss.tau = 0.9
    with only("reference"), kd.use_backend("cpu"):
        value.sum().backward()
    same((value.detach(), y.hidden.grad, y.head.grad, None), plain(kd.TAIDLoss(tau=0.4, reduction="none"), x))


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("chunk", [256, 64, 7])
def test_narrow_dtypes_are_as_accurate_as_the_plain_computation(dtype, chunk):
    """Against float64 on the same numbers; the bar is torch's own F.linear and float32 log-softmax."""
    for scale, seed in ((1.0, 0), (1.0, 1), (0.25, 2), (1 / 3, 3)):
        x = batch(dtype, n=256, v=400, seed=seed)
        incoming = torch.tensor(scale)

        def eager(dtype, x=x, incoming=incoming):
            y = x.to(dtype).leaves()
            s, t = (z if dtype == F64 else z.float() for z in y.plain(*y[:3], {}))
            rows = (t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))).sum(-1)
            value = rows[y.labels != -100].mean()
            return value.detach(), *torch.autograd.grad(value, y[:3], incoming.to(value.dtype))

        got, truth, own = fused(kd.ForwardKLLoss(), x, weight=incoming, chunk=chunk), eager(F64), eager(dtype)
        for name, a, b, c in zip(("value", "hidden", "head", "bias"), got, truth, own, strict=True):
            assert a.dtype == c.dtype
            # An RMS over n numbers is known to one in sqrt(2 n). A chunk's part of a sum is rounded before it is added,
            # and a factor that is no power of two rounds once more.
            bar = rms(c - b) * (1 + 3 / math.sqrt(b.numel())) + 4 * torch.finfo(F32).eps * rms(b)
            rounds = (chunk < 256 and name in ("head", "bias")) + (scale == 1 / 3)
            again = math.sqrt(rounds / 3) * torch.finfo(dtype).eps / 2 * rms(b)
            assert rms(a - b) <= math.hypot(bar, again), f"{name}: {rms(a - b):.3e} > {bar:.3e} + {again:.3e}"


def test_many_chunks_add_up_in_float32():
    """256 chunks of bfloat16: no worse than one, where adding them in bfloat16 loses digits."""
    x = batch(BF16, n=1024, v=50)._replace(labels=None)
    truth, whole, parts = (fused(kd.ForwardKLLoss(), y, chunk=c)[2:] for y, c in ((x.to(F64), 1024), (x, 1024), (x, 4)))
    for a, b, c in zip(truth, whole, parts, strict=True):
        assert rms(c - a) <= 1.2 * rms(b - a)


def test_half_gradients_survive_the_scale_of_a_grad_scaler():
    x = batch(F16, n=256, v=500)
    got = fused(kd.ForwardKLLoss(), x, weight=torch.tensor(65536.0), chunk=50)
    want = fused(kd.ForwardKLLoss(), x.to(F64), weight=torch.tensor(65536.0, dtype=F64), chunk=50)
    for a, b in zip(got[1:], want[1:], strict=True):
        assert rms(a - b) <= 0.02 * rms(b)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_autocast(dtype):
    """The dtypes and the error of F.linear under autocast; gradients in the parameters' dtype."""
    x = batch(F32, n=64, v=100)
    truth = plain(kd.KDLoss(), x.to(F64))
    with torch.autocast("cpu", dtype):
        got, own = fused(kd.KDLoss(), x, chunk=20), plain(kd.KDLoss(), x)
    for a, b, c in zip(got, truth, own, strict=True):
        assert a.dtype == c.dtype == F32
        assert rms(a - b) <= 1.2 * rms(c - b) + 1e-6 * rms(b)
    double = batch()
    with torch.autocast("cpu", dtype):
        same(fused(kd.KDLoss(), double, chunk=4), plain(kd.KDLoss(), double))


COMPILED = [  # loss, dtype, options, autocast
    (kd.KDLoss(), F64, dict(chunk=4, **OPTIONS), None),
    (kd.ForwardKLLoss(standardize=True, ce_weight=0.5), BF16, dict(chunk=4), None),
    (kd.GroupedKLLoss() + kd.SpearmanLoss(), F32, {}, BF16),
]


@pytest.mark.parametrize("loss, dtype, options, cast", COMPILED, ids=lambda x: type(x).__name__)
def test_in_a_compiled_graph(loss, dtype, options, cast):
    """One graph with the model around it; it looks at the rows of a call only, and at numbers, when it runs."""
    torch._dynamo.reset()
    x, linear, counter = batch(dtype), kd.LinearLoss(loss, **options), CompileCounterWithBackend("aot_eager")

    def step(hidden, head, bias, t_hidden, labels, **call):
        return 2 * linear(hidden.tanh(), head * 1.5, t_hidden, x.t_head, labels, student_bias=bias, **call)

    for rows, number in ((N, 4.0), (7, 6.0), (9, 6.5), (5, 3.0)):
        call, results = dict(num_items=number, temperature=number), []
        for function in (step, torch.compile(step, backend=counter, fullgraph=True)):
            y = x.leaves()
            with torch.autocast("cpu", cast, enabled=cast is not None):
                value = function(y.hidden[:rows], *y[1:3], x.t_hidden[:rows], x.labels[:rows], **call)
            value.backward()
            results.append((value.detach(), *(leaf.grad for leaf in y[:3])))
        same(*results, {F64: 1e-12, F32: 1e-6, BF16: 2e-2}[cast or dtype])
    assert counter.frame_count <= 2


def test_its_operator_is_checked():
    x, linear, y = batch(F32), kd.LinearLoss(kd.KDLoss(temperature=2.0)), None
    factor = torch.full((1,), 1 / N, dtype=F64)
    inputs = Inputs(x.hidden, x.head, y, x.t_hidden, x.t_head, y, y, y, x.labels, factor, y, y)
    for wants in ((True, True, False), (False, False, False)):
        given = (linear._name, V, None, list(wants), *inputs)
        torch.library.opcheck(torch.ops.kdkernels.linear.default, given, test_utils=("test_schema", "test_faketensor"))


def test_what_compiles_with_a_graph_break():
    """Where the gradient has to know the incoming one, and where the teacher is no tensor; a wrong call says why."""
    torch._dynamo.reset()
    x, sparse = batch(F32), kd.SparseTeacher.from_logits(torch.eye(N, V), 3)

    def step(linear, hidden, **teacher):
        return linear(hidden.tanh(), x.head, labels=x.labels, **teacher).sum()

    hidden = dict(teacher_hidden=x.t_hidden, teacher_head=x.t_head)
    for reduction, teacher in (("none", hidden), ("mean", dict(teacher_logits=sparse))):
        linear, results = kd.LinearLoss(kd.ForwardKLLoss(reduction=reduction), 4), []
        for function in (step, torch.compile(step, backend="eager")):
            leaf = x.hidden.clone().requires_grad_()
            function(linear, leaf, **teacher).backward()
            results.append(leaf.grad)
        torch.testing.assert_close(*results)
    linear = kd.LinearLoss(kd.ForwardKLLoss())
    for error, bad in (("teacher_head requires grad", dict(hidden, teacher_head=x.t_head.clone().requires_grad_())),
                       ("must have shape", dict(hidden, teacher_head=x.t_head[:, 1:]))):  # fmt: skip
        with pytest.raises(ValueError, match=error):
            torch.compile(step, backend="eager")(linear, x.hidden, **bad)
    torch._dynamo.reset()  # frames that raised are not traced again
    wrong = x.labels.clamp(min=0) + V
    with pytest.raises(ValueError, match=r"labels must be in \[0, 19\)"):
        torch.compile(linear, backend="aot_eager", fullgraph=True)(x.hidden, x.head, x.t_hidden, x.t_head, wrong)


@pytest.mark.parametrize("dtype", [F64, BF16])
def test_micro_batches_accumulate_into_grad(dtype):
    """num_items of the whole batch as the denominator of each part: the parts' gradients add up to the whole's."""
    x = batch(dtype)
    whole, parts, linear = x.leaves(), x.leaves(), kd.LinearLoss(kd.KDLoss(), 4)
    items = int((x.labels >= 0).sum())
    value = linear(whole.hidden, whole.head, x.t_hidden, x.t_head, x.labels, student_bias=whole.bias)
    value.backward()
    values = []
    for at in (slice(0, 5), slice(5, N)):
        part = linear(parts.hidden[at], parts.head, x.t_hidden[at], x.t_head, x.labels[at], student_bias=parts.bias,
                      num_items=items)  # fmt: skip
        part.backward()
        values.append(part.detach())
    got, want = ((v, *(y.grad for y in z[:3])) for v, z in ((sum(values), parts), (value.detach(), whole)))
    for a, b in zip(got, want, strict=True):
        assert rms(a - b) <= 2 * torch.finfo(dtype if a.dim() else F32).eps * rms(b)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = torch.nn.Linear(H, H), torch.nn.Linear(H, V, bias=False)
        self.loss = kd.LinearLoss(kd.ForwardKLLoss(reduction="sum"), 3)

    def forward(self, x, t):
        return self.loss(self.body(x).tanh(), self.head.weight, teacher_logits=t)


def sharded(rank, path):
    """One of two processes: FSDP2 in the usual way, two steps, beside the whole model."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    x, t, model, whole = torch.linspace(-1, 1, 8 * H).view(8, H), torch.eye(8, V), Model(), Model()
    whole(x, t).backward()
    for module in (model.body, model):
        torch.distributed.fsdp.fully_shard(module, mesh=mesh)
    for _ in range(2):
        model.zero_grad()
        model(x[rank::2], t[rank::2]).backward()
        for a, b in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(2 * a.grad.full_tensor(), b.grad, rtol=1e-5, atol=1e-6)
    with pytest.raises(TypeError, match=r"student_head is a DTensor.*student_head\.full_tensor"):
        model.loss(x, model.head.weight, teacher_logits=t)
    torch.distributed.destroy_process_group()


def test_fsdp2_needs_nothing_special(tmp_path):
    torch.multiprocessing.spawn(sharded, (tmp_path / "rendezvous",), 2)


UNITS = [lambda v, h: (), lambda v, h: (1,), lambda v, h: (v,), lambda v, h: (v, 1), lambda v, h: (v, h // 2)]


@pytest.mark.parametrize("unit", UNITS, ids=["scalar", "(1,)", "(V,)", "(V, 1)", "(V, G)"])
@pytest.mark.parametrize("quantised", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_quantised_teacher_head(quantised, unit):
    """What the dequantised head gives, whatever the size of the blocks."""
    x = batch(F32)
    x = x._replace(t_hidden=torch.randn(N, H))
    weight = (20 * torch.randn(V, H)).to(quantised)
    scale = torch.rand(unit(V, H)) / 20 + 0.01
    wide = scale if scale.dim() == 0 else scale.view(-1, 1) if scale.dim() == 1 else scale
    columns = wide.repeat_interleave(H // wide.shape[1], 1) if wide.dim() == 2 and wide.shape[1] > 1 else wide
    want = fused(kd.KDLoss(), x._replace(t_head=weight.float() * columns), chunk=4)
    quant = x._replace(t_head=weight)
    for budget in (None, 300):
        got = fused(kd.KDLoss(), quant, dict(teacher_head_scale=scale), chunk=4, memory_budget=budget)
        same(got, want, 1e-6)
    cropped = dict(vocab_size=V - 3)
    y = quant._replace(labels=x.labels.clamp(max=V - 4))
    got = fused(kd.KDLoss(), y, cropped | dict(teacher_head_scale=scale), chunk=4)
    same(got, fused(kd.KDLoss(), y._replace(t_head=weight.float() * columns), cropped, chunk=4), 1e-6)


BIG = dict(n=512, v=3000)
MEMORY = [
    ("KDLoss", {}, {}, F32),
    ("WTTMLoss", {}, {}, BF16),
    ("ForwardKLLoss", {}, {}, F16),
    ("ForwardKLLoss", dict(reduction="none"), {}, F32),
    ("ForwardKLLoss", dict(standardize=True), {}, BF16),
    ("DKDLoss", {}, OPTIONS, BF16),
]


@pytest.mark.parametrize("name, loss, options, dtype", MEMORY, ids=str)
def test_no_tensor_is_as_large_as_the_logits(name, loss, options, dtype):
    """By every allocation that torch makes, and by every tensor that an operator sees."""
    x, n, v = batch(dtype, **BIG), BIG["n"], BIG["v"]
    linear = kd.LinearLoss(getattr(kd, name)(**loss), 32, **options)

    def step(linear=linear):
        y = x.leaves()
        value = linear(y.hidden, y.head, y.t_hidden, y.t_head, y.labels, student_bias=y.bias, teacher_bias=y.t_bias)
        value.sum().backward()

    seen, widest = allocations(step), Widest()
    with widest:
        step()
    assert widest.numel == 32 * v  # student_logits of one chunk
    assert seen.largest < 2 * 32 * v * 4  # float32, and padding where a product packs what it reads
    # student, teacher, gradient; z-scores are made of float32 copies. The head and what it needs are (V, H).
    chunks, heads = 10 if "standardize" in loss else 3, v * (H + 1) * 16
    room = chunks * 32 * v * dtype.itemsize + heads + n * (H + H2) * 16 + kd.sweep.CACHED
    assert seen.peak <= room < 2 * n * v * dtype.itemsize  # the logits alone


FAMILIES = [kd.SpearmanLoss(), kd.PearsonLoss("probs"), kd.JSDLoss(), kd.AKLLoss(), kd.ULDLoss(),
            kd.GroupedKLLoss(torch.arange(3000) % 7), kd.ForwardKLLoss() + kd.SpearmanLoss(top_k=64)]  # fmt: skip


@pytest.mark.parametrize("loss", FAMILIES, ids=lambda loss: type(loss).__name__)
def test_nor_is_one_of_another_family(loss):
    x, n, v = batch(F32, **BIG), BIG["n"], BIG["v"]
    linear = kd.LinearLoss(loss, 32)

    def step():
        y = x.leaves()
        linear(y.hidden, y.head, y.t_hidden, y.t_head, y.labels).backward()

    seen, widest = allocations(step), Widest()
    with widest:
        step()
    chunks, heads = 10 if isinstance(loss, kd.AKLLoss) else 3, v * (H + 1) * 16 + n * (H + H2) * 16 + kd.sweep.CACHED
    assert widest.numel <= 32 * v and seen.largest <= 32 * v * 8
    assert seen.peak <= chunks * 32 * v * 4 + heads < 2 * n * v * 4  # AKL's share takes copies, in float64 too


@pytest.mark.parametrize("rows", [512, 2048])
def test_the_memory_does_not_grow_with_the_rows(rows):
    """Beyond the gradient of the hidden states, and it keeps to the budget; whole when all fits."""
    budget = 1 << 20
    linear = kd.LinearLoss(kd.KDLoss(), memory_budget=budget)
    x = batch(F32, n=rows, v=1000)

    def step():
        y = x.leaves()
        linear(y.hidden, y.head, x.t_hidden, x.t_head, y.labels).backward()

    fixed = 4 * (1000 * H * 3 + rows * (H * 3 + H2 + 20))
    assert allocations(step).peak <= budget + fixed < rows * 1000 * 4


def test_a_dequantised_head_is_never_whole():
    v, h = 4000, 64
    hidden, head = torch.randn(8, h), torch.randn(v, h)
    teacher, scale = torch.randint(-127, 127, (v, h), dtype=torch.int8), torch.rand(v)
    linear = kd.LinearLoss(kd.ForwardKLLoss(), memory_budget=8 * 16 * h * 4)
    with torch.no_grad():
        seen = allocations(lambda: linear(hidden, head, hidden, teacher, teacher_head_scale=scale))
    assert seen.peak < v * h  # bytes: a quarter of the head in float32


@pytest.mark.parametrize("options, room", [({}, 8), (dict(student_softcap=3.0), 12)], ids=str)
def test_the_chunk_is_what_the_budget_holds(options, room):
    """All rows if they fit: student and teacher, and a gradient where it cannot take the student's place."""
    linear = kd.LinearLoss(kd.ForwardKLLoss(), memory_budget=10 * V * room, **options)
    for rows, chunks in [(1, 1), (10, 1), (11, 2), (100, 10)]:
        x, counter = batch(F32, n=rows).leaves(), Count()
        with counter:
            linear(x.hidden, x.head, x.t_hidden, x.t_head)
        assert counter.count == 4 * chunks


class Passes(torch.utils._python_dispatch.TorchDispatchMode):
    """How many operators read or write a tensor of this many elements; views and allocations do neither."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.seen = numel, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        if any(x.numel() == self.numel for x in tensors) and not (func.is_view or "empty" in str(func)):
            self.seen.append(str(func))
        return out


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_few_rows_are_one_chunk_by_default(dtype):
    """Each head is read, and the gradient of one written, as often as in plain torch, and the products are its own."""
    n, v, h, g = 64, 32000, 1024, torch.Generator().manual_seed(0)
    hidden, head, t_hidden, t_head = (torch.randn(*shape, generator=g).to(dtype) for shape in 2 * ((n, h), (v, h)))
    own, found = (hidden.requires_grad_(), head.requires_grad_()), []

    def plain(*own):
        s, t = F.linear(*own).log_softmax(-1), F.linear(t_hidden, t_head).log_softmax(-1)
        return F.kl_div(s, t, reduction="batchmean", log_target=True)

    for function in (plain, lambda *own: kd.LinearLoss(kd.ForwardKLLoss())(*own, t_hidden, t_head)):
        passes, products = Passes(v * h), Count()
        with passes, products:
            torch.autograd.grad(function(*own), own)
        found.append((len(passes.seen), products.count))
    assert found[1] == found[0] == (4, 4), passes.seen


class Batchwise(Jeffreys):
    rowwise = False


BAD_OPTIONS = [
    (TypeError, "loss must be a kdkernels loss", lambda: kd.LinearLoss(F.kl_div)),
    (ValueError, "loss must be row-wise: Batchwise relates rows", lambda: kd.LinearLoss(Batchwise())),
    (ValueError, "chunk must be 'auto' or an int >= 1, got 0", lambda: kd.LinearLoss(Jeffreys(), 0)),
    (ValueError, "chunk must be .* got 'all'", lambda: kd.LinearLoss(Jeffreys(), "all")),
    (ValueError, "chunk must be .* got 1.5", lambda: kd.LinearLoss(Jeffreys(), 1.5)),
    (ValueError, "memory_budget must be >= 1", lambda: kd.LinearLoss(Jeffreys(), memory_budget=0)),
    (ValueError, "student_logit_scale", lambda: kd.LinearLoss(Jeffreys(), student_logit_scale=math.nan)),
    (TypeError, "teacher_logit_scale", lambda: kd.LinearLoss(Jeffreys(), teacher_logit_scale="1")),
    (ValueError, "student_softcap must be > 0", lambda: kd.LinearLoss(Jeffreys(), student_softcap=0.0)),
    (TypeError, "teacher_softcap", lambda: kd.LinearLoss(Jeffreys(), teacher_softcap=True)),
]


@pytest.mark.parametrize("error, message, make_it", BAD_OPTIONS, ids=[m for _, m, _ in BAD_OPTIONS])
def test_a_wrong_option_is_named(error, message, make_it):
    with pytest.raises(error, match=message):
        make_it()


INT8, X = torch.zeros(V, H2, dtype=torch.int8), batch(F32)
GRAD = X.t_hidden.clone().requires_grad_()
BAD_CALLS = [  # error, what its message has to name, the arguments in place of right ones
    (TypeError, "student_hidden must be a tensor, got list", dict(student_hidden=[1.0])),
    (TypeError, "student_hidden must be float64.* got torch.int64", dict(student_hidden=torch.ones(N, H).long())),
    (ValueError, r"student_hidden must have shape \(\.\.\., H\), got \(\)", dict(student_hidden=torch.tensor(1.0))),
    (ValueError, r"student_head must have shape \(V, H\), got \(6,\)", dict(student_head=torch.ones(6))),
    (ValueError, r"student_head .*\(V, 6\) .*\(13, 6\), got \(19, 7\)", dict(student_head=torch.ones(V, 7))),
    (TypeError, "student_head must be torch.float32 like", dict(student_head=torch.ones(V, H, dtype=BF16))),
    (TypeError, "student_head must be .*float32.* got torch.int8", dict(student_head=torch.ones(V, H).to(torch.int8))),
    (TypeError, "student_head must be dense", dict(student_head=torch.ones(V, H).to_sparse())),
    (ValueError, "student_head must be on .*device cpu, got meta", dict(student_head=torch.ones(V, H, device="meta"))),
    (ValueError, r"student_bias must have shape \(19,\), got \(18,\)", dict(student_bias=torch.ones(18))),
    (TypeError, "student_bias must be .*float32", dict(student_bias=torch.ones(V, dtype=F64))),
    (ValueError, "ForwardKLLoss needs teacher_hidden and teacher_head, or", dict(teacher_hidden=None)),
    (ValueError, "ForwardKLLoss needs teacher_hidden and teacher_head, or", dict(teacher_head=None)),
    (ValueError, r"teacher_hidden .*\(13, 19\), got \(12, 19\)", dict(teacher_hidden=torch.ones(12, H2))),
    (ValueError, r"teacher_head .*\(13, 19\), got \(13, 20\)", dict(teacher_head=torch.ones(V + 1, H2))),
    (ValueError, r"teacher_head .*\(V, 5\)", dict(teacher_head=torch.ones(V, H))),
    (TypeError, "teacher_head must be torch.float32", dict(teacher_head=torch.ones(V, H2, dtype=F16))),
    (ValueError, r"teacher_bias must have shape \(19,\)", dict(teacher_bias=torch.ones(1))),
    (ValueError, "teacher_logits stand in for .* no teacher_hidden", dict(teacher_logits=torch.ones(N, V))),
    (ValueError, "teacher_logits stand in for .* no teacher_bias",
     dict(teacher_hidden=None, teacher_head=None, teacher_bias=X.t_bias, teacher_logits=torch.ones(N, V))),
    (TypeError, "student_head must be .*float32.* got torch.float8", dict(student_head=X.head.to(torch.float8_e5m2))),
    (ValueError, r"teacher_logits .*\(13, 19\), got \(13, 18\)",
     dict(teacher_hidden=None, teacher_head=None, teacher_logits=torch.ones(N, 18))),
    (TypeError, "teacher_logits", dict(teacher_hidden=None, teacher_head=None, teacher_logits=[1.0])),
    (ValueError, r"teacher_hidden requires grad.*teacher_hidden\.detach\(\)", dict(teacher_hidden=GRAD)),
    (ValueError, r"teacher_head requires grad.*teacher_head\.detach\(\)",
     dict(teacher_head=X.t_head.clone().requires_grad_())),
    (ValueError, r"teacher_bias requires grad", dict(teacher_bias=X.t_bias.clone().requires_grad_())),
    (ValueError, r"teacher_logits requires grad",
     dict(teacher_hidden=None, teacher_head=None, teacher_logits=torch.ones(N, V, requires_grad=True))),
    (ValueError, "teacher_head_scale belongs to .*int8 and no scale", dict(teacher_head=INT8)),
    (ValueError, "teacher_head_scale belongs to .*float32 and a scale", dict(teacher_head_scale=torch.ones(V))),
    (TypeError, "teacher_head_scale must be a floating", dict(teacher_head=INT8, teacher_head_scale=2)),
    (ValueError, r"teacher_head_scale .* got \(18,\)", dict(teacher_head=INT8, teacher_head_scale=torch.ones(18))),
    (ValueError, r"teacher_head_scale .* got \(19, 2\)", dict(teacher_head=INT8, teacher_head_scale=torch.ones(V, 2))),
    (ValueError, r"labels.*\(12,\)", dict(labels=torch.zeros(12, dtype=int))),
    (ValueError, "labels.*19", dict(labels=torch.full((N,), V))),
    (ValueError, r"row_weight.*\(12,\)", dict(row_weight=torch.ones(12))),
    (ValueError, "row_weight requires grad", dict(row_weight=torch.ones(N, requires_grad=True))),
    (ValueError, "num_items.*-1", dict(num_items=-1)),
    (ValueError, "temperature.*0", dict(temperature=0.0)),
    (ValueError, r"temperature.*\(12,\)", dict(temperature=torch.ones(12))),
    (ValueError, r"vocab_size must be in \[1, 19\]", dict(vocab_size=20)),
    (ValueError, r"vocab_mask.*\(18,\)", dict(vocab_mask=torch.ones(18, dtype=bool))),
]  # fmt: skip


@pytest.mark.parametrize("error, message, arguments", BAD_CALLS, ids=[m for _, m, _ in BAD_CALLS])
def test_a_wrong_call_says_which_argument(error, message, arguments):
    right = dict(student_hidden=X.hidden, student_head=X.head, teacher_hidden=X.t_hidden, teacher_head=X.t_head)
    with pytest.raises(error, match=message):
        kd.LinearLoss(kd.ForwardKLLoss(), 4)(**right | arguments)


def test_what_is_missing_is_put_down_to_the_loss():
    x = batch(F32)
    with pytest.raises(ValueError, match="DKDLoss needs labels"):
        kd.LinearLoss(kd.DKDLoss())(x.hidden, x.head, x.t_hidden, x.t_head)
    with pytest.raises(ValueError, match="num_items replaces the denominator"):
        kd.LinearLoss(kd.ForwardKLLoss(reduction="sum"))(x.hidden, x.head, x.t_hidden, x.t_head, num_items=3)


def test_a_teacher_that_gets_no_gradient_may_want_one_where_none_is_made():
    """Without a graph, and beside a loss that looks at no teacher."""
    loss, y = kd.LinearLoss(kd.ForwardKLLoss()), X.labels
    with torch.no_grad():
        loss(X.hidden, X.head, GRAD, X.t_head)
    kd.LinearLoss(kd.BrierLoss())(X.hidden, X.head, GRAD, X.t_head, y)


def value_and_grads(linear, x):
    y = x.leaves()
    value = linear(y.hidden, y.head, y.t_hidden, y.t_head, y.labels)
    return value.detach(), *torch.autograd.grad(value, (y.hidden, y.head))


def test_memory_kept_from_call_to_call():
    """It serves calls of any size and dtype, in several threads, and is no part of a copy."""
    linear = kd.LinearLoss(kd.KDLoss(), memory_budget=4096)
    inputs = [batch(dtype, n=n, v=v) for dtype, n, v in [(F64, 9, 40), (F64, 5, 30), (BF16, 40, 50), (F32, 99, 40)] * 3]
    wanted = [value_and_grads(kd.LinearLoss(kd.KDLoss(), memory_budget=4096), x) for x in inputs]
    with torch.inference_mode():
        x = inputs[0]
        assert torch.equal(linear(x.hidden, x.head, x.t_hidden, x.t_head, x.labels), wanted[0][0])
    with ThreadPoolExecutor(3) as pool:
        for got, want in zip(pool.map(lambda x: value_and_grads(linear, x), inputs * 5), wanted * 5, strict=True):
            assert all(map(torch.equal, got, want))
    del got  # it may hold the only memory for float32
    assert {"student", "teacher", "product", "head's torch.float32"} <= linear._kept.free.keys()
    assert copy.deepcopy(linear)._kept.free == {} and pickle.loads(pickle.dumps(linear))._kept.free == {}


@pytest.mark.parametrize("chunk", [N, 4])
def test_a_gradients_memory_is_kept_when_nobody_has_it_any_more(chunk):
    linear, x = kd.LinearLoss(kd.KDLoss(), chunk), batch(BF16)
    wanted = value_and_grads(kd.LinearLoss(kd.KDLoss(), chunk), x)[2]
    kept = linear._kept.free
    first = value_and_grads(linear, x)[2]
    place, row = first.data_ptr(), first[1:2]
    del first
    second = value_and_grads(linear, x)[2]  # a view of the first is still there
    assert second.data_ptr() != place and "head's torch.bfloat16" not in kept
    del row
    assert kept["head's torch.bfloat16"].data_ptr() == place
    third = value_and_grads(linear, x)[2].zero_()
    assert third.data_ptr() == place and "head's torch.bfloat16" not in kept
    del linear, kept
    gc.collect()
    assert torch.equal(second, wanted) and not third.any()


def test_a_gradient_larger_than_the_budget_is_not_kept():
    x = batch(F32)
    for budget in (x.head.nbytes - 1, x.head.nbytes):
        linear = kd.LinearLoss(kd.KDLoss(), N, memory_budget=budget)
        value_and_grads(linear, x)
        assert ("head's torch.float32" in linear._kept.free) == (budget == x.head.nbytes)


def test_a_plain_module():
    loss = kd.LinearLoss(kd.TAIDLoss(tau=0.5), 128, student_softcap=30.0)
    assert loss.state_dict() == {} and list(loss.parameters()) == []
    assert "chunk=128" in repr(loss) and "student_softcap=30.0" in repr(loss) and "tau=0.5" in repr(loss)
    assert "LinearLoss" not in kd.catalogue() and kd.Loss.rowwise
