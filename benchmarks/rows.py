"""Losses on logits: kdkernels beside eager torch, torch.compile and the machine, interleaved in one run.

    python -m benchmarks.rows --backend cpu                      the whole table (some 10 minutes)
    python -m benchmarks.rows --backend cpu --only Forward --shape 512x128256 --dtype float32
    python -m benchmarks.rows --backend cpu --json result.json   and what was measured, for a machine to read

Times are medians of repeats in which the contenders take turns; ratios are of those. The floors are what the machine
itself takes at best in the same run: `bytes` to read both logits and write the gradient once, `exp` for the
exponentials as executed at the rate of the library's own exponential in L1, `faults` to have the operating system hand
out the gradient's pages (2 MB each, from 8 MB on). `of_floor` is the largest of the three over our time: none of them
can be beaten, so 1 is the end.
"""

import argparse
import mmap
from pathlib import Path

import torch

import kdkernels as kd

from . import eager
from .harness import about, interleaved, machine, save, step

LOSSES = {
    "ForwardKL": ("ForwardKLLoss", {}), "TTM": ("TTMLoss", {"gamma": 0.3}), "WTTM": ("WTTMLoss", {"gamma": 0.5}),
    "KD": ("KDLoss", {"alpha": 0.3}), "AlphaBeta": ("AlphaBetaLoss", {"alpha": 0.2}),
    "Renyi": ("RenyiLoss", {"alpha": 0.5}), "DKD": ("DKDLoss", {"alpha": 1.0}),
}  # fmt: skip
FIRST = ("ForwardKL", "TTM", "WTTM", "KD")
# (shape, dtype, mode) -> the least ratios to (eager, torch.compile) that the library promises: for FIRST, for the rest.
PROMISED = {
    ("512x128256", "float32", "step"): ((8, 2.4), (6, 1.8)), ("512x128256", "bfloat16", "step"): ((6.5, 2.4), (6, 1.8)),
    ("512x128256", "float32", "out"): ((11, 3), None), ("512x128256", "bfloat16", "out"): ((11, 3), None),
    ("512x128256", "float32", "forward"): ((12, 2.2), None),
    ("4096x1000", "float32", "step"): ((3, 1.2), (3, 1.2)), ("64x32000", "float32", "step"): ((3, 1.2), (3, 1.2)),
    ("256x1000", "float32", "step"): ((1, 1), (1, 1)), ("64x100", "float32", "step"): ((1, 1), (1, 1)),
}  # fmt: skip
MODES = {"step": "forward + backward", "out": "the same, gradient into a given buffer", "forward": "forward, no_grad"}


def machine_rates(s: torch.Tensor, t: torch.Tensor) -> dict[str, float]:
    """The best seen: milliseconds to read s and t, write one, fault its pages in; exponentials a millisecond."""
    buffer = torch.empty_like(s)

    def fault():
        pages = mmap.mmap(-1, max(s.nbytes, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE") and s.nbytes >= 8 << 20:
            pages.madvise(mmap.MADV_HUGEPAGE)
        torch.frombuffer(pages, dtype=s.dtype, count=s.numel()).zero_()

    found = interleaved({
        "read": lambda: (s.view(torch.uint8).view(-1)[: s.nbytes // 8 * 8].view(torch.int64).amax(),
                         t.view(torch.uint8).view(-1)[: t.nbytes // 8 * 8].view(torch.int64).amax()),
        "write": lambda: buffer.zero_(), "fresh": fault,
    }, pick=min)  # fmt: skip
    fresh = found.pop("fresh")
    found["faults"] = max(fresh - found["write"], 0.0) if s.nbytes >= 8 << 20 else 0.0
    short, long = torch.linspace(-20, 0, 1 << 11), torch.linspace(-20, 0, 1 << 13)
    best = interleaved({n: lambda x=x: torch.ops.kdkernels.exp2(x) for n, x in (("a", short), ("b", long))}, pick=min)
    slope = (best["b"] - best["a"]) / (long.numel() - short.numel())  # without the cost of a call
    found["exponentials"] = torch.get_num_threads() / slope
    return found


def tilts(loss, s, t, y) -> tuple[list, list]:
    """Coefficients (student, teacher) of the exponentials of a class: of the statistics, and of the gradient."""
    with kd.use_backend("cpu"), torch.no_grad():
        program, ops = loss._single, torch.ops.kdkernels
        stats = ops.reduce(s[None, :1], t[None, :1], y[:1], None, program.args, program.code, s.shape[1], -100)
        _, coef = ops.rows(stats, program.args, program.code, 1)
    pairs, sloped = coef[0, 0, :-1, 1:3], (coef[0, 0, :-1, 3:9] != 0).any(-1)
    return pairs.tolist(), pairs[sloped].tolist()


def executed(loss, s, t, y) -> tuple[int, int]:
    """Exponentials a class: of the statistics, and of the gradient."""
    first, second = tilts(loss, s, t, y)
    return len(first), len(second)


def measure(name, shape, dtype, modes, compile_too):
    rows, classes = map(int, shape.split("x"))
    torch.manual_seed(0)
    s, t = (torch.randn(rows, classes).mul_(3).to(getattr(torch, dtype)) for _ in "st")
    y, leaf = torch.randint(classes, (rows,)), s.clone().requires_grad_()
    cls, options = LOSSES[name]
    textbook, case = eager.loss(cls, **options)
    loss = getattr(kd, cls)(**case.options)
    torch._dynamo.reset()
    compiled = torch.compile(textbook, dynamic=False)

    def forward(function):
        @torch.no_grad()
        def run():
            function(s, t, y)

        return run

    rates, buffer, out = machine_rates(s, t), torch.empty_like(s), []
    first, second = executed(loss, s, t, y)
    for mode in modes:
        wrap = forward if mode == "forward" else lambda function: step(function, leaf, t, y)
        contenders = {"eager": wrap(textbook), **({"compile": wrap(compiled)} if compile_too else {})}
        ours = wrap(loss) if mode != "out" else lambda: loss.value_and_grad(s, t, y, out=buffer)
        times = interleaved({**contenders, "kdkernels": ours})
        floors = {"bytes": rates["read"], "exp": first * rows * classes / rates["exponentials"]}
        if mode != "forward":
            floors["bytes"] += rates["write"]
            floors["exp"] += second * rows * classes / rates["exponentials"]
            floors["faults"] = rates["faults"] if mode == "step" else 0.0
        out.append(dict(loss=name, shape=shape, dtype=dtype, mode=mode, ms=times, floors=floors, exps=(first, second)))
    return out


def report(result, target):
    ms, floors = result["ms"], result["floors"]
    ours = ms["kdkernels"]
    ratios = [ms[other] / ours for other in ("eager", "compile") if other in ms]
    kept = "" if target is None else "yes" if all(a >= b for a, b in zip(ratios, target, strict=False)) else "NO"
    show = lambda x: f"{x:.3g}"  # noqa: E731
    return [result["loss"], result["shape"], result["dtype"], result["mode"], *(show(ms.get(k, float("nan"))) for k in
            ("eager", "compile", "kdkernels")), *(f"{r:.1f}x" for r in ratios), *[""] * (2 - len(ratios)),
            " / ".join(f"{show(v)} {k}" for k, v in floors.items()), f"{max(floors.values()) / ours:.2f}",
            "" if target is None else f"{target[0]}x, {target[1]}x: {kept}"]  # fmt: skip


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rows", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--backend", choices=["cpu"], default="cpu", help="the backend to measure (default: cpu)")
    parser.add_argument("--only", default="", help="losses whose name contains this")
    parser.add_argument("--shape", help="one ROWSxCLASSES, such as 512x128256")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: 2)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it takes most of the time)")
    parser.add_argument("--json", type=Path, help="write what was measured here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    from rich.console import Console
    from rich.table import Table

    table = Table(*"loss shape dtype mode eager compile kdkernels xeager xcompile floors,ms of_floor promised".split())
    cells = list(dict.fromkeys((shape, dtype) for shape, dtype, _ in PROMISED))
    cells = [c for c in cells if options.shape in (None, c[0]) and options.dtype in (None, c[1])]
    console, results = Console(), []
    for shape, dtype in cells:
        for name in (n for n in LOSSES if options.only.lower() in n.lower()):
            promises = {cell[2]: p for cell, p in PROMISED.items() if cell[:2] == (shape, dtype)}
            modes = [mode for mode, promise in promises.items() if promise[name not in FIRST]]
            console.print(f"{name} {shape} {dtype} ...", highlight=False)
            for result in measure(name, shape, dtype, modes, not options.no_compile):
                results.append(result)
                table.add_row(*report(result, promises[result["mode"]][name not in FIRST]))
            save({**about(), "results": results}, options.json)
    console.print(table)
    console.print(f"milliseconds, medians; {machine()}")


if __name__ == "__main__":
    main()
