"""The public interface: options, errors that name the argument, backends, user-defined losses, modules."""

import copy
import os
import subprocess
import sys
import threading

import pytest
import torch
from accuracy import BACKENDS, F32, F64, ON_BACKENDS, Bar, batch, excess, faults, make, only, rms, run, textbook
from textbook import CASES, Case, power_sum, power_transform

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
]


@pytest.mark.parametrize("error, message, call", BAD_CALLS, ids=[m for _, m, _ in BAD_CALLS])
def test_a_wrong_call_says_which_argument(error, message, call):
    with pytest.raises(error, match=message):
        call(kd.ForwardKLLoss())


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
]


@pytest.mark.parametrize("name, option, value", BAD_OPTIONS, ids=lambda x: str(x))
def test_a_wrong_option_is_named(name, option, value):
    with pytest.raises((ValueError, TypeError), match=option):
        getattr(kd, name)(**{option: value})


@pytest.mark.parametrize("case", [c for c in CASES if c.needs_teacher], ids=str)
def test_a_missing_teacher_raises(case):
    with pytest.raises(ValueError, match="teacher_logits"):
        make(case)(S, labels=Y)


@pytest.mark.parametrize("case", [c for c in CASES if c.needs_labels], ids=str)
def test_missing_labels_raise(case):
    with pytest.raises(ValueError, match="labels"):
        make(case)(S, T if case.needs_teacher else None)


def test_labels_are_optional_without_a_label_term():
    torch.testing.assert_close(kd.KDLoss(alpha=1.0)(S, T), kd.KDLoss(alpha=1.0)(S, T, torch.zeros(4, dtype=int)))


def test_backends_are_chosen_by_name():
    available = kd.available_backends()
    assert {"reference", "cpu", "triton", "cuda"} <= set(available)
    assert all(isinstance(reason, str) and reason for reason in available.values())
    with pytest.raises(ValueError, match=r"reference.*nonesuch|nonesuch.*reference"), kd.use_backend("nonesuch"):
        kd.ForwardKLLoss()(S, T)
    for name, reason in available.items():
        if reason != "ok":
            with pytest.raises(RuntimeError, match=name), kd.use_backend(name):
                kd.ForwardKLLoss()(S, T)


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
        assert f"{option}={value}" in repr(loss), repr(loss)
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
