"""`kdkernels bench`: every loss and backend beside eager torch, torch.compile and other libraries, in one run.

A cell is a loss, a shape and a dtype. Its contenders take turns: kdkernels on each backend (with the gradient allocated
and, `out=`, into a given buffer), the formula in eager torch, torch.compile of that, and the peers that have the loss
(`benchmarks/peers.py`). Of each: milliseconds forward and backward (median, and between what half of the calls lie);
GB/s of the bytes none can do without (logits read, gradient written, each once), and what that is of the bandwidth of a
copy that takes turns with them; bytes of an element into and out of operators; bytes at the peak beyond what was there,
gradient included; the distance of value and gradient from the definition in float64, over its norm. Exponentials a
second are those of our own steps, where the loss's points or phi say how many these are; of losses with kernels of
their own the number depends on the data or on torch, and `work` says what it is.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

import kdkernels as kd
from kdkernels.listing import cost, spelled_cost

from . import eager, peers
from .harness import Results, measured, step, traffic

RESULTS = Path(__file__).parent / "results"
SHAPES = {"64x32000": ("float32", "bfloat16"), "4096x1000": ("float32",), "16x131072": ("bfloat16",)}
QUICK_SHAPES = {"64x4000": ("float32",)}
CHECKED = 1 << 24  # elements of which float64 definitions are computed whole; of more, the first rows' gradient
BATCHWISE = ("DISTLoss", "LTKDLoss", "SinkhornLoss")
MANY_ROWS = 512  # Sinkhorn's costs are of all pairs


def backends(device: str) -> list[str]:
    """Those that run here; Triton's interpreter is no contender."""
    fit = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}[device]
    return [name for name in fit if kd.available_backends()[name] == "ok"]


def inputs(shape: str, dtype: str, device: str):
    rows, classes = map(int, shape.split("x"))
    g = torch.Generator().manual_seed(0)
    t = 3 * torch.randn(rows, classes, generator=g)
    s = 0.7 * t + 1.5 * torch.randn(rows, classes, generator=g)
    y = torch.randint(classes, (rows,), generator=g)
    kind = getattr(torch, dtype)
    return s.to(device, kind).requires_grad_(), t.to(device, kind), y.to(device)


def on(backend: str, run: Callable) -> Callable:
    def go():
        with kd.use_backend(backend):
            return run()

    return go


def kernels(loss, s, t, y, backend: str) -> bool:
    """Whether that backend has any of the loss; without one torch makes it, unless a backend is insisted on."""
    try:
        on(backend, lambda: loss(s.detach()[:2], None if t is None else t[:2], y[:2]))()
    except kd.backends.BackendUnavailable:
        return False
    return True


def contenders(name: str, s, t, y, chosen: list[str], compiled: bool) -> tuple[dict, dict[str, str], dict]:
    """Steps by name, why a peer of this loss is missing, and buffers of the steps that do not write to s.grad."""
    loss, formula = eager.pair(name, s.shape[1])
    loss, t = loss.to(s.device), t if loss.needs_teacher else None
    steps, missing, buffers = {}, {}, {}
    for backend in chosen:
        if not kernels(loss, s, t, y, backend):
            steps["kdkernels torch"] = step(loss, s, t, y)
            continue
        steps[f"kdkernels {backend}"] = on(backend, step(loss, s, t, y))
        if backend != "reference" and name not in BATCHWISE:
            out = buffers[f"kdkernels {backend}, out="] = torch.empty_like(s, requires_grad=False)
            write = lambda out=out: loss.value_and_grad(s.detach(), t, y, out=out)[0]  # noqa: E731
            steps[f"kdkernels {backend}, out="] = on(backend, write)
    steps["eager"] = step(formula, s, t, y)
    if compiled:
        torch.compiler.reset()
        steps["compile"] = step(torch.compile(formula, dynamic=False), s, t, y)
    for peer in (p for p in peers.PEERS if p.loss == name and not p.linear):
        function, missing[peer.name] = peers.made(peer, s.device.type)
        if function:
            steps[peer.name] = step(lambda s, t, y, f=function: f(s, t), s, t, y)
    return steps, {k: why for k, why in missing.items() if why}, buffers


def truth(name: str, s, t, y):
    """Value and gradient of the definition in float64; of losses by rank those of our float64 reference, since the
    textbook compares all pairs of classes. Gradient of the first rows alone, and no value, of a large batch."""
    rows = len(s) if s.numel() <= CHECKED or name in BATCHWISE else max(1, CHECKED // 8 // s.shape[1])
    loss, formula = eager.pair(name, s.shape[1])
    leaf, t = s.detach()[:rows].double().requires_grad_(), t[:rows].double() if loss.needs_teacher else None
    with kd.use_backend("reference"):
        value = (loss.to(s.device) if isinstance(loss, kd.RankLoss) else formula)(leaf, t, y[:rows])
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.item() if rows == len(s) else None, gradient * (rows / len(s))


def errors(run: Callable, s, buffer, exact, constant: float = 0.0) -> dict[str, float | None]:
    value, gradient = exact
    got = run().item()
    found = (s.grad if buffer is None else buffer)[: len(gradient)].double()
    off = None if value is None else abs(got - value - constant) / max(abs(value + constant), 1e-300)
    return dict(value=off, gradient=((found - gradient).norm() / gradient.norm()).item())


def measure(name: str, shape: str, dtype: str, device: str, chosen: list[str], compiled: bool = True,
            seconds: float = 4.0) -> dict:  # fmt: skip
    s, t, y = inputs(shape, dtype, device)
    steps, missing, buffers = contenders(name, s, t, y, chosen, compiled)
    loss, exact = eager.pair(name, s.shape[1])[0], truth(name, s, t, y)
    floor = (3 if loss.needs_teacher else 2) * s.nbytes
    clear = lambda: setattr(s, "grad", None)  # noqa: E731
    found = measured(steps, floor, s.detach(), clear, least=0.3, repeats=7, seconds=seconds)
    work = cost(loss)
    shifts = {p.name: float(peers.shift(p, t)) for p in peers.PEERS if p.loss == name and not p.linear}
    for who, cell in found.items():
        if "ms" not in cell:
            continue
        if who != "compile" and device == "cpu":
            cell["moved"] = traffic(steps[who]) / s.numel()
        cell["errors"] = errors(steps[who], s, buffers.get(who), exact, shifts.get(who, 0.0))
        cell["of_eager"] = cell["ms"] / found["eager"]["ms"] if "ms" in found["eager"] else None
        if work and who.startswith("kdkernels") and "reference" not in who:
            cell["exp_s"] = (work.statistics + work.gradient) * s.numel() / cell["ms"] * 1e3
    return dict(loss=name, shape=shape, dtype=dtype, device=device, floor=floor, work=spelled_cost(loss),
                contenders=found, missing=missing)  # fmt: skip


def plan(options) -> list[tuple[str, str, str]]:
    """(loss, shape, dtype) of what was asked for."""
    words = [w.lower() for w in options.loss or [""]]
    names = [name for name in kd.catalogue() if any(w in name.lower() for w in words)]
    usual = QUICK_SHAPES if options.quick else SHAPES
    shapes = dict.fromkeys(options.shape, next(iter(usual.values()))) if options.shape else usual
    cells = [(name, shape, dtype) for shape, usual in shapes.items() for dtype in options.dtype or usual
             for name in names]  # fmt: skip
    return [c for c in cells if c[0] != "SinkhornLoss" or int(c[1].split("x")[0]) <= MANY_ROWS]


def run(options) -> int:
    """Measure what is asked for and not known yet, then print, draw."""
    from . import report

    if options.threads:
        torch.set_num_threads(options.threads)
    options.compile = options.compile and not options.quick
    chosen = options.backend or [b for b in backends(options.device) if b != "reference" or options.quick]
    cells, results = plan(options), Results(options.json, options.device, options.again)
    keys = [" ".join((*cell, options.device, *chosen, *["compile"] * options.compile)) for cell in cells]
    with report.progress(len(cells)) as tell:
        for key, (name, shape, dtype) in zip(keys, cells, strict=True):
            tell(key)
            if key not in results.known:
                made = measure(name, shape, dtype, options.device, chosen, options.compile, 1 if options.quick else 2)
                results.keep(key, made)
    shown = [results.cells[key] for key in keys]
    report.table(shown, results.runs[-1])
    if options.plot:
        report.plot(shown, results.runs[-1], options.plot)
    return 0


def main(arguments=None) -> int:
    from kdkernels.benchmarking import add_flags

    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    return run(add_flags(parser).parse_args(arguments))


if __name__ == "__main__":
    main()
