"""Losses from hidden states: kdkernels.LinearLoss beside the matrix products alone and beside torch, in one run.

    python -m benchmarks.linear                                     the whole table and the memory curve (15 minutes)
    python -m benchmarks.linear --shape 1024x32000x1024 --dtype bfloat16
    python -m benchmarks.linear --json benchmarks/results/linear-cpu.json --plot benchmarks/pages/linear.png

A shape is ROWSxCLASSESxHIDDEN, of student and teacher alike; the work is forward KL, forward and backward, with
gradients of the student's hidden states and head. Times are medians of repeats in which the contenders take turns:

    products    the four matrix products a step cannot do without (student, teacher, d hidden, d head), of all rows at
                once, into given buffers: what everything here is measured in
    LinearLoss  kdkernels, with its default memory budget; "in 64 MiB" with that one
    logits      kdkernels.ForwardKLLoss on whole logits made by F.linear
    eager       torch's own log_softmax and kl_div on whole logits made by F.linear
    torch linear_ce  F.linear_cross_entropy of the teacher's probabilities: forward KL but for a constant; its chunks
                take class indices alone, and so it makes whole logits here
    TRL, Liger  those of `benchmarks.peers` that are installed and run here, Liger in the size of chunks (all rows, half
                or a quarter) that is the fastest for the shape, and its default of 1024 in the memory curve

Memory is the most that torch's allocator held at a time during a step beyond what was there before, gradients included.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import kdkernels as kd

from . import eager, peers
from .harness import about, interleaved, peak_bytes, save

SHAPES = {
    "bfloat16": ["1024x32000x256", "1024x32000x512", "1024x32000x1024", "1024x32000x2048", "512x128256x1024",
                 "64x32000x1024"],
    "float32": ["1024x32000x256", "1024x32000x512", "1024x32000x1024", "64x32000x1024"],
}  # fmt: skip
PROMISED = 1.15  # times the products, from hidden size 1024 on
CURVE = 1024, 32000  # rows and classes of the curve over hidden sizes
MISSING: dict[str, str] = {}  # peer -> why it is not in the table
MEMORY = dict(rows=(256, 512, 1024, 2048, 4096), classes=32000, hidden=128, dtype="float32")


def contenders(rows: int, classes: int, hidden: int, dtype: str, tune: bool = True) -> tuple[dict, dict]:
    """Name -> one step, forward and backward; and the settings of those that were tuned."""
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    new = lambda *shape: torch.randn(*shape).mul_(shape[-1] ** -0.25 * 1.5).to(kind)  # noqa: E731  (logits of deviation 2)
    h, w, th, tw = new(rows, hidden), new(classes, hidden), new(rows, hidden), new(classes, hidden)
    leaves = h.clone().requires_grad_(), w.clone().requires_grad_()
    textbook, _ = eager.loss("ForwardKLLoss")
    loss = kd.ForwardKLLoss()
    linear, small = kd.LinearLoss(loss), kd.LinearLoss(loss, memory_budget=64 << 20)
    buffers = [torch.empty(rows, classes, dtype=kind), torch.empty(rows, classes, dtype=kind)]
    grads = [torch.empty_like(h), torch.empty_like(w)]

    def products():
        torch.mm(h, w.T, out=buffers[0])
        torch.mm(th, tw.T, out=buffers[1])
        torch.mm(buffers[0], w, out=grads[0])
        torch.mm(buffers[0].T, h, out=grads[1])

    def step(function):
        def run():
            function(*leaves).backward()
            for leaf in leaves:
                leaf.grad = None

        return run

    others, missing, settings = peers.linear("ForwardKLLoss", *leaves, th, tw, tune=tune)
    MISSING.update(missing)
    return {
        "products": products,
        "LinearLoss": step(lambda h, w: linear(h, w, th, tw)),
        "in 64 MiB": step(lambda h, w: small(h, w, th, tw)),
        "logits": step(lambda h, w: loss(F.linear(h, w), F.linear(th, tw))),
        "eager": step(lambda h, w: textbook(F.linear(h, w), F.linear(th, tw), None)),
        **{name: step(function) for name, function in others.items()},
    }, settings


def measure_time(shape: str, dtype: str) -> dict:
    steps, settings = contenders(*map(int, shape.split("x")), dtype)
    return dict(shape=shape, dtype=dtype, ms=interleaved(steps), settings=settings)


def measure_memory(rows: int) -> dict:
    """Of a first step, but not torch's own: what a module keeps for the next one counts. Chunks are the default's."""
    size = rows, MEMORY["classes"], MEMORY["hidden"], MEMORY["dtype"]
    first, found = (contenders(*size, tune=False)[0] for _ in range(2))
    del found["products"]
    return dict(rows=rows, bytes={name: peak_bytes(step) for name, step in found.items() if not first[name]()})


def plot(found: dict, path: Path) -> None:
    """Time over hidden sizes, of the shapes that differ in nothing else, and memory over rows."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    names = list(dict.fromkeys(n for r in found["time"] for n in r["ms"] if n != "products"))
    rows, classes = CURVE
    for dtype, style in (("bfloat16", "-"), ("float32", "--")):
        curve = [(int(r["shape"].split("x")[2]), r["ms"]) for r in found["time"]
                 if r["dtype"] == dtype and r["shape"].startswith(f"{rows}x{classes}x")]  # fmt: skip
        for k, name in enumerate(names):
            left.plot([size for size, _ in curve], [ms[name] / ms["products"] for _, ms in curve], style, color=f"C{k}",
                      marker="o", ms=4, label=name if dtype == found["time"][0]["dtype"] else None)  # fmt: skip
    left.axhline(1, color="black", lw=0.8)
    left.axhline(PROMISED, color="black", lw=0.8, ls=":")
    left.set(xscale="log", yscale="log", ylabel="time of a step / the four matrix products alone")
    left.set_xlabel(f"hidden size ({rows} rows, {classes} classes; solid bfloat16, dashed float32)")
    sizes = sorted({int(r["shape"].split("x")[2]) for r in found["time"]})
    left.set_xticks(sizes, labels=map(str, sizes), minor=False)
    left.set_yticks(ticks := (1, 1.5, 2, 3, 5, 10, 20), labels=map(str, ticks))
    for k, name in enumerate(names):
        right.plot([r["rows"] for r in found["memory"]], [r["bytes"][name] / 2**20 for r in found["memory"]],
                   color=f"C{k}", marker="o", ms=4)  # fmt: skip
    right.set(xscale="log", yscale="log", ylabel="peak memory of a step, gradients included (MiB)")
    right.set_xlabel(f"rows ({MEMORY['classes']} classes, hidden size {MEMORY['hidden']}, {MEMORY['dtype']})")
    right.set_xticks(MEMORY["rows"], labels=map(str, MEMORY["rows"]))
    for axes in (left, right):
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(f"{found['machine']}; commit {found['commit']}", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--shape", nargs="+", help="these ROWSxCLASSESxHIDDEN, and no memory curve")
    parser.add_argument("--dtype", choices=list(SHAPES))
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: 2)")
    parser.add_argument("--json", type=Path, help="write what was measured here")
    parser.add_argument("--plot", type=Path, help="draw it here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 150)
    found = {**about(), "time": [], "memory": []}
    table, names = Table(), ()
    for dtype in [options.dtype] if options.dtype else SHAPES:
        for shape in options.shape or SHAPES[dtype]:
            console.print(f"{shape} {dtype} ...", highlight=False)
            found["time"].append(result := measure_time(shape, dtype))
            ms = result["ms"]
            if not names:
                names = tuple(ms)
                table = Table("shape", "dtype", *names, "ratio", f"<= {PROMISED}", "<= eager")
            ratio = ms["LinearLoss"] / ms["products"]
            kept = ("yes" if ratio <= PROMISED else "NO") if int(shape.split("x")[2]) >= 1024 else ""
            save(found, options.json)
            table.add_row(shape, dtype, *(f"{ms[n]:.1f}" for n in names), f"{ratio:.3f}", kept,
                          "yes" if ms["LinearLoss"] <= ms["eager"] else "NO")
    for rows in () if options.shape else MEMORY["rows"]:
        console.print(f"memory of {rows} rows ...", highlight=False)
        found["memory"].append(measure_memory(rows))
        save(found, options.json)
    console.print(table)
    console.print(f"milliseconds, medians; ratio: LinearLoss / products; {found['machine']}; commit {found['commit']}; "
                  f"load of the machine at the start {found['load']:.1f}")  # fmt: skip
    found["missing"] = MISSING
    save(found, options.json)
    for name, why in MISSING.items():
        console.print(f"{name} is not in the table: {why}", highlight=False)
    for row in found["memory"]:
        console.print(f"{row['rows']} rows: " + ", ".join(f"{n} {b / 2**20:.0f} MiB" for n, b in row["bytes"].items()))
    if options.plot:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
