"""Batches, the way a loss is run on one backend, and how close it has to come to the textbook."""

import multiprocessing
import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import NamedTuple
from unittest.mock import patch

import textbook as definitions
import torch
from textbook import CASES, Case
from torch import Tensor

import kdkernels as kd
from kdkernels.rowwise import RowsLoss

BACKENDS = list(kd.backends.NAMES)  # one that is not there makes its tests fail, with the reason
# Instruction sets of the C++ kernels, beside the processor's own.
LOWER = ["baseline", "AVX2", "AVX-512"][: 0 if kd.backends.cpu.unavailable() else torch.ops.kdkernels.isa()]
# The Triton interpreter takes tens of milliseconds a row: beside test_losses.py it runs a loss for each thing a kernel
# can do (label term, weights, second moments, a class left out, no teacher, frozen weights, z-scores).
FEATURES = ("KDLoss-alpha=0.3", "WTTM", "AlphaBetaLoss-alpha=0.0-beta=0.0", "DKDLoss-alpha=0.5", "Brier", "TAIDLoss-tau=0.4", "JSDLoss-beta=0.9")  # noqa: E501
SAMPLE = [case for case in CASES if str(case).startswith(FEATURES) or case.options.get("standardize")]



class Jeffreys(kd.Loss):
    """KL(p || q) + KL(q || p), as a user would declare it."""

    def points(self):
        return kd.Point(student=1), kd.Point(teacher=1)

    def value(self, q, p):
        return (p.t - p.s) - (q.t - q.s)


class SquaredDistance(kd.SeparableLoss):
    """sum_i (q_i - p_i)^2, as a user would declare it."""

    def phi(self, log_q, log_p):
        return (kd.tape.exp(log_q) - kd.tape.exp(log_p)) ** 2


DECLARED = {loss.__name__: loss for loss in (Jeffreys, SquaredDistance)}


def of(case: Case) -> type:
    """The class of the loss."""
    return DECLARED.get(case.name) or getattr(kd, case.name)


def has_kernels(case: Case, backend: str) -> bool:
    loss = of(case)
    if issubclass(loss, kd.SeparableLoss):
        return backend != "cuda"
    if loss in (kd.GroupedKLLoss, kd.ULDLoss):
        return backend != "cuda"
    return backend == "reference" or not issubclass(loss, RowsLoss)


ON_BACKENDS = [(backend, case) for backend in BACKENDS for case in (SAMPLE if backend == "triton" else CASES)
               if has_kernels(case, backend)]  # fmt: skip
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
ULPS = 4  # slack, in units of the last place of the arithmetic
SHRINK = torch.finfo(F64).eps / torch.finfo(F32).eps  # the rounding error of one formula scales with the unit roundoff


@contextmanager
def only(backend):
    """Runs the block on one backend and proves, by the kernels counted, that nothing ran on another."""
    reason = kd.available_backends()[backend]
    assert reason == "ok", f"backend {backend}: {reason}"
    before = Counter(kd.backends.calls)
    with kd.use_backend(backend):
        yield
    ran = kd.backends.calls - before
    assert {name for name, _ in ran} == {backend}, f"asked for {backend}, kernels that ran: {dict(ran)}"


def of_points(case: Case) -> bool:
    """Whether all of the loss is made at points of the log-partition."""
    return not issubclass(of(case), RowsLoss)


def can_shard(case: Case) -> bool:
    """Whether it can be computed on vocabulary shards."""
    return of(case).unsharded is None


def make(case: Case, **options):
    return of(case)(**case.options, **options)


class Batch(NamedTuple):
    s: Tensor
    t: Tensor
    y: Tensor

    def to(self, s_dtype, t_dtype=None):
        return Batch(self.s.to(s_dtype), self.t.to(t_dtype or s_dtype), self.y)

    def rows(self, *index):
        return Batch(*(x[slice(*index)] for x in self))


@cache
def batch(N, V, scale=1.0, offset=0.0, saturated=0.0, seed=0, s_dtype=F64, t_dtype=None) -> Batch:
    """Random logits, rounded to the dtypes given; `saturated` is a margin added to one class of each row."""
    g = torch.Generator().manual_seed(seed)
    s, t = scale * torch.randn(2, N, V, generator=g, dtype=F64)
    y = torch.randint(V, (N,), generator=g)
    if saturated:  # on one row in two both agree on the class
        s[torch.arange(N), torch.where(torch.arange(N) % 2 == 0, y, torch.randint(V, (N,), generator=g))] += saturated
        t[torch.arange(N), y] += saturated
    # float32 first: a wider dtype then holds the very same numbers
    return Batch(s + offset, t - offset, y).to(F32).to(s_dtype, t_dtype)


class Result(NamedTuple):
    value: Tensor
    ds: Tensor
    dt: Tensor | None = None


def run(case: Case, backend, rows: Batch, teacher_grad=False, **call) -> Result:
    """Row values from reduction="none" and the gradient of their sum, on one backend and nothing else."""
    s, t = rows.s.detach().requires_grad_(), rows.t.detach().requires_grad_(teacher_grad)
    teacher = t if case.needs_teacher else None
    with only(backend):
        value = make(case, reduction="none")(s, teacher, rows.y, **call)
        make(case, reduction="sum")(s, teacher, rows.y, **call).backward()
    assert value.dtype == (F64 if s.dtype == F64 else F32) and value.shape == s.shape[:-1]
    assert s.grad.dtype == s.dtype and s.grad.shape == s.shape
    return Result(value.detach(), s.grad, t.grad)


@cache
def process(isa: str) -> ProcessPoolExecutor:
    """A process whose C++ kernels have a lower instruction set."""
    level = LOWER.index(isa)
    with patch.dict(os.environ, KDKERNELS_ISA=str(level)):  # read once a process
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        assert pool.submit(_level).result() == level
    return pool


def _level() -> int:
    return torch.ops.kdkernels.isa()


def run_with(isa: str, case: Case, *rows) -> Result:
    """`run` with that instruction set; rows: the arguments of `batch`, a dict, and both dtypes."""
    return Result(*map(torch.from_numpy, process(isa).submit(_run_there, str(case), *rows).result()))


def _run_there(name: str, regime: dict, s_dtype, t_dtype) -> list:
    case = next(case for case in CASES if str(case) == name)
    value, ds, _ = run(case, "cpu", batch(**regime, s_dtype=s_dtype, t_dtype=t_dtype))
    return [value.numpy(), ds.double().numpy()]


def textbook(case: Case, rows: Batch, dtype=F64, teacher_grad=True, **call) -> Result:
    """The same, from the definition, in the given dtype; gradients rounded to the dtype of their logits."""
    s, t = (x.detach().to(dtype).requires_grad_(x is rows.s or teacher_grad) for x in (rows.s, rows.t))
    value = case.loss(s, t, rows.y, reduction="none", **call)
    ds = torch.autograd.grad(value.sum(), s, retain_graph=True)[0]
    dt = torch.autograd.grad(value.sum(), t, allow_unused=True)[0] if teacher_grad else None
    dt = torch.zeros_like(t) if dt is None else dt
    if dtype != F64:
        ds, dt = ds.to(rows.s.dtype), dt.to(rows.t.dtype)
    return Result(value.detach(), ds, dt)


def rms(x: Tensor) -> float:
    return x.double().pow(2).mean().sqrt().item() if x.numel() else 0.0


class Bar(NamedTuple):
    """One number of a batch: the truth, the textbook in float32, and the textbook after one more rounding."""

    exact: Tensor
    own: Tensor
    nudged: Tensor
    statistics: float  # what rounding every row statistic to float64 once does


def excess(actual: Tensor, bar: Bar, dtype) -> str:
    """Why `actual` is too far from the truth, or "". RMS over all rows, infinite ones (negative powers) left out.

    float32 and less (computed in float32): error <= the textbook's own in float32 + a few ulp of the result + what
    one rounding of every log-probability to float32 does to the truth.
    float64: relative error <= 1e-12, beyond the same two errors scaled to float64.
    In all: a loss is a function of float64 row statistics, each of which is rounded at least once.
    """
    finite = torch.stack([x.isfinite().view(len(x), -1).all(-1) for x in bar[:3]]).all(0)
    actual, exact, own, nudged = (x[finite].double() for x in (actual, *bar[:3]))
    error, size, room = rms(actual - exact), rms(exact), rms(own - exact) + rms(nudged - exact)
    room *= 1 + 3 / len(own) ** 0.5 if len(own) else 1  # an RMS over N rows is only known to one in sqrt(2 N)
    bound = 1e-12 * size + ULPS * SHRINK * room if dtype == F64 else room + ULPS * torch.finfo(F32).eps * size
    bound += ULPS * bar.statistics
    return "" if error <= bound else f"RMS error {error:.2e} > {bound:.2e} (room {room:.2e}, size {size:.2e})"


@contextmanager
def rounded_once():
    """The textbook with every log-probability moved by one unit in the last place of float32."""
    g, logp = torch.Generator().manual_seed(0), definitions.logp

    def moved(x):
        lp = logp(x)
        sign = torch.randint(0, 2, lp.shape, generator=g).to(lp.device) * 2 - 1
        return lp + torch.where(lp.isinf(), 0, lp.detach() * sign * torch.finfo(F32).eps)

    definitions.logp = moved
    try:
        yield
    finally:
        definitions.logp = logp


def rounded_statistics(case: Case, rows: Batch) -> float:
    """RMS over rows of eps * sum_k |d value / d statistic_k| |statistic_k|: the float64 floor of any such formula."""
    loss, kept = make(case, reduction="none"), []
    declared = loss.row_value

    def watched(moments, *rest):
        kept.extend(x.requires_grad_() for moment in moments for x in moment)
        for x in kept:
            x.retain_grad()
        return declared(moments, *rest)

    loss.__dict__["row_value"] = watched
    with kd.use_backend("reference"):
        value = loss(rows.s.double().requires_grad_(), rows.t.double() if case.needs_teacher else None, rows.y)
    value.sum().backward()
    floor = sum((x.grad * x.detach()).nan_to_num(0, 0, 0).abs() for x in kept if x.grad is not None)
    return torch.finfo(F64).eps * rms(floor)


@lru_cache(maxsize=32)
def bars(case: Case, teacher_grad: bool, *rows: Tensor) -> list[Bar]:
    """For value, ds, dt; kept for the next backend (tensors are keyed by identity)."""
    batch = Batch(*rows)
    exact, own = (textbook(case, batch, dtype, teacher_grad) for dtype in (F64, F32))
    with rounded_once():
        nudged = textbook(case, batch, F64, teacher_grad)
    logits = torch.finfo(F64).eps * (1 + max(x[x.isfinite()].abs().max().item() for x in rows[:2]))
    floors = (rounded_statistics(case, batch), logits, logits)  # of the value; of the gradients' exponents
    return [Bar(*numbers) for numbers in zip(exact, own, nudged, floors, strict=True)]


def faults(case, rows: Batch, actual: Result) -> list[str]:
    """What of `actual` (values, gradients) is too far from the textbook."""
    found = []
    for name, a, bar in zip(Result._fields, actual, bars(case, actual.dt is not None, *rows), strict=True):
        if a is not None and (why := excess(a, bar, rows.s.dtype)):
            found.append(f"{name}: {why}")
    return found
