"""The C++ backend by itself: exponential, threads, instruction sets, gradients in place, memory and accuracy."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from accuracy import BF16, F16, F32, F64, LOWER, Batch, batch, make, only, process, rms, run, run_with, textbook
from textbook import CASES

import kdkernels as kd

CASE = {str(case): case for case in CASES}
NAMES = ["KDLoss-alpha=0.3-temperature=3.0", "WTTMLoss-gamma=0.5", "AlphaBetaLoss-alpha=0.2-beta=0.7",
         "DKDLoss-alpha=1.0-beta=8.0", "TAIDLoss-tau=0.4", "LogitMSELoss", "JSDLoss"]  # fmt: skip
some_cases = pytest.mark.parametrize("case", [CASE[name] for name in NAMES], ids=str)


def test_the_exponential_is_good_to_an_ulp():
    """1.1 units in the last place with fused multiply-add, 1.4 without: all bfloat16 inputs, dense float32 and float64.

    Below the smallest normal number 0 or gradual underflow, NaN for NaN.
    """
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(BF16).float()
    dense = torch.linspace(-126, 1, 4_000_003)
    for x in (every[(every >= -126) & (every <= 1)], dense, dense / 100, dense.double() * 8, dense.double() / 100):
        got, x = torch.ops.kdkernels.exp2(x).numpy(), x.numpy()
        want = np.exp2(x.astype(np.longdouble))
        inside = x >= (-126 if got.dtype == np.float32 else -1022)
        ulps = np.abs(got[inside] - want[inside]) / np.spacing(want[inside].astype(got.dtype))
        assert ulps.max() <= 1.4, (got.dtype, ulps.max(), x[inside][ulps.argmax()])
    low = torch.ops.kdkernels.exp2(torch.tensor([-127.0, -1e4, -1e30, torch.nan, 0.0]))
    assert low[0] in (0, 2.0**-127)
    assert low[1:3].eq(0).all() and low[3].isnan() and low[4] == 1


@pytest.mark.parametrize("isa", LOWER)
def test_the_exponential_of_a_lower_instruction_set(isa):
    process(isa).submit(test_the_exponential_is_good_to_an_ulp).result()


@some_cases
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
def test_step_is_reduce_rows_and_spread(case, dtype):
    """The gradient made with the value, the one of a second backward and the scaled one, against the separate way."""
    rows = batch(40, 300, scale=2.0, s_dtype=dtype)
    teacher = rows.t if case.needs_teacher else None
    loss = make(case)
    s, both = rows.s.clone().requires_grad_(), rows.t.clone().requires_grad_()
    (apart,) = torch.autograd.grad(make(case, reduction="none")(s, teacher, rows.y).sum() / len(rows.y), s)
    with only("cpu"):
        value = loss(s, teacher, rows.y)
        first = torch.autograd.grad(value, s, retain_graph=True)[0].clone()
        second = torch.autograd.grad(value, s, retain_graph=True)[0]
        halved, thirded = (torch.autograd.grad(loss(s, teacher, rows.y) * f, s)[0] for f in (0.5, 1 / 3))
    assert torch.equal(first, second)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)  # noqa: E731
    close(first, apart)
    close(halved, first / 2)
    close(thirded, first / 3)
    if case.needs_teacher:
        assert torch.equal(torch.autograd.grad(loss(s, both, rows.y), s)[0], first)


@some_cases
@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
def test_value_and_grad(case, backend):
    """Into a new tensor, a given one, a strided one and the student itself: what backward gives."""
    rows, loss = batch(6, 40, s_dtype=F32), make(case)
    teacher, leaf = rows.t if case.needs_teacher else None, rows.s.clone().requires_grad_()
    given, itself = torch.empty_like(rows.s), rows.s.clone()
    strided = torch.empty(40, 6).T
    with only(backend):
        want = loss(leaf, teacher, rows.y)
        want.backward()
        for out in (None, given, strided, itself):
            value, gradient = loss.value_and_grad(itself if out is itself else rows.s, teacher, rows.y, out=out)
            assert out is None or gradient is out
            assert torch.equal(value, want.detach()) and torch.equal(gradient, leaf.grad)
        for out in (given, strided):
            value, total = loss.value_and_grad(rows.s, teacher, rows.y, out=out.fill_(2.0), accumulate=True)
            assert total is out and torch.equal(value, want.detach()) and torch.equal(total, leaf.grad + 2.0)
    assert itself._version >= 1


def test_value_and_grad_says_what_does_not_fit():
    rows = batch(2, 5, s_dtype=F32)
    for out, error in [(rows.s[:, :4], ValueError), (rows.s.double(), ValueError), ([1.0], TypeError)]:
        with pytest.raises(error, match="out must be"):
            kd.ForwardKLLoss().value_and_grad(rows.s, rows.t, out=out)
    with pytest.raises(ValueError, match="reduction"):
        kd.ForwardKLLoss(reduction="none").value_and_grad(rows.s, rows.t)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_peak_memory_is_the_gradient(dtype):
    """What a step adds to the resident memory of the process, measured by the kernel."""
    code = f"""if True:
        import torch, kdkernels as kd
        from pathlib import Path
        def status(key):
            text = Path("/proc/self/status").read_text()
            return int(text.split(key + ":")[1].split()[0]) * 1024
        s, t = (torch.zeros(256, 128256, dtype={dtype}) for _ in "st")
        y, loss = torch.arange(256), kd.KDLoss()
        loss(s[:2].clone().requires_grad_(), t[:2], y[:2]).backward()
        s.requires_grad_()
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        loss(s, t, y).backward()
        print(status("VmHWM") - before - s.grad.nbytes)"""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("no /proc/self/clear_refs to reset the peak with")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 2 << 20, f"{int(done.stdout) / 2**20:.1f} MB beyond the gradient"


ACCURATE = [CASE[name] for name in ("ForwardKLLoss", "TTMLoss-gamma=0.3", "RenyiLoss-alpha=0.5", *NAMES[:4])]


@pytest.mark.parametrize("case", ACCURATE, ids=str)
def test_more_accurate_than_eager(case):
    """float32, RMS over 1,024 rows: value no further from float64 than eager torch's; gradient within 2e-6."""
    for regime in (dict(scale=0.01), dict(), dict(scale=50.0), dict(offset=300.0)):
        sizes = dict(N=1024, V=1000, **regime)
        rows = batch(**sizes, s_dtype=F32)
        exact, eager = textbook(case, rows), textbook(case, rows, F32, False)
        for got in (run(case, "cpu", rows), *(run_with(isa, case, sizes, F32, F32) for isa in LOWER)):
            assert rms(got.value - exact.value) <= rms(eager.value - exact.value), regime
            if "scale" not in regime or regime["scale"] > 1:  # away from s = t
                assert (got.ds - exact.ds).norm() <= 2e-6 * exact.ds.norm(), regime


def test_bfloat16_rows_are_read_as_they_are():
    """A narrow teacher beside a wide student, rows that are not aligned, and a vocabulary of odd width."""
    rows = batch(9, 4099)
    wide = Batch(rows.s.float(), rows.t.bfloat16(), rows.y)
    for case in (CASE["ForwardKLLoss"], CASE["RenyiLoss-alpha=0.5"]):
        a = run(case, "cpu", wide)
        b = run(case, "cpu", Batch(wide.s, wide.t.float(), wide.y))
        torch.testing.assert_close(a.value, b.value, rtol=2**-20, atol=0)  # in another order of summation
        torch.testing.assert_close(a.ds, b.ds, rtol=2**-20, atol=0)
