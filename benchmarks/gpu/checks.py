"""What has to be right on a device before its times mean anything: one backend, in one form of its step."""

import time
import traceback

import torch

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(BF16, BF16), (F32, F32), (F16, F16), (BF16, F32), (F32, BF16), (F16, BF16)]
WIDTHS = (1000, 128256, 50257, 1001, 32000, 3, 1)
REGIMES = {"scale 50": dict(scale=50.0), "scale 0.01": dict(scale=0.01), "offset 300": dict(offset=300.0),
           "saturated": dict(saturated=60.0), "-inf": dict(scale=3.0)}  # fmt: skip


def count_of(width):
    return 256 if width <= 1001 else 16 if width <= 50257 else 8


def batches(tiny, quick):
    """(name, what tests/accuracy.py draws it from, its dtypes), the most telling first."""
    widths = (9, 1) if tiny else WIDTHS[:3] if quick else WIDTHS
    dtypes = DTYPES[:1] if tiny else DTYPES[:3] if quick else DTYPES
    size = lambda width: dict(N=2 if tiny else count_of(width), V=width)  # noqa: E731
    named = lambda what, pair: f"{what} {'+'.join(dict.fromkeys(str(x)[6:] for x in pair))}"  # noqa: E731
    plain = [(named(f"V={w}", pair), dict(**size(w), scale=3.0), pair) for pair in dtypes for w in widths]
    hard = [(named(f"{name} V={w}", pair), dict(**size(w), **more), pair)
            for w in widths[:1] + widths[2:3] for pair in dtypes[:2] for name, more in REGIMES.items()]  # fmt: skip
    return plain[: len(widths)] + hard + plain[len(widths) :]


def draw(name, what, dtypes, device):
    """A batch on the device; nothing of it is kept but what `accuracy.bars` does."""
    from accuracy import Batch, batch

    rows = batch.__wrapped__(**what, s_dtype=dtypes[0], t_dtype=dtypes[1])
    if name.startswith("-inf"):  # never at the label: on both sides, then on the teacher's, the student's or neither
        at = (rows.y[:, None] + torch.arange(1, 4)) % what["V"]
        row = torch.arange(what["N"])
        rows.s[row, at[:, 0]] = rows.t[row, at[:, 0]] = -torch.inf
        rows.t[row[::3], at[::3, 1]] = -torch.inf
        rows.s[row[1::3], at[1::3, 2]] = -torch.inf
    return Batch(*(x.to(device) for x in rows))


def accuracy(found, save, end, backend, device, options):
    """tests/accuracy.py: no further from the textbook in float64 than the textbook in float32, a few ulp apart."""
    from accuracy import Result, bars, faults, make, only, run
    from textbook import CASES

    tiny = options.dry_run
    cases = [c for c in CASES if c.name == ("BrierLoss" if backend == "triton" else "KDLoss")] if tiny else CASES
    plan = [(case, *batch) for batch in batches(tiny, options.quick) for case in cases]
    found.update(planned=len(plan), checked=0, faults=[])
    last = rows = None
    for case, name, what, dtypes in plan:
        if time.monotonic() > end or len(found["faults"]) > 60:
            break
        standardizes = case.options.get("standardize")
        if not (standardizes and (what["V"] < 3 or name.startswith("-inf"))):  # a row without a deviation
            if name != last:
                bars.cache_clear()  # of the last batch
                last, rows = name, draw(name, what, dtypes, device)
            try:
                got = run(case, backend, rows)
                wrong = faults(case, rows, got)
                if dtypes[0] == F16 and not standardizes:  # backward() takes another way in float16
                    with only(backend):
                        teacher = rows.t if case.needs_teacher else None
                        slope = make(case, reduction="sum").value_and_grad(rows.s, teacher, rows.y)[1]
                    wrong += [f"step: {fault}" for fault in faults(case, rows, Result(got.value, slope))]
            except (RuntimeError, AssertionError, ValueError, TypeError) as error:
                wrong = [f"{type(error).__name__}: {error}"[:400]]
                if device == "cuda":
                    torch.cuda.synchronize()  # an error that stays ends this step
            if wrong:
                found["faults"].append({"case": str(case), "batch": name, "faults": wrong})
                print(case, name, *wrong, flush=True)
        found["checked"] += 1
        if found["checked"] % 20 == 0:
            save()


def pair(device, N, V, dtype=BF16):
    s, t = (torch.randn(N, V, device=device).mul_(3).to(dtype) for _ in "st")
    return s, t, torch.randint(V, (N,), device=device)


def repeats_to_the_bit(kd, device, N, V):
    s, t, y = pair(device, N, V)
    for loss in (kd.KDLoss(), kd.AlphaBetaLoss(0.2, 0.7), kd.DKDLoss()):
        value, gradient = loss.value_and_grad(s, t, y)
        again, second = loss.value_and_grad(s, t, y)
        assert torch.equal(value, again) and torch.equal(gradient, second), type(loss).__name__


def in_place(kd, device, N, V):
    for dtype in (BF16, F32):
        for cut in (0, 1):  # odd widths are not aligned
            s, t, y = pair(device, N, V - cut, dtype)
            value, gradient = kd.DKDLoss().value_and_grad(s, t, y % (V - cut))
            again, out = kd.DKDLoss().value_and_grad(s, t, y % (V - cut), out=s)
            assert out is s and torch.equal(value, again) and torch.equal(s, gradient), (dtype, cut)


def strided_and_odd_views(kd, device, N, V):
    wide = torch.randn(2, 3, 4, V + 8, device=device).mul_(3)
    for dtypes in DTYPES[:4]:
        for first in (0, 1, 3, 7):
            s = wide[0].to(dtypes[0])[:, 1:, first : first + V]
            t = wide[1].to(dtypes[1])[:, 1:, 2 : 2 + V]
            y = torch.arange(9, device=device).view(3, 3) % V
            value, gradient = kd.KDLoss().value_and_grad(s, t, y)
            plain, expected = kd.KDLoss().value_and_grad(s.contiguous(), t.contiguous(), y)
            error = (gradient.double() - expected.double()).norm() / expected.double().norm()
            assert abs(value - plain) <= 1e-5 * plain and error <= 4 * torch.finfo(dtypes[0]).eps, (dtypes, first)


def labels_out_of_range(kd, device, N, V):
    s, t, y = pair(device, N, V, F32)
    y[1], y[3] = V, -7
    for loss in (kd.KDLoss, kd.DKDLoss):
        value = loss(reduction="none")(s, t, y)
        gradient = loss(reduction="sum").value_and_grad(s, t, y)[1]
        assert value[[1, 3]].isnan().all() and not gradient[[1, 3]].any(), loss.__name__
        assert value[[0, 2]].isfinite().all() and gradient[[0, 2]].isfinite().all(), loss.__name__


def rows_left_out_and_padding(kd, device, N, V):
    s, t, y = pair(device, N, V, F32)
    y, live = y % (V // 2), V - V // 4
    y[::3], s[::3], s[:, live:], t[:, live:] = -100, torch.nan, torch.nan, torch.inf
    weight = torch.linspace(0, 2, N, device=device)
    value, gradient = kd.KDLoss().value_and_grad(s, t, y, vocab_size=live, row_weight=weight)
    with kd.use_backend("reference"):
        leaf = s.double().requires_grad_()
        expected = kd.KDLoss()(leaf, t.double(), y, vocab_size=live, row_weight=weight)
        expected.backward()
    assert abs(value - expected) <= 1e-6 * expected and not gradient[::3].any() and not gradient[:, live:].any()
    assert (gradient - leaf.grad).abs().max() < 1e-6 * leaf.grad.abs().max()


def incoming_gradients(kd, device, N, V):
    s, t, _ = pair(device, N, V, F32)
    leaf, loss = s.requires_grad_(), kd.ForwardKLLoss()
    gradients = [torch.autograd.grad(loss(leaf, t) * factor, leaf)[0] for factor in (1.0, 0.5, 0.25, 0.3)]
    for factor, gradient in zip((0.5, 0.25), gradients[1:3], strict=True):
        assert torch.equal(gradient, gradients[0] * factor), factor
    assert torch.allclose(gradients[3], gradients[0] * 0.3, rtol=1e-6, atol=0)
    value = loss(leaf, t)
    first, second = (torch.autograd.grad(value, leaf, retain_graph=True)[0] for _ in "12")
    error = (first - second).norm() / first.norm()  # the second is made by launches of its own
    assert error <= 4e-6, f"a second backward: {error:.1e}"


def rank_losses(kd, device, N, V):
    """Those the backend has kernels for, of a few rows, against their float64 definition; twice the same bits."""
    losses = (kd.SpearmanLoss(), kd.SpearmanLoss(top_k=64), kd.PearsonLoss("probs"), kd.PlackettLuceLoss(),
              kd.KendallLoss(top_k=32), kd.KendallLoss("shifts", shifts=4, seed=0))  # fmt: skip
    for dtype, bound in ((BF16, 4e-3), (F32, 1e-3)):
        s, t, _ = pair(device, 2, V, dtype)
        s = (0.7 * t + 0.5 * s).to(dtype)
        for loss in losses:
            try:
                value, gradient = loss.value_and_grad(s, t)
            except kd.BackendUnavailable:
                continue
            again, second = loss.value_and_grad(s, t)
            with kd.use_backend("reference"):
                want, slope = loss.value_and_grad(s.double(), t.double())
            error = (gradient.double() - slope).norm() / slope.norm()
            assert torch.equal(value, again) and torch.equal(gradient, second), repr(loss)
            assert abs(value - want) <= 1e-4 and error <= bound, f"{loss!r} {dtype}: {value - want:.1e} {error:.1e}"


def metrics(kd, device, N, V):
    """The exact rank metrics of random, tied and constant rows, of infinities and both zeros: those of the CPU."""
    for dtype in (BF16, F32):
        a, b, _ = pair(device, 6, V, dtype)
        a[1], b[1], a[2], a[3, ::2], b[3, 1::3] = a[1].round(), b[1].round(), 1.5, -torch.inf, torch.inf
        a[4], b[5, V // 2] = torch.where(b[4] > 0, 0.0, -0.0), torch.nan
        for name in kd.metrics.__all__:
            rows = (a,) if name == "rankdata" else (a, b)
            found = getattr(kd.metrics, name)(*rows)
            with kd.use_backend("cpu"):
                want = getattr(kd.metrics, name)(*(x.cpu() for x in rows))
            torch.testing.assert_close(found.cpu(), want, rtol=0, atol=4e-15, equal_nan=True)


def more_than_2_31_logits(kd, device, N, V):
    s, t, y = pair(device, 17000, 128256)
    _, gradient = kd.KDLoss(reduction="sum").value_and_grad(s, t, y)
    _, last = kd.KDLoss(reduction="sum").value_and_grad(s[-8:], t[-8:], y[-8:])
    assert torch.equal(gradient[-8:], last)


def graphs(kd, device, N, V):
    """Captured once, replayed on other logits: value_and_grad, and forward with backward."""
    s, t, y = pair(device, N, V)
    other = pair(device, N, V)
    loss, leaf = kd.KDLoss(), s.clone().requires_grad_()

    def direct():
        return loss.value_and_grad(s, t, y)

    def backward():
        value = loss(leaf, t, y)
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    for function in (direct, backward):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            value, gradient = function()
        for x, new in zip((s, t, y), other, strict=True):
            x.copy_(new)
        leaf.data.copy_(other[0])
        graph.replay()
        expected = loss.value_and_grad(*other)
        assert torch.allclose(value, expected[0], rtol=1e-6), function.__name__
        error = (gradient.float() - expected[1].float()).norm() / expected[1].float().norm()
        assert error < 1e-2, f"{function.__name__}: {error:.1e}"


def waits_for_nothing(kd, device, N, V):
    """No call that makes the host wait for the device."""
    s, t, y = pair(device, N, V)
    leaf, loss = s.clone().requires_grad_(), kd.KDLoss()
    for mode in ("default", "error"):  # the first time programs are copied to the device
        torch.cuda.set_sync_debug_mode(mode)
        try:
            loss(leaf, t, y).backward()
            loss(leaf, t, y, temperature=3.0).backward()
            loss.value_and_grad(s, t, y)
            kd.SpearmanLoss()(leaf, t, y).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def memory(kd, device, N, V):
    s, t, y = pair(device, 1024, 128256)
    leaf, loss = s.requires_grad_(), kd.KDLoss()
    for name, function in (("value_and_grad", lambda: loss.value_and_grad(s.detach(), t, y)),
                           ("backward", lambda: torch.autograd.grad(loss(leaf, t, y), leaf))):  # fmt: skip
        function()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        extra = torch.cuda.max_memory_allocated() - before
        assert extra <= 1.01 * s.nbytes, f"{name}: {extra / s.nbytes:.3f} of the gradient"


EVERYWHERE = (repeats_to_the_bit, in_place, strided_and_odd_views, labels_out_of_range, rows_left_out_and_padding,
              incoming_gradients, rank_losses, metrics)  # fmt: skip


def check(backend, form, found, save, end, device, options):
    import kdkernels as kd
    from kdkernels.backends import cuda

    cuda.form = form
    torch.manual_seed(0)
    if (reason := kd.available_backends()[backend]) != "ok":
        found["unavailable"] = reason
        return
    found["properties"] = {}
    tests = [(f, size) for f in EVERYWHERE for size in ((96, 1000), (96, 50304))]
    if options.dry_run:  # Triton's interpreter is slow
        tests = [(f, (5, 8)) for f in EVERYWHERE[3 if backend == "triton" else 0 :]]
    if device == "cuda":
        tests += [(f, (64, 50257)) for f in (waits_for_nothing, graphs, memory, more_than_2_31_logits)]
    for function, (N, V) in tests:
        key = f"{function.__name__} {N}x{V}"
        try:
            with kd.use_backend(backend):
                function(kd, device, N, V)
            if device == "cuda":
                torch.cuda.synchronize()
            found["properties"][key] = "ok"
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            found["properties"][key] = f"{type(error).__name__}: {error}"[:400]
            traceback.print_exc()
        save()
    accuracy(found, save, end, backend, device, options)


def tiny():
    """What the sanitizer watches: every kernel of the CUDA backend, on rows of a few thousand classes."""
    import kdkernels as kd
    from kdkernels.backends import cuda

    with kd.use_backend("cuda"):
        for form in (1, 2):
            cuda.form = form
            for V, dtype in ((1001, F32), (40000, BF16)):
                s, t = (torch.randn(5, V).mul_(3).to(dtype).cuda().requires_grad_() for _ in "st")
                y = torch.tensor([0, 7, V - 1, -100, V]).cuda()
                for loss in (kd.KDLoss(), kd.DKDLoss(), kd.AlphaBetaLoss(0.0, 0.0)):
                    loss(s, t.detach(), y).backward(torch.tensor(0.5).cuda())
                    loss(s, t, y).backward()
                    loss.value_and_grad(s.detach().clone(), t.detach(), y)
                if dtype == BF16:
                    kd.SpearmanLoss()(s, t.detach()).backward()
    torch.cuda.synchronize()
    print("the kernels ran")
