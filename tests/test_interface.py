"""The public interface: options, errors that name the argument, backends, user-defined losses, modules."""

import copy
import inspect
import math
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from accuracy import BACKENDS, F32, F64, ON_BACKENDS, Bar, batch, excess, faults, make, only, rms, run, textbook
from textbook import CASES, Case, power_sum, power_transform
from torch._dynamo.testing import CompileCounterWithBackend

import kdkernels as kd
from kdkernels import tape

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_case = pytest.mark.parametrize("case", CASES, ids=str)
S, T, Y = torch.randn(4, 7), torch.randn(4, 7), torch.tensor([0, 6, 3, -100])

BAD_CALLS = [  # error, what its message has to name, the call
    (ValueError, r"teacher_logits.*\(4, 6\)", lambda f: f(S, T[:, :6], Y)),
    (ValueError, r"teacher_logits.*\(3, 7\)", lambda f: f(S, T[:3], Y)),
    (ValueError, r"labels.*\(3,\)", lambda f: f(S, T, Y[:3])),
    (ValueError, r"labels.*\(4, 7\)", lambda f: f(S, T, torch.zeros(4, 7, dtype=int))),
    (TypeError, "labels.*float", lambda f: f(S, T, Y.float())),
    (TypeError, "student_logits.*int", lambda f: f(S.long(), T, Y)),
    (TypeError, "teacher_logits.*int", lambda f: f(S, T.long(), Y)),
    (TypeError, "student_logits", lambda f: f([1.0], T, Y)),
    (TypeError, "teacher_logits", lambda f: f(S, T.tolist(), Y)),
    (ValueError, "labels.*7", lambda f: f(S, T, torch.tensor([0, 1, 2, 7]))),
    (ValueError, "labels.*-1", lambda f: f(S, T, torch.tensor([0, 1, 2, -1]))),
    (ValueError, r"row_weight.*\(3,\)", lambda f: f(S, T, Y, row_weight=torch.ones(3))),
    (ValueError, r"temperature.*\(3,\)", lambda f: f(S, T, Y, temperature=torch.ones(3))),
    (ValueError, "temperature.*0", lambda f: f(S, T, Y, temperature=0.0)),
    (ValueError, "vocab_size.*8", lambda f: f(S, T, Y, vocab_size=8)),
    (ValueError, "vocab_size.*0", lambda f: f(S, T, Y, vocab_size=0)),
    (ValueError, r"vocab_mask.*\(6,\)", lambda f: f(S, T, Y, vocab_mask=torch.ones(6, dtype=bool))),
    (TypeError, "vocab_mask", lambda f: f(S, T, Y, vocab_mask=torch.ones(7))),
    (ValueError, r"student_logits", lambda f: f(torch.tensor(1.0), torch.tensor(1.0))),
    (ValueError, "teacher_logits.*meta|device", lambda f: f(S, T.to("meta"), Y)),
    (TypeError, "teacher_logits must be floating point, got int64; labels are the third argument", lambda f: f(S, Y)),
    (TypeError, "student_logits.*sparse", lambda f: f(S.to_sparse(), T, Y)),
    (TypeError, "teacher_logits.*sparse", lambda f: f(S, T.to_sparse(), Y)),
    (ValueError, "temperature.*0", lambda f: f(S, T, Y, temperature=torch.tensor([1.0, 0.0, 1.0, 1.0]))),
    (ValueError, "temperature.*-2", lambda f: f(S, T, Y, temperature=torch.tensor(-2))),
    (ValueError, "temperature.*nan", lambda f: f(S, T, Y, temperature=math.nan)),
    (TypeError, "temperature.*bool", lambda f: f(S, T, Y, temperature=torch.ones(4, dtype=bool))),
    (TypeError, "temperature.*complex", lambda f: f(S, T, Y, temperature=torch.ones(4, dtype=torch.complex64))),
    (TypeError, "row_weight.*bool", lambda f: f(S, T, Y, row_weight=torch.ones(4, dtype=bool))),
    (TypeError, "row_weight.*complex", lambda f: f(S, T, Y, row_weight=torch.ones(4, dtype=torch.complex64))),
    (ValueError, "num_items.*-1", lambda f: f(S, T, Y, num_items=-1)),
    (ValueError, "num_items.*-1", lambda f: f(S, T, Y, num_items=torch.tensor(-1))),
    (ValueError, "num_items.*nan", lambda f: f(S, T, Y, num_items=torch.tensor(torch.nan))),
    (TypeError, "num_items", lambda f: f(S, T, Y, num_items="7")),
    (TypeError, "num_items.*bool", lambda f: f(S, T, Y, num_items=torch.tensor(True))),
    (ValueError, "vocab_mask.*False", lambda f: f(S, T, Y, vocab_mask=torch.zeros(7, dtype=bool))),
    (ValueError, "labels.*vocab_mask.*3", lambda f: f(S, T, Y, vocab_mask=torch.arange(7) != 3)),
]


@pytest.mark.parametrize("error, message, call", BAD_CALLS, ids=[m for _, m, _ in BAD_CALLS])
def test_a_wrong_call_says_which_argument(error, message, call):
    with pytest.raises(error, match=message):
        call(kd.ForwardKLLoss())


@pytest.mark.parametrize("name", ["row_weight", "temperature", "num_items"])
def test_a_number_that_requires_grad_is_refused(name):
    """Under no_grad too, as in value_and_grad: a call that cannot be trained is not one to evaluate either."""
    given = {name: torch.ones(() if name == "num_items" else 4, requires_grad=True)}
    for loss in (kd.ForwardKLLoss(), kd.JSDLoss(), kd.AKLLoss(), kd.ULDLoss(), kd.SpearmanLoss(),
                 kd.ForwardKLLoss() + kd.CrossEntropyLoss(), kd.ForwardKLLoss() + kd.SpearmanLoss()):  # fmt: skip
        for call in (loss, loss.value_and_grad, loss.with_metrics, torch.no_grad()(loss.__call__)):
            for teacher in (T, kd.SparseTeacher.from_logits(T, 3, tail="renormalise")):
                if teacher is T or call != loss.with_metrics:
                    with pytest.raises(ValueError, match=rf"{name} requires grad.*pass {name}\.detach\(\)"):
                        call(S, teacher, torch.full((4,), -100), **given)


BAD_OPTIONS = [
    ("ForwardKLLoss", "temperature", -1.0),
    ("ForwardKLLoss", "temperature", 0.0),
    ("ForwardKLLoss", "teacher_temperature", 0.0),
    ("ForwardKLLoss", "reduction", "average"),
    ("ForwardKLLoss", "label_smoothing", 1.5),
    ("ForwardKLLoss", "label_smoothing", -0.1),
    ("KDLoss", "kd_weight", 0.5),
    ("KDLoss", "ce_weight", 0.5),
    ("KDLoss", "alpha", 1.5),
    ("TAIDLoss", "tau", 1.5),
    ("KDLoss", "z_loss", -0.1),
    ("ForwardKLLoss", "z_loss", math.nan),
]


@pytest.mark.parametrize("name, option, value", BAD_OPTIONS, ids=lambda x: str(x))
def test_a_wrong_option_is_named(name, option, value):
    with pytest.raises((ValueError, TypeError), match=option):
        getattr(kd, name)(**{option: value})


@pytest.mark.parametrize("option", ["label_smoothing", "z_loss"])
def test_an_option_of_the_cross_entropy_needs_one(option):
    for make_it in (kd.ForwardKLLoss, lambda **option: kd.KDLoss(alpha=1.0, **option)):
        with pytest.raises(ValueError, match=f"{option} needs ce_weight > 0"):
            make_it(**{option: 0.1})
        make_it(**{option: 0.0})
    loss = kd.ForwardKLLoss(ce_weight=0.5, **{option: 0.1})
    loss.ce_weight = 0.0  # annealed
    torch.testing.assert_close(loss(S, T), kd.ForwardKLLoss()(S, T))


def test_a_refused_option_changes_nothing():
    loss = Bounded(bound=1.0)
    before, shown = loss(S, T), repr(loss)
    for option, value in [("temperature", -1.0), ("bound", 2.0), ("reduction", "average"), ("kd_weight", "1")]:
        with pytest.raises((TypeError, ValueError), match=option):
            setattr(loss, option, value)
        assert repr(loss) == shown and torch.equal(loss(S, T), before)
    with pytest.raises(ValueError, match="bound"):
        Bounded(bound=2.0)


def test_an_unknown_option_is_answered_with_those_there_are():
    with pytest.raises(TypeError, match=r"WTTMLoss has no option 'gama'.*gamma=0\.5.*ignore_index=-100"):
        kd.WTTMLoss(gama=0.5)
    for positional in (lambda: kd.ForwardKLLoss(2.0), lambda: kd.DKDLoss(1.0, 8.0, True)):
        with pytest.raises(TypeError, match=r"Loss: options are keywords: .*temperature=1\.0"):
            positional()


def test_signatures_show_the_shared_options():
    shared = inspect.signature(kd.Loss).parameters
    assert {"temperature", "reduction", "ignore_index"} <= set(shared)
    for cls in kd.catalogue().values():
        shown = inspect.signature(cls).parameters
        assert all(p.default == getattr(cls(), name) for name, p in shown.items())
        family = kd.Loss if issubclass(cls, kd.Loss) else kd.RankLoss
        assert cls in (kd.KDLoss, kd.CrossEntropyLoss) or set(inspect.signature(family).parameters) <= set(shown)
        assert cls.__doc__.endswith(f"Shared options and the call: see `kdkernels.{family.__name__}`.")
    assert [*inspect.signature(kd.WTTMLoss).parameters][:3] == ["gamma", "normalize_weight", "detach_weight"]


@pytest.mark.parametrize("case", [c for c in CASES if c.needs_teacher], ids=str)
def test_a_missing_teacher_raises(case):
    with pytest.raises(ValueError, match="teacher_logits"):
        make(case)(S, labels=Y)


@pytest.mark.parametrize("case", [c for c in CASES if c.needs_labels], ids=str)
def test_missing_labels_raise(case):
    with pytest.raises(ValueError, match="labels"):
        make(case)(S, T if case.needs_teacher else None)


def test_missing_labels_are_put_down_to_what_needs_them():
    for loss, message in [
        (kd.DKDLoss(), "DKDLoss needs labels"),
        (kd.DKDLoss(ce_weight=0.5), "DKDLoss needs labels"),
        (kd.ForwardKLLoss(ce_weight=0.5), r"ForwardKLLoss with ce_weight=0\.5 needs labels"),
    ]:
        with pytest.raises(ValueError, match=f"^{message}$"):
            loss(S, T)


@on_every_backend
def test_a_teacher_that_is_not_needed_is_ignored(backend):
    """One call serves a loop over losses. Nothing depends on the teacher: its gradient is 0."""
    for loss in (kd.BrierLoss(), kd.BrierLoss(reduction="none"), kd.LogitMSELoss(), kd.CrossEntropyLoss(),
                 kd.KDLoss(alpha=0.0), kd.CrossEntropyLoss() + kd.BrierLoss()):  # fmt: skip
        s, t = S.clone().requires_grad_(), T.double().requires_grad_()
        with only(backend):
            value = loss(s, t, Y)
            value.sum().backward()
            assert value.dtype == F32
            assert t.grad.shape == t.shape and not t.grad.any() and torch.equal(value, loss(s, None, Y))


@on_every_backend
def test_num_items_0_is_for_no_row_kept(backend):
    nothing = torch.full((4,), -100)
    for items in (0, 0.0, torch.tensor(0)):
        s = S.clone().requires_grad_()
        with only(backend):
            value = kd.ForwardKLLoss()(s, T, nothing, num_items=items)
            value.backward()
        assert value == 0 and (s.grad == 0).all()


def test_numbers_may_be_numpys():
    for number in (np.float32(2), np.float64(2), np.int64(2)):
        assert torch.equal(kd.ForwardKLLoss()(S, T, temperature=number), kd.ForwardKLLoss(temperature=2)(S, T))
        assert torch.equal(kd.ForwardKLLoss(temperature=number)(S, T), kd.ForwardKLLoss(temperature=2)(S, T))


def test_the_temperature_of_an_ignored_row_does_not_matter():
    per_row = torch.tensor([1.0, 2.0, 3.0, 0.0])
    assert kd.ForwardKLLoss()(S, T, Y, temperature=per_row).isfinite()


def test_row_weights_may_have_any_strides():
    for weight in (torch.full((1,), 2.0, dtype=F64).expand(4), torch.full((4, 3), 2.0, dtype=F64)[:, 1]):
        s = S.clone().requires_grad_()
        value = kd.ForwardKLLoss()(s, T, Y, row_weight=weight)
        torch.testing.assert_close(value, 2 * kd.ForwardKLLoss()(S, T, Y))


def test_value_and_grad_names_what_it_does_not_do():
    with pytest.raises(ValueError, match=r"reduction other than 'none'$"):
        kd.ForwardKLLoss(reduction="none").value_and_grad(S, T)
    with pytest.raises(ValueError, match=r"needs standardize=False$"):
        kd.ForwardKLLoss(standardize=True).value_and_grad(S, T)


def test_out_may_be_the_logits_but_not_overlap_them():
    loss, memory = kd.ForwardKLLoss(), torch.randn(9, 14)
    s, t = memory[:4, :7], memory[:4, 7:]
    want = loss.value_and_grad(s.clone(), t.clone())[1]
    for name, out in [("student", memory[1:5, :7]), ("student", memory[:4, 1:8]), ("teacher", memory[1:5, 7:])]:
        with pytest.raises(ValueError, match=f"out shares memory with {name}_logits"):
            loss.value_and_grad(s, t, out=out)
    with pytest.raises(ValueError, match="out shares memory with teacher_logits"):
        loss.value_and_grad(s, memory[1:5, :7], out=s)
    with pytest.raises(ValueError, match=r"out shares memory with student_logits, which is read meanwhile$"):
        loss.value_and_grad(s, t, out=s, accumulate=True)
    with pytest.raises(ValueError, match=r"accumulate=True needs out"):
        loss.value_and_grad(s, t, accumulate=True)
    for which in (0, 1):
        pair = memory.clone()
        logits = pair[:4, :7], pair[:4, 7:]  # neighbours in memory, with no number in common
        assert torch.equal(loss.value_and_grad(*logits, out=logits[which])[1], want)


def test_labels_are_optional_without_a_label_term():
    torch.testing.assert_close(kd.KDLoss(alpha=1.0)(S, T), kd.KDLoss(alpha=1.0)(S, T, torch.zeros(4, dtype=int)))


def test_backends_are_chosen_by_name():
    available = kd.available_backends()
    assert {"reference", "cpu", "triton", "cuda"} <= set(available)
    assert all(isinstance(reason, str) and reason for reason in available.values())
    with pytest.raises(ValueError, match=r"reference.*nonesuch|nonesuch.*reference"):
        kd.use_backend("nonesuch")
    for name, reason in available.items():
        if reason != "ok":
            with pytest.raises(kd.BackendUnavailable, match=name):
                kd.use_backend(name)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_float64_is_refused_where_it_would_be_rounded(side):
    s, t = (S.double(), T) if side == "student" else (S, T.double())
    with kd.use_backend("triton"), pytest.raises(TypeError, match=f"{side}_logits are float64"):
        kd.ForwardKLLoss()(s, t)


def test_use_backend_nests_and_ends():
    with only("cpu"):
        kd.ForwardKLLoss()(S, T)
        before = kd.backends.calls.copy()
        with kd.use_backend("reference"):
            kd.ForwardKLLoss()(S, T)
        assert {name for name, _ in kd.backends.calls - before} == {"reference"}
        kd.backends.calls.clear()
        kd.backends.calls.update(before)
        kd.ForwardKLLoss()(S, T)


@pytest.mark.parametrize("name", ["reference", "cpu", "nonesuch"])
def test_the_environment_chooses_a_backend(name):
    code = """if True:
        import torch, kdkernels as kd
        kd.ForwardKLLoss()(torch.ones(2, 3), torch.ones(2, 3))
        print({backend for backend, _ in kd.backends.calls})"""
    env = {**os.environ, "KDKERNELS_BACKEND": name}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    if name == "nonesuch":
        assert done.returncode != 0 and "nonesuch" in done.stderr and "KDKERNELS_BACKEND" in done.stderr
    else:
        assert done.stdout.strip() == f"{{'{name}'}}", done.stderr


@pytest.mark.parametrize("backend, case", ON_BACKENDS, ids=str)
def test_call_time_temperature(case, backend):
    """A number replaces the constructor's; a tensor gives every row its own."""
    rows = batch(3, 9).to(F32 if backend in ("triton", "cuda") else F64)
    per_row = torch.tensor([0.5, 2.0, 5.0], dtype=torch.float64)
    got = run(case, backend, rows, temperature=per_row)
    for i in range(3):
        one = run(case, backend, rows.rows(i, i + 1), temperature=per_row[i].item())
        torch.testing.assert_close(one.value[0], got.value[i])
        torch.testing.assert_close(one.ds[0], got.ds[i])
    want = textbook(case, rows, temperature=per_row)
    torch.testing.assert_close(got.value.double(), want.value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.ds.double(), want.ds, rtol=1e-4, atol=1e-6)


@on_every_backend
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("name, formula", [("power_transform", power_transform), ("power_sum", power_sum)])
def test_power_functions(name, formula, gamma, backend):
    dtype = F32 if backend in ("triton", "cuda") else F64
    x = batch(4, 13, scale=3.0).s.to(dtype).requires_grad_()
    with kd.use_backend(backend):
        got = getattr(kd, name)(x, gamma)
        weight = torch.linspace(0.5, 1.5, got.numel(), dtype=got.dtype).view(got.shape)
        (dx,) = torch.autograd.grad((got * weight).sum(), x)
    truth, own = [], []
    for results, kind in ((truth, F64), (own, F32)):
        z = x.detach().to(kind).requires_grad_()
        value = formula(z, gamma)
        results += [value.detach(), torch.autograd.grad((value * weight.to(kind)).sum(), z)[0]]
    for a, e, o in zip((got.detach(), dx), truth, own, strict=True):
        assert not (why := excess(a, Bar(e, o, e, x.abs().max().item() * torch.finfo(F64).eps), dtype)), why


class JeffreysLoss(kd.Loss):
    """KL(p || q) + KL(q || p), as a user would declare it."""

    def __init__(self, weight=1.0, **options):
        super().__init__(**options)
        self.weight = weight

    def points(self):
        return kd.Point(student=1), kd.Point(teacher=1)

    def value(self, q, p):
        return self.weight * ((p.t - p.s) - (q.t - q.s))


class PearsonLoss(kd.Loss):
    """1 - cosine of the probabilities: second use of many points, sqrt and division."""

    def points(self):
        return kd.Point(student=2), kd.Point(student=1, teacher=1), kd.Point(teacher=2)

    def value(self, qq, qp, pp):
        return 1 - tape.exp(qp.lse - (qq.lse + pp.lse) / 2)


class Bounded(JeffreysLoss):
    """With a range of its own."""

    def __init__(self, bound, **options):
        super().__init__(**options)
        self.bound = bound

    def check(self):
        if self.bound > 1:
            raise ValueError(f"bound must be <= 1, got {self.bound}")


def jeffreys(s, t, y):
    return (s.softmax(-1) - t.softmax(-1)).mul(s.log_softmax(-1) - t.log_softmax(-1)).sum(-1)


def pearson(s, t, y):
    return 1 - torch.cosine_similarity(s.softmax(-1), t.softmax(-1), dim=-1)


@on_every_backend
@pytest.mark.parametrize("loss, formula", [(JeffreysLoss, jeffreys), (PearsonLoss, pearson)])
def test_a_user_defined_loss_runs_everywhere(loss, formula, backend, monkeypatch):
    monkeypatch.setattr(kd, loss.__name__, loss, raising=False)
    rows = batch(6, 37, scale=2.0).to(F32 if backend in ("triton", "cuda") else F64)
    case = Case(loss.__name__, formula, dict(temperature=2.0))
    assert not (found := faults(case, rows, run(case, backend, rows, teacher_grad=True))), found


def one_point(points, value=lambda q: q.lse):
    return type("OnePoint", (kd.Loss,), dict(points=lambda self: points, value=lambda self, q: value(q)))


class Unfinished(JeffreysLoss):
    def __init__(self):
        self.weight = 1.0


Q = (kd.Point(student=1),)
BAD_LOSSES = [
    (TypeError, "points must return a tuple of Points", one_point(kd.Point(student=1))),
    (TypeError, "points must return a tuple of Points", one_point((1.0,))),
    (ValueError, "student of point 0 .*nan", one_point((kd.Point(student=math.nan),))),
    (ValueError, "teacher of point 0 .*inf", one_point((kd.Point(teacher=torch.tensor([1.0, torch.inf])),))),
    (TypeError, "student of point 0 .*str", one_point((kd.Point(student="1"),))),
    (TypeError, r"kdkernels\.tape.*tanh", one_point(Q, lambda q: torch.tanh(q.lse))),
    (TypeError, r"kdkernels\.tape", one_point(Q, lambda q: math.exp(q.lse))),
    (TypeError, r"kdkernels\.tape", one_point(Q, lambda q: q.lse.exp())),
    (TypeError, r"tape\.where", one_point(Q, lambda q: q.lse if q.lse > 0 else 0.0)),
    (TypeError, r"Unfinished.__init__ must call super\(\).__init__", Unfinished),
]


@pytest.mark.parametrize("error, message, loss", BAD_LOSSES, ids=[m for _, m, _ in BAD_LOSSES])
def test_a_loss_that_is_declared_wrong_says_how(error, message, loss):
    with pytest.raises(error, match=message):
        loss()


def compilations(loss, calls):
    """How often torch.compile starts anew over these calls, each (options to set, arguments of the call)."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step, eager = torch.compile(loss, fullgraph=True, backend=counter), copy.deepcopy(loss)
    for options, call in calls:
        for name, value in options.items():
            setattr(loss, name, value)
            setattr(eager, name, value)
        torch.testing.assert_close(step(S, T, Y, **call), eager(S, T, Y, **call))
    return counter.frame_count


NUMBERS = (0.31, 0.42, 0.53, 0.64)


@pytest.mark.parametrize("argument", ["temperature", "num_items"])
def test_a_number_of_a_call_compiles_twice_at_most(argument):
    """Once for the first value, once for any."""
    assert compilations(kd.ForwardKLLoss(), [({}, {argument: x}) for x in NUMBERS]) <= 2


@pytest.mark.parametrize("option", ["kd_weight", "ce_weight", "label_smoothing", "z_loss", "teacher_temperature"])
def test_an_option_that_changes_does_not_recompile(option):
    loss = kd.ForwardKLLoss(kd_weight=0.3, ce_weight=0.4, label_smoothing=0.1, z_loss=0.1, teacher_temperature=2.0)
    per_row = torch.ones(4) if option == "teacher_temperature" else None
    assert compilations(loss, [({option: x}, dict(temperature=per_row)) for x in NUMBERS]) == 1


@on_every_backend
def test_an_option_may_change_between_calls(backend):
    rows = batch(3, 9).to(F32)
    changes = [("TAIDLoss", "tau", 0.9), ("TTMLoss", "gamma", 0.2), ("TAIDLoss", "temperature", 3.0)]
    with only(backend):
        for name, option, value in changes:
            loss = getattr(kd, name)()
            before = loss(*rows)
            setattr(loss, option, value)
            torch.testing.assert_close(loss(*rows), getattr(kd, name)(**{option: value})(*rows), rtol=0, atol=0)
            assert (loss(*rows) - before).abs() > 1e-4


@every_case
def test_a_loss_is_a_plain_module(case):
    loss = make(case, ignore_index=-1)
    assert loss.state_dict() == {} and list(loss.parameters()) == []
    twin = copy.deepcopy(loss)
    rows = batch(3, 9).to(F32)
    teacher = rows.t if case.needs_teacher else None
    assert torch.equal(loss(rows.s, teacher, rows.y), twin(rows.s, teacher, rows.y))
    for option, value in case.options.items():
        assert f"{option}={value!r}" in repr(loss), repr(loss)
    torch.nn.Sequential(loss).to(torch.bfloat16).eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype):
    rows = batch(5, 17).to(F32)
    s = rows.s.requires_grad_()
    plain = torch.autograd.grad(kd.WTTMLoss(0.5)(s, rows.t), s)[0]
    with torch.autocast("cpu", dtype):
        value = kd.WTTMLoss(0.5)(s, rows.t)
    assert value.dtype == F32
    assert torch.equal(torch.autograd.grad(value, s)[0], plain)


def test_losses_run_in_threads():
    """Eight threads, two backends at once: use_backend is local to its thread."""
    rows = batch(64, 33).to(F32)
    want, wrong = kd.TTMLoss(0.5)(*rows), []

    def work(backend):
        for _ in range(20):
            with kd.use_backend(backend):
                s = rows.s.clone().requires_grad_()
                value = kd.TTMLoss(0.5)(s, rows.t, rows.y)
                value.backward()
            if rms(value - want) > 1e-6 or s.grad.sum(-1).abs().max() > 1e-6:
                wrong.append(backend)

    threads = [threading.Thread(target=work, args=(b,)) for b in ["reference", "cpu"] * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_weight_of_zero_counts_nothing(backend, reduction):
    """Not even of a row whose loss is infinite; the row stays in the mean's denominator."""
    s, t, _ = batch(3, 7).to(F32)
    s[1, 2] = -torch.inf
    with kd.use_backend(backend):
        leaf = s.clone().requires_grad_()
        value = kd.ForwardKLLoss(reduction=reduction)(leaf, t, row_weight=torch.tensor([1.0, 0.0, 2.0]))
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        rows = kd.ForwardKLLoss(reduction="none")(s, t)
    want = torch.stack((rows[0], torch.zeros(()), 2 * rows[2]))
    torch.testing.assert_close(value, want if reduction == "none" else want.sum() / 3)
    assert gradient[1].eq(0).all() and gradient[0].ne(0).all()


def test_a_slow_fallback_is_said_once(monkeypatch):
    monkeypatch.setitem(kd.backends._modules, "cpu", "it is not built")
    kd.backends._say_slow.cache_clear()
    with pytest.warns(UserWarning, match=r"reference.*'cpu' cannot run, it is not built"):
        kd.ForwardKLLoss()(S, T)
    kd.ForwardKLLoss()(S, T)  # warnings are errors here
