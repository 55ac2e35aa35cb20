"""Separable losses, and those that sort, group or transport probabilities, beside eager torch and torch.compile.

    python -m benchmarks.separable                                     one thread, float32 and bfloat16
    python -m benchmarks.separable --only JSD --shape 64x128256 --json result.json

Milliseconds, forward and backward, medians of repeats in which the contenders take turns; in brackets what that is of
kdkernels' time. `out=`: the gradient into a given buffer. ForwardKL is there to compare with.
"""

import argparse
from pathlib import Path

import torch

from . import eager
from .harness import about, interleaved, machine, save, step

LOSSES = ("JSD", "SkewKL", "SkewReverseKL", "TVD", "ForwardKL", "AKL", "Sinkhorn", "ULD", "GroupedKL")


def measure(name: str, shape: str, dtype: torch.dtype) -> dict[str, float]:
    rows, classes = map(int, shape.split("x"))
    loss, formula = eager.pair(f"{name}Loss", classes)
    s, t = (3 * torch.randn(2, rows, classes, generator=torch.Generator().manual_seed(0))).to(dtype)
    s, out = s.requires_grad_(), torch.empty((rows, classes), dtype=dtype)
    torch.compiler.reset()
    compiled = torch.compile(formula)

    return interleaved({
        "kdkernels": step(loss, s, t),
        "out=": lambda: loss.value_and_grad(s.detach(), t, out=out),
        "eager": step(formula, s, t, None),
        "compile": step(compiled, s, t, None),
    })  # fmt: skip


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.separable", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--only", default="", help="losses whose name contains this")
    parser.add_argument("--shape", default="256x32000", help="ROWSxCLASSES (default: 256x32000)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default: 1)")
    parser.add_argument("--json", type=Path, help="write what was measured here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    results = []
    for dtype in (options.dtype,) if options.dtype else ("float32", "bfloat16"):
        for name in (n for n in LOSSES if options.only.lower() in n.lower()):
            ms = measure(name, options.shape, getattr(torch, dtype))
            results.append(dict(loss=name, shape=options.shape, dtype=dtype, ms=ms))
            shown = ", ".join(f"{k} {v:.3g} ms ({v / ms['kdkernels']:.2g}x)" for k, v in ms.items())
            print(f"{name} {options.shape} {dtype}: {shown}", flush=True)
            save({**about(), "results": results}, options.json)
    print(machine())


if __name__ == "__main__":
    main()
