"""Times on a GPU beside the machine's own roofs, and beside what else computes the loss.

Times are medians of device events; contenders take turns, inputs rotate among sets that together outgrow L2, and the
device is kept busy while the host prepares a call. Bytes are counted at the floor: both logits read once, the gradient
written once. Exponentials are counted as our step executes them.
"""

import itertools
import statistics
import time

import torch

import kdkernels as kd
from kdkernels.backends import cuda

from .. import eager
from ..harness import peak_bytes, turns
from ..rows import LOSSES as ROW_LOSSES
from ..rows import tilts
from .report import OURS, row

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

LOSSES = {"ForwardKL": ROW_LOSSES["ForwardKL"], "ReverseKL": ("ReverseKLLoss", {}), **ROW_LOSSES}
ROWS, WIDTHS = 8192, (128256, 32000, 50257, 151936, 262144)
MODES = ("step", "half", "out", "forward")  # backward(), backward(0.5), value_and_grad(out=), no_grad
ROUNDS = 256

if triton:

    @triton.jit
    def exponentials_kernel(out, ROUNDS: tl.constexpr):
        i = tl.program_id(0) * 1024 + tl.arange(0, 1024)
        x = i.to(tl.float32) * 1e-9
        for _ in range(ROUNDS):
            x = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
        tl.store(out + i, x)


def timed(functions, device, repeats):
    """Milliseconds of each function(i), the median; what fails is its error instead."""
    counts = {name: itertools.count() for name in functions}
    calls = {name: lambda name=name, f=f: f(next(counts[name])) for name, f in functions.items()}
    found = turns(calls, device, least=0, repeats=repeats)
    return {name: x if isinstance(x, str) else statistics.median(x) for name, x in found.items()}


def rates(device):
    """Bytes a millisecond of a copy, read and written; exponentials a millisecond. The best of a few."""
    n = 1 << (30 if device == "cuda" else 12)
    source, target = torch.ones(n, dtype=torch.int16, device=device), torch.empty(n, dtype=torch.int16, device=device)
    blocks = 1 << (15 if device == "cuda" else 2)
    out = torch.zeros(blocks * 1024, device=device)
    run = {"copy": lambda i: target.copy_(source), "exp": lambda i: [out.exp2_() for _ in range(ROUNDS)]}
    if device == "cuda" and triton:
        run["exp"] = lambda i: exponentials_kernel[(blocks,)](out, ROUNDS, num_warps=8)
    ms = timed(run, device, 9)
    return {"copy": 4 * n / ms["copy"], "exp": ROUNDS * out.numel() / ms["exp"]}


def inputs(device, N, V, dtype, sets):
    make = lambda: torch.randn(N, V, device=device, dtype=dtype).mul_(3)  # noqa: E731
    return [(make().requires_grad_(), make(), torch.randint(V, (N,), device=device)) for _ in range(sets)]


def call(function, mode, sets, half, out):
    """function(s, t, y) -> value, the way `mode` says; `function` is a loss of ours where out= is asked for."""

    def run(i):
        s, t, y = sets[i % len(sets)]
        if mode == "forward":
            with torch.no_grad():
                return function(s, t, y)
        if mode == "out":
            return function.value_and_grad(s.detach(), t, y, out=out)
        s.grad = None
        return function(s, t, y).backward(half if mode == "half" else None)

    return run


def on(contender, loss, mode, sets, half, out):
    backend, _, form = contender.partition(" ")
    run = call(loss, mode, sets, half, out)

    def go(i):
        cuda.form = int(form or 0)
        with kd.use_backend(backend):
            return run(i)

    return go


def liger(name):
    """Liger's KL divergence takes log-probabilities, which it is given here. flash-linear-attention has its own only
    together with the linear layer before it."""
    try:
        from liger_kernel.transformers import LigerKLDIVLoss
    except ImportError:
        return None
    if name != "ForwardKL":
        return None
    kl = LigerKLDIVLoss(reduction="batchmean", log_target=True)
    return lambda s, t, y: kl(s.log_softmax(-1), t.log_softmax(-1))


def exponentials(loss, V, mode):
    """How many a class our step executes: one a point for the sums, one a point with a slope for the gradient. Points
    of one row's logits that are twice another are squares of its exponentials."""
    s, t = torch.randn(2, 1, min(V, 4096))
    if kd.available_backends()["cpu"] != "ok":  # it knows which points have a slope
        return len(loss.all_points()) * (1 if mode == "forward" else 2)
    sweeps = tilts(loss, s, t, torch.zeros(1, dtype=torch.int64))
    squares = [sum([2 * b, 2 * a] in points and 0 in (b, a) for b, a in points) for points in sweeps]
    counts = [len(points) - n for points, n in zip(sweeps, squares, strict=True)]
    return counts[0] if mode == "forward" else sum(counts)


def attempt(function, *args):
    """What it returns, or says instead: details are not to cost the times."""
    try:
        return function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]


def extra_bytes(function, device, sets):
    """The most memory a call takes beyond what is there before it."""
    if device != "cuda":
        return None
    for s, *_ in sets:
        s.grad = None  # freed by the call otherwise, and missing in the difference
    return peak_bytes(lambda: function(0), device)


def launches(function, device):
    """Names of the kernels of one call."""
    if device != "cuda":
        return None
    function(0)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function(0)
        torch.cuda.synchronize()
    found = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [name[:90] for name in found if not name.startswith(("Memcpy", "Memset"))]


def wall(functions, device, count=100):
    """Milliseconds a call as the host sees them, one call after another: small batches wait for the host."""
    times = {name: [] for name in functions}
    for _ in range(7):
        for name, function in functions.items():
            begin = time.perf_counter()
            for i in range(count):
                function(i)
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - begin) * 1e3 / count)
    return {name: statistics.median(x) for name, x in times.items()}


def measure_cell(found, name, N, V, dtype, device, ours, rivals):
    cls, options = LOSSES[name]
    textbook, case = eager.loss(cls, **options)
    loss = getattr(kd, cls)(**case.options)
    bytes_of = N * V * dtype.itemsize
    sets = inputs(device, N, V, dtype, 2 if bytes_of > 1 << 26 else 64 if device == "cuda" else 2)
    half, out = torch.tensor(0.5, device=device), torch.empty(N, V, dtype=dtype, device=device)
    others = {"eager": textbook} if rivals else {}
    if "compile" in rivals:
        torch._dynamo.reset()
        others["compile"] = torch.compile(textbook, dynamic=False)
    if rivals and (peer := liger(name)):
        others["liger"] = peer
    for mode in MODES:
        functions = {o: on(o, loss, mode, sets, half, out) for o in ours}
        if mode in ("step", "forward"):
            functions |= {o: call(f, mode, sets, half, out) for o, f in others.items()}
        ms = timed(functions, device, 15 if device == "cuda" else 1)
        good = {o: f for o, f in functions.items() if isinstance(ms[o], float)}
        floor = bytes_of * (2 if mode == "forward" else 3)
        exps = exponentials(loss, V, mode)
        roof = {"bytes": floor / found["rates"]["copy"], "exp": exps * N * V / found["rates"]["exp"]}
        cell = dict(loss=name, shape=[N, V], dtype=str(dtype)[6:], mode=mode, ms=ms, floor=floor, exps=exps, roof=roof)
        found["cells"].append(cell)
        cell["extra"] = {o: attempt(extra_bytes, f, device, sets) for o, f in good.items()}
        if mode == "step" and name in ("ForwardKL", "KD"):  # the profiler takes its time
            cell["kernels"] = {o: attempt(launches, f, device) for o, f in good.items() if o in ours or N < ROWS}
            if N < ROWS:
                cell["wall"] = wall(good, device, 100 if device == "cuda" else 1)
        print(*row(cell, found["rates"]), flush=True)


def plan(options):
    """(loss, rows, classes, dtype, rivals), the most telling first."""
    bf16, f32, every = torch.bfloat16, torch.float32, list(LOSSES)
    if options.dry_run:
        return [("KD", 4, 40, f32, ("eager",)), ("ForwardKL", 2, 24, bf16, ())]
    both = ("eager",) if options.quick else ("eager", "compile")
    cells = [(name, ROWS, 128256, bf16, ()) for name in every]
    cells += [(*at, both) for at in (("ForwardKL", ROWS, 128256, bf16), ("ForwardKL", 256, 1000, bf16),
                                     ("KD", 256, 1000, f32))]  # fmt: skip
    cells += [(name, ROWS, V, bf16, ()) for V in WIDTHS[1:] for name in every]
    if options.quick:
        return cells[:12]
    cells += [(name, ROWS, V, f32, ()) for V in (128256, 32000, 262144) for name in ("ForwardKL", "KD")]
    cells += [(name, ROWS, 128256, bf16, both) for name in every[1:]]
    return cells + [(name, ROWS, V, bf16, both) for V in WIDTHS[1:] for name in ("ForwardKL", "KD")]


def measure(found, save, end, device, options):
    torch.manual_seed(0)
    states = kd.available_backends()
    ours = [o for o in OURS if o not in options.without.split(",") and states[o.split()[0]] == "ok"]
    if options.dry_run:
        ours = [o for o in ours if o != "triton"]  # its interpreter is slow, and not what is tried here
    cells = plan(options)
    found.update(contenders=ours, rates=rates(device), planned=len(cells), done=0, cells=[], errors=[])
    save()
    for cell in cells:
        if time.monotonic() > end:
            break
        try:
            measure_cell(found, *cell[:4], device, ours, cell[4])
        except Exception as error:  # such as out of memory; the other cells are worth having
            found["errors"].append(f"{cell}: {type(error).__name__}: {error}"[:400])
            print(found["errors"][-1], flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
        found["done"] += 1
        save()
