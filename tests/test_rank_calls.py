"""Rank losses as modules and operators: the call, its options and errors, autograd, torch.compile and threads."""

from collections import defaultdict

import pytest
import torch
from accuracy import BF16, F16, F32, F64, only
from test_ranks import batch, run
from textbook_ranks import CASES
from torch._dynamo.testing import CompileCounter
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels as kd

MADE = [(case.name, case.options) for case in CASES]
every_loss = pytest.mark.parametrize("name, options", MADE, ids=str)
every_loss_and_dist = pytest.mark.parametrize("name, options", [*MADE, ("DISTLoss", {})], ids=str)
Y = torch.tensor([0, 2, -100, 1, 3, -100])


def make(name, options, **more):
    return getattr(kd, name)(**{**options, **more})


def shaped(dtype=F64, V=40):
    s, t = batch(6, V, dtype)
    return s.view(2, 3, V), t.view(2, 3, V), Y.view(2, 3)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@every_loss
def test_reductions_weights_and_labels(name, options, backend):
    s, t, y = shaped()
    weight, keep = torch.rand(2, 3, dtype=F64), y != -100
    with only(backend):
        rows, slopes = run(make(name, options, reduction="none"), s, t)
        for reduction, call, factor in [
            ("mean", dict(labels=y), keep / keep.sum()),
            ("mean", dict(labels=y, row_weight=weight), keep * weight / keep.sum()),
            ("mean", dict(row_weight=weight, num_items=7), weight / 7),
            ("mean", dict(num_items=torch.tensor(5)), torch.ones(2, 3) / 5),
            ("sum", dict(labels=y), keep * 1.0),
            ("batchmean", dict(row_weight=weight), weight / 2),
            ("none", dict(labels=y, row_weight=weight), keep * weight),
        ]:
            value, gradient = run(make(name, options, reduction=reduction), s, t, **call)
            want = rows * factor if reduction == "none" else (rows * factor).sum()
            torch.testing.assert_close(value, want.to(value.dtype))
            torch.testing.assert_close(gradient, slopes * factor[..., None])
        torch.testing.assert_close(make(name, options, reduction="sum")(s[1, 2], t[1, 2]), rows[1, 2])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@every_loss
def test_rows_left_out_may_hold_anything(name, options, backend):
    s, t, y = shaped()
    want = run(make(name, options), s, t, labels=y)
    s[y == -100], t[y == -100] = torch.nan, torch.inf
    with only(backend):
        value, gradient = run(make(name, options), s, t, labels=y)
        weight = (y != -100).double()
        weighed = run(make(name, options, reduction="sum"), s, t, row_weight=weight)
    torch.testing.assert_close(value, want[0])
    torch.testing.assert_close(gradient, want[1])
    torch.testing.assert_close(weighed[0], 4 * want[0])
    assert not weighed[1].isnan().any()


@every_loss
def test_a_temperature_for_each_row(name, options):
    options = {k: v for k, v in options.items() if k != "temperature"}
    s, t, _ = shaped()
    T = torch.tensor([[0.5, 1.0, 2.0], [3.0, 4.0, 5.0]])
    for t_squared in (False, True):
        value, gradient = run(make(name, options, t_squared=t_squared, reduction="none"), s, t, temperature=T)
        for i in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
            one = make(name, options, t_squared=t_squared, temperature=T[tuple(i)].item())
            want = run(one, s[tuple(i)], t[tuple(i)])
            torch.testing.assert_close(value[tuple(i)], want[0])
            torch.testing.assert_close(gradient[tuple(i)], want[1])


@every_loss_and_dist
def test_an_added_cross_entropy(name, options):
    s, t, y = shaped()
    more = dict(ce_weight=0.3, label_smoothing=0.1, z_loss=0.01)
    value, gradient = run(make(name, options, **more), s, t, labels=y)
    alone = run(make(name, options), s, t, labels=y)
    ce = run(kd.ForwardKLLoss(kd_weight=0.0, **more), s, t, labels=y)
    torch.testing.assert_close(value, alone[0] + ce[0])
    torch.testing.assert_close(gradient, alone[1] + ce[1])
    with pytest.raises(ValueError, match=r"ce_weight=0\.3 needs labels"):
        make(name, options, ce_weight=0.3)(s, t)
    part = make(name, options, **more)
    part.kd_weight = 0.0
    torch.testing.assert_close(part(s, None, y), ce[0])
    part = make(name, options)
    part.kd_weight = 0.0  # annealed away
    assert run(part, s, t)[0] == 0


def test_strides_and_dtypes_of_their_own():
    s, t, _ = shaped(F32)
    want = run(kd.SpearmanLoss(), s, t)
    for other in (s.transpose(0, 1).contiguous().transpose(0, 1), torch.cat((s, s), -1)[..., ::2].clone()[..., :20]):
        u = t if other.shape == s.shape else t[..., :20]
        torch.testing.assert_close(run(kd.SpearmanLoss(), other, u), run(kd.SpearmanLoss(), other.contiguous(), u))
    mixed = run(kd.SpearmanLoss(), s, t.double())
    torch.testing.assert_close(mixed, want)
    for dtype in (BF16, F16):
        wide = run(kd.SpearmanLoss(), s, t.to(dtype).float())
        torch.testing.assert_close(run(kd.SpearmanLoss(), s, t.to(dtype)), wide)
    for backend in ("cpu", "reference"):
        with kd.use_backend(backend):
            for name, options in MADE:
                assert run(make(name, options), torch.empty(0, 5), torch.empty(0, 5))[0] == 0


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@every_loss
def test_gradcheck(name, options, backend):
    s, t = batch(3, 9)
    s.requires_grad_()
    t.requires_grad_(name == "PearsonLoss")
    weight = torch.tensor([0.5, 1.0, 2.0])
    with only(backend):
        for reduction in ("mean", "none"):
            loss = make(name, options, reduction=reduction)
            labels = torch.tensor([0, -100, 3])
            assert gradcheck(lambda *x: loss(*x, labels=labels, row_weight=weight), (s, t))  # noqa: B023


@every_loss_and_dist
def test_double_backward_on_reference(name, options):
    s, t = batch(2, 6)
    with kd.use_backend("reference"):
        assert gradgradcheck(lambda s: make(name, options)(s, t), (s.requires_grad_(),))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["SpearmanLoss", "PearsonLoss"])
def test_double_backward_is_refused_elsewhere(name, reduction):
    s, t = batch(2, 6)
    s.requires_grad_()
    with pytest.raises(NotImplementedError, match="reference"):
        (ds,) = torch.autograd.grad(getattr(kd, name)(reduction=reduction)(s, t).sum(), s, create_graph=True)
        ds.pow(2).sum().backward()


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = defaultdict(list)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "kdkernels" and "compare" in func.name():
            self.calls[func].append(args)
        return func(*args, **(kwargs or {}))


def test_operators_pass_opcheck():
    recorder = Recorder()
    s, t, y = shaped(F32)
    with recorder:
        for name, options in MADE:
            run(make(name, options), s, t, labels=y)
            run(make(name, options, reduction="none"), s, t, vocab_mask=torch.arange(40) != 7)
        teacher = t.clone().requires_grad_()
        kd.PearsonLoss("probs")(s, teacher).backward()
    assert {f.name() for f in recorder.calls} == {"kdkernels::compare", "kdkernels::compare_step"}
    for operator, calls in recorder.calls.items():
        kinds = {(str([getattr(a, "shape", a) for a in args])): args for args in calls}
        for args in list(kinds.values())[:6]:
            torch.library.opcheck(operator, [a.detach() if torch.is_tensor(a) else a for a in args])


@every_loss_and_dist
def test_compiles_as_one_graph(name, options):
    torch._dynamo.reset()
    loss = make(name, options)
    s, t, y = shaped(F32)
    step = torch.compile(loss, fullgraph=True, backend="aot_eager")
    want, found = run(loss, 2 * s, t, labels=y), run(step, 2 * s, t, labels=y)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-7)


def test_annealing_does_not_recompile():
    torch._dynamo.reset()
    counter = CompileCounter()
    loss = kd.SpearmanLoss()
    step = torch.compile(loss, fullgraph=True, backend=counter)
    s, t = batch(3, 30, F32)
    for tau in (0.1, 0.2, 0.3, 0.4):
        loss.tau = loss.kd_weight = tau
        torch.testing.assert_close(step(s, t), kd.SpearmanLoss(tau=tau, kd_weight=tau)(s, t))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@every_loss
def test_threads_do_not_change_a_bit(name, options, dtype):
    for N, V in ((5, 9000), (101, 40)):
        s, t = batch(N, V, dtype)
        labels = torch.where(torch.arange(N) < N // 2, -100, 0)
        results, threads = [], torch.get_num_threads()
        try:
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                results.append(run(make(name, options), s, t, labels=labels))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))
        few = run(make(name, options), s[N // 2 :], t[N // 2 :])
        torch.testing.assert_close(results[0][0], few[0])
        assert torch.equal(results[0][1][N // 2 :], few[1]) and not results[0][1][: N // 2].any()


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@every_loss
def test_backward_twice(name, options, reduction, dtype):
    s, t = batch(3, 50, dtype)
    s.requires_grad_()
    value = make(name, options, reduction=reduction)(s, t)
    ask = lambda g: torch.autograd.grad(value, s, g, retain_graph=True)[0]  # noqa: E731
    one = torch.ones_like(value)
    first = ask(one)
    kept, scaled, again = first.clone(), ask(4 * one), ask(one)
    assert torch.equal(first, kept) and torch.equal(first, again) and (ask(0 * one) == 0).all()
    torch.testing.assert_close(scaled, 4 * first, rtol=4 * torch.finfo(dtype).eps, atol=1e-6 if dtype == F16 else 1e-9)


@every_loss_and_dist
def test_value_and_grad(name, options):
    s, t, y = shaped(F32)
    loss = make(name, options)
    want, out = run(loss, s, t, labels=y), torch.empty_like(s)
    value, gradient = loss.value_and_grad(s, t, y, out=out)
    assert gradient is out and torch.equal(value, want[0]) and torch.equal(out, want[1])
    assert not value.requires_grad


def test_the_teachers_gradient():
    s, t = batch(3, 20)
    for loss in (kd.PearsonLoss(), kd.PearsonLoss("probs", temperature=2.0)):
        u = t.clone().requires_grad_()
        loss(s, u).backward()
        torch.testing.assert_close(u.grad, run(loss, t, s)[1])  # rho is symmetric
    for loss in (kd.SpearmanLoss(), kd.PlackettLuceLoss(), kd.KendallLoss(), kd.CMKDLoss()):
        with pytest.raises(ValueError, match=rf"teacher_logits requires grad, but {type(loss).__name__}.*detach"):
            loss(s, t.clone().requires_grad_())
        with torch.no_grad():
            loss(s, t.clone().requires_grad_())


BAD_OPTIONS = [
    ("SpearmanLoss", dict(tau=0.0), ValueError), ("SpearmanLoss", dict(tau="1"), TypeError),
    ("SpearmanLoss", dict(top_k=0), ValueError), ("SpearmanLoss", dict(top_k=2.0), TypeError),
    ("SpearmanLoss", dict(exact=1), TypeError), ("SpearmanLoss", dict(temperature=0.0), ValueError),
    ("PearsonLoss", dict(space="log"), ValueError), ("PlackettLuceLoss", dict(weights="w"), ValueError),
    ("KendallLoss", dict(mode="all"), ValueError), ("KendallLoss", dict(shifts=None), TypeError),
    ("KendallLoss", dict(top_k=0), ValueError), ("KendallLoss", dict(seed=-1), ValueError),
    ("DISTLoss", dict(beta=-1.0), ValueError), ("DISTLoss", dict(reduction="none"), ValueError),
    ("CMKDLoss", dict(hard="easy"), ValueError), ("CMKDLoss", dict(tau=-1.0), ValueError),
    ("SpearmanLoss", dict(reduction="median"), ValueError), ("SpearmanLoss", dict(standardize=True), TypeError),
]  # fmt: skip


@pytest.mark.parametrize("name, options, error", BAD_OPTIONS, ids=str)
def test_a_wrong_option_is_named(name, options, error):
    with pytest.raises(error, match=next(iter(options))):
        getattr(kd, name)(**options)


def test_a_refused_option_changes_nothing():
    loss, (s, t) = kd.SpearmanLoss(tau=0.2), batch(2, 9)
    before, shown = loss(s, t), repr(loss)
    with pytest.raises(ValueError, match="tau"):
        loss.tau = -1.0
    assert repr(loss) == shown and torch.equal(loss(s, t), before) and "tau=0.2" in shown


def test_a_wrong_call_says_which_argument():
    s, t = batch(2, 9)
    for error, message, wrong in [
        (ValueError, "SpearmanLoss needs teacher_logits", lambda f: f(s)),
        (ValueError, r"teacher_logits.*\(2, 8\)", lambda f: f(s, t[:, :8])),
        (ValueError, "labels.*9", lambda f: f(s, t, torch.tensor([0, 9]))),
        (ValueError, "vocab_mask.*False", lambda f: f(s, t, vocab_mask=torch.zeros(9, dtype=bool))),
    ]:
        with pytest.raises(error, match=message):
            wrong(kd.SpearmanLoss())
    with pytest.raises(kd.BackendUnavailable, match="no kernels for rank losses"), kd.use_backend("cuda"):
        kd.SpearmanLoss()(s.float(), t.float())
