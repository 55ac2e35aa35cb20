"""Batches, the way a loss is run on one backend, and how close it has to come to the textbook."""

from collections import Counter
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from textbook import Case
from torch import Tensor

import kdkernels as kd

# Only cuda may be missing; any other backend that is not there makes its tests fail, with the reason.
BACKENDS = [name for name in kd.backends.NAMES if name != "cuda" or kd.available_backends()["cuda"] == "ok"]
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


def make(case: Case, **options):
    return getattr(kd, case.name)(**case.options, **options)


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


def excess(actual: Tensor, exact: Tensor, own: Tensor, dtype) -> str:
    """Why `actual` is too far from `exact`, or "". `own` is what the textbook gives in the arithmetic of `dtype`.

    float32 and less (computed in float32): RMS error <= the textbook's own RMS error + a few ulp.
    float64: relative RMS error <= 1e-12, beyond the textbook's own rounding error, which is that of float32 scaled.
    Rows that overflow (negative powers do) are left out.
    """
    finite = (exact.isfinite() & own.isfinite()).view(len(exact), -1).all(-1)
    if not finite.any():
        return ""
    actual, exact, own = (x[finite].double() for x in (actual, exact, own))
    error, own_error, size = rms(actual - exact), rms(own - exact), rms(exact)
    if dtype == F64:
        bound = 1e-12 * size + ULPS * SHRINK * own_error
    else:
        bound = own_error + ULPS * torch.finfo(F32).eps * size
    return "" if error <= bound else f"RMS error {error:.2e} > {bound:.2e} (textbook {own_error:.2e}, size {size:.2e})"


@lru_cache(maxsize=32)
def verdicts(case: Case, teacher_grad: bool, *rows: Tensor) -> tuple[Result, Result]:
    """The truth and the textbook's own float32 result, kept for the next backend (tensors are keyed by identity)."""
    return tuple(textbook(case, Batch(*rows), dtype, teacher_grad) for dtype in (F64, F32))


def faults(case, rows: Batch, actual: Result) -> list[str]:
    """What of `actual` (values, gradients) is too far from the textbook."""
    exact, own = verdicts(case, actual.dt is not None, *rows)
    found = []
    for name, a, e, o in zip(Result._fields, actual, exact, own, strict=True):
        if a is not None and (why := excess(a, e, o, rows.s.dtype)):
            found.append(f"{name}: {why}")
    return found
