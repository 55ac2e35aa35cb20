"""The operators under autograd, torch.compile, threads, and a gradient that is asked for twice."""

from collections import defaultdict
from contextlib import contextmanager
from functools import cache
from itertools import count
from unittest.mock import patch

import pytest
import torch
from accuracy import BACKENDS, F16, F32, F64, ON_BACKENDS, SAMPLE, Bar, batch, excess, has_kernels, make, only, textbook
from textbook import CASES
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels as kd
from kdkernels.ops import points_of

every_case = pytest.mark.parametrize("case", CASES, ids=str)
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
NATIVE = pytest.mark.parametrize("backend", ["reference", "cpu"])
# They hold a mixture or weights constant: their gradient is not the derivative of the value.
CONSTANT = {"TAIDLoss", "AKLLoss"}
TRUE_GRADIENT = [c for c in CASES if c.name not in CONSTANT and not c.options.get("detach_mixture")]
FROZEN = [c for c in CASES if c not in TRUE_GRADIENT or c.options.get("detach_weight")]
BY_NAME = list({c.name: c for c in CASES}.values())


class Recorder(TorchDispatchMode):
    """Keeps the arguments of every kdkernels operator that runs."""

    def __init__(self):
        super().__init__()
        self.calls = defaultdict(list)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "kdkernels":
            self.calls[func].append((args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@cache
def recorded(backend):
    recorder, dtype, rows = Recorder(), F32, 2  # Triton's interpreter takes them one by one
    for case in (c for c in SAMPLE if has_kernels(c, backend)):
        for reduction in ("mean", "none"):
            s, t, y = batch(rows, 5).to(dtype)
            s, t = s.clone().requires_grad_(), t.clone().requires_grad_(reduction == "none")
            with kd.use_backend(backend), recorder:
                teacher = t if case.needs_teacher else None
                value = make(case, reduction=reduction)(s, teacher, y)
                value.sum().backward()
                if reduction == "mean" and not case.setting("standardize", False):
                    make(case).value_and_grad(s, teacher, y, out=torch.empty_like(s))
    if backend in ("cpu", "triton"):
        s, t, y = batch(rows, 5).to(dtype)
        with kd.use_backend(backend), recorder:
            for loss in (kd.GroupedKLLoss(torch.arange(5) % 2), kd.GroupedKLLoss("label"), kd.ULDLoss(),
                         kd.ULDLoss(reduction="none"), kd.ForwardKLLoss() + kd.SpearmanLoss()):  # fmt: skip
                loss(s.clone().requires_grad_(), t, y).sum().backward()
    if backend == "cpu":
        program = kd.JSDLoss()._single
        with kd.use_backend(backend), recorder:
            (code, args), (reduce, sums) = points_of(program.code, program.args), kd.backends.cpu.SEPARABLE.elements
            stats = reduce(s, t, None, None, args, code, 5, -100)
            sums(s, t, None, None, program.args, program.code, stats, 5, -100)
            kd.DISTLoss()(s.clone().requires_grad_(), t.clone().requires_grad_(), y).backward()
            kd.ForwardKLLoss().with_metrics(s, t, y)
            distances, slopes = kd.backends.cpu.DISTANCES
            slopes(distances(s, t), s, t)
    if backend in ("cpu", "triton"):
        teacher = kd.SparseTeacher.from_logits(batch(rows, 5).to(dtype).t, 2)
        with kd.use_backend(backend), recorder:
            kd.ForwardKLLoss()(batch(rows, 5).to(dtype).s.requires_grad_(), teacher).backward()
    return recorder.calls


@on_every_backend
def test_operators_pass_opcheck(backend):
    calls = recorded(backend)
    if backend != "reference":
        assert calls, "no kdkernels operator ran"
    for operator, arguments in calls.items():
        picked = {str([getattr(a, "shape", a) for a in args]): (args, kw) for args, kw in arguments}
        for args, kw in list(picked.values())[:3]:
            detached = [a.detach() if torch.is_tensor(a) else a for a in args]
            torch.library.opcheck(operator, detached, kw)


def test_every_operator_is_checked():
    names = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("kdkernels::")}
    names -= {"kdkernels::isa", "kdkernels::exp2"}  # no loss calls them
    of_ranks = "compare", "compare_step", "rankdata", "spearman", "kendall_tau"  # in tests of their own
    apart = {f"{prefix}{name}" for prefix in ("", "triton_", "cuda_") for name in of_ranks}
    apart |= {"linear", "triton_together"}
    names -= {f"kdkernels::{name}" for name in apart}
    ran = set()
    for backend in BACKENDS:
        ran |= {op.name() for op in recorded(backend)}
    missing = {n for n in names if n.split(".")[0] not in {r.split(".")[0] for r in ran}}
    assert names and not missing, missing


def leaves(case, s, t):
    """The logits a loss takes, to be differentiated; not the teacher's where part of them is held constant."""
    if not case.needs_teacher:
        return (s.clone().requires_grad_(),)
    return s.clone().requires_grad_(), t.clone().requires_grad_(not case.options.get("detach_weight"))


@pytest.mark.parametrize(
    "backend, case", [(b, c) for b in ("reference", "cpu") for c in TRUE_GRADIENT if has_kernels(c, b)], ids=str
)
def test_gradcheck(case, backend):
    s, t, y = batch(3, 5, seed=3)
    y = y.index_fill(0, torch.tensor([1]), -100)
    logits = leaves(case, s, t)
    weight = torch.tensor([0.5, 1.0, 2.0])
    with only(backend):
        for loss in (make(case, reduction="mean"), make(case, reduction="none")):
            assert gradcheck(lambda *logits: loss(*logits, labels=y, row_weight=weight), logits)  # noqa: B023


@contextmanager
def held(constants):
    """Whatever is detached is what it was the first time, kept in a list."""
    turn, detach = count(), torch.Tensor.detach

    def again(x):
        if (k := next(turn)) == len(constants):
            constants.append(detach(x).clone())
        return constants[k]

    with patch.object(torch.Tensor, "detach", again):
        yield


@pytest.mark.parametrize(
    "backend, case", [(b, c) for b in ("reference", "cpu") for c in FROZEN if has_kernels(c, b)], ids=str
)
def test_gradcheck_with_what_is_constant_held(case, backend):
    """The gradient is the derivative of the textbook's function in which a mixture or weights do not move."""
    s, t, y = batch(3, 5, seed=3)
    y = y.index_fill(0, torch.tensor([1]), -100)
    call, constants = dict(row_weight=torch.tensor([0.5, 1.0, 2.0])), []
    logits = s.clone().requires_grad_(), t.clone().requires_grad_()

    def function(*logits, reduction):
        value = make(case, reduction=reduction)(*logits, labels=y, **call)
        with held(constants):
            moved = case.loss(*logits, y, reduction=reduction, **call)
        return value - value.detach() + moved.detach()  # the value of one, the gradient of the other

    with only(backend):
        for reduction in ("mean", "none"):
            function(*logits, reduction=reduction)
            assert constants and gradcheck(lambda *logits: function(*logits, reduction=reduction), logits)  # noqa: B023


@pytest.mark.parametrize("case", TRUE_GRADIENT, ids=str)
def test_double_backward_on_reference(case):
    s, t, y = batch(2, 4, seed=4)
    with only("reference"):
        assert gradgradcheck(lambda *logits: make(case)(*logits, labels=y), leaves(case, s, t))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_double_backward_is_refused_elsewhere(backend, reduction):
    s, t, _ = batch(2, 4).to(F32)
    s = s.clone().requires_grad_()
    with kd.use_backend(backend), pytest.raises(NotImplementedError, match="reference"):
        (ds,) = torch.autograd.grad(kd.ReverseKLLoss(reduction=reduction)(s, t).sum(), s, create_graph=True)
        ds.pow(2).sum().backward()


def compiled_and_eager(case, backend, reduction="mean"):
    torch._dynamo.reset()
    loss, results = make(case, reduction=reduction), []
    for function in (loss, torch.compile(loss, fullgraph=True, backend=backend)):
        s, t, y = batch(4, 9).to(F32)
        s, t = s.clone().requires_grad_(), t.clone().requires_grad_()
        value = function(2 * s, t if case.needs_teacher else None, y)
        value.sum().backward()
        results.append([value.detach(), s.grad, *([t.grad] if case.needs_teacher else [])])
    return results


@pytest.mark.parametrize("case", [c for c in CASES if has_kernels(c, "cpu")], ids=str)
def test_compiles_as_one_graph(case):
    eager, compiled = compiled_and_eager(case, "aot_eager")
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_with_inductor(reduction):
    case = next(c for c in CASES if c.name == "WTTMLoss")
    eager, compiled = compiled_and_eager(case, "inductor", reduction)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name, option", [("TTMLoss", "gamma"), ("TAIDLoss", "tau"), ("AlphaBetaLoss", "alpha"),
                                          ("RenyiLoss", "alpha"), ("KDLoss", "temperature")])  # fmt: skip
def test_annealing_does_not_recompile(name, option):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    loss = getattr(kd, name)()
    step = torch.compile(loss, fullgraph=True, backend=counter)
    s, t, y = batch(4, 9).to(F32)
    for value in (0.31, 0.42, 0.53, 0.64, 0.75, 0.86):
        setattr(loss, option, value)
        torch.testing.assert_close(step(s, t, y), getattr(kd, name)(**{option: value})(s, t, y))
    assert counter.frame_count == 1, f"{counter.frame_count} compilations"


@pytest.mark.parametrize("shape", [(2, 50257), (70, 20_000), (300, 777), (5, 3), (1, 200_000)], ids=str)
@pytest.mark.parametrize("case", [c for c in BY_NAME if has_kernels(c, "cpu")], ids=str)
def test_threads_do_not_change_a_bit(case, shape):
    """On as many threads as one likes, forwards and backwards, bitwise."""
    s, t, y = batch(*shape, scale=3.0).to(F32)
    results, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append([])
            for reduction, teacher in (("none", True), ("mean", False)):
                leaf, own = s.clone().requires_grad_(), t.clone().requires_grad_(teacher)
                with only("cpu"):
                    value = make(case, reduction=reduction)(leaf, own if case.needs_teacher else None, y)
                    value.sum().backward()
                results[-1] += [x for x in (value.detach(), leaf.grad, own.grad) if x is not None]
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend, case", ON_BACKENDS, ids=str)
def test_backward_twice(case, reduction, backend):
    """A retained graph gives the same gradient again, an incoming gradient scales it, and neither is overwritten."""
    s, t, y = batch(3, 7).to(F32)
    s, t = s.clone().requires_grad_(), t.clone().requires_grad_()
    leaves = (s, t) if case.needs_teacher and case.name != "TAIDLoss" else (s,)
    with only(backend):
        value = make(case, reduction=reduction)(s, t if case.needs_teacher else None, y)
        one = torch.ones_like(value)
        ask = lambda g: torch.autograd.grad(value, leaves, g, retain_graph=True)  # noqa: E731
        first = ask(one)
        kept, scaled, again = [g.clone() for g in first], ask(4 * one), ask(one)
        zero = ask(0 * one)
    for a, b, c, d, e in zip(first, kept, scaled, again, zero, strict=True):
        assert torch.equal(a, b) and torch.equal(a, d) and (e == 0).all()
        torch.testing.assert_close(c, 4 * a, rtol=1e-6, atol=1e-9)


@NATIVE
@pytest.mark.parametrize("name", ["ForwardKLLoss", "WTTMLoss"])
def test_half_gradients_survive_the_scale_of_a_grad_scaler(name, backend):
    """The mean over many rows of a wide softmax underflows float16 unless the scale comes before the rounding."""
    case = next(c for c in CASES if c.name == name)
    rows, scale = batch(1024, 2000, s_dtype=F16), 65536.0
    s = rows.s.clone().requires_grad_()
    with only(backend):
        (make(case)(s, rows.t, rows.y) * scale).backward()
    factor = scale / len(rows.y)
    exact, own = (textbook(case, rows, dtype).ds.double() * factor for dtype in (F64, F32))
    assert not (why := excess(s.grad, Bar(exact, own, exact, torch.finfo(F64).eps), F16)), why


@pytest.mark.parametrize("backend, case", ON_BACKENDS, ids=str)
def test_no_grad_gives_the_same_value(case, backend):
    s, t, y = batch(3, 7).to(F32)
    s, teacher = s.clone().requires_grad_(), t if case.needs_teacher else None
    with only(backend):
        value = make(case)(s, teacher, y)
        with torch.no_grad():
            quiet = make(case)(s, teacher, y)
        with torch.inference_mode():
            inferred = make(case)(s, teacher, y)
    assert value.requires_grad and not quiet.requires_grad
    torch.testing.assert_close(quiet, value.detach())
    torch.testing.assert_close(inferred.clone(), value.detach())
