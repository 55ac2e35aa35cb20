"""Separable losses, and those that sort, group or transport probabilities, beside eager torch and torch.compile.

    python -m benchmarks.separable                                     one thread, float32 and bfloat16
    python -m benchmarks.separable --only JSD --shape 64x128256 --json result.json

Milliseconds, forward and backward, medians of repeats in which the contenders take turns; in brackets what that is of
kdkernels' time. `out=`: the gradient into a given buffer. ForwardKL is there to compare with.
"""

import argparse
import json
from pathlib import Path

import torch

import kdkernels as kd

from . import eager
from .rows import interleaved, machine

GROUPS = 8


def akl(s, t, y, mu=0.5):
    """As in the authors' code: one sort of the teacher's row."""
    log_p, log_q = t.log_softmax(-1), s.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    top, order = p.detach().sort(-1, descending=True)
    head = top.cumsum(-1) <= mu
    head[:, 0] = True
    gap = (p - q).detach().abs().gather(-1, order)
    w = (gap * head).sum(-1) / gap.sum(-1)
    return (w * (p * (log_p - log_q)).sum(-1) + (1 - w) * (q * (log_q - log_p)).sum(-1)).mean()


def grouped(s, t, y):
    at = torch.arange(s.shape[-1]) % GROUPS
    log_p, log_q = t.log_softmax(-1), s.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    P, Q = (x.new_zeros(len(x), GROUPS).index_add(-1, at, x).log() for x in (p, q))
    return ((P.exp() * (P - Q)).sum(-1) + (p * (log_p - P[:, at] - log_q + Q[:, at])).sum(-1)).mean()


def sinkhorn(s, t, y):
    q, p = (s / 2).softmax(-1), (t / 2).softmax(-1)
    cost = torch.cdist(q, p, p=1.0) if s.dtype != torch.bfloat16 else torch.cdist(q.float(), p.float(), p=1.0)
    plan = (-cost / 0.1).exp()
    for _ in range(20):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0)
    return (plan * cost).sum() / len(q)


def contenders(vocab: int) -> dict:
    """Name -> (our loss, the formula in torch)."""
    plain = {name: (getattr(kd, f"{name}Loss")(), eager.loss(f"{name}Loss")[0])
             for name in ("JSD", "SkewKL", "SkewReverseKL", "TVD", "ForwardKL")}  # fmt: skip
    own = {"AKL": (kd.AKLLoss(), akl), "Sinkhorn": (kd.SinkhornLoss(), sinkhorn),
           "ULD": (kd.ULDLoss(), lambda s, t, y: eager.textbook.uld(s, t, y).mean()),
           "GroupedKL": (kd.GroupedKLLoss(torch.arange(vocab) % GROUPS), grouped)}  # fmt: skip
    return plain | own


def measure(loss, formula, shape: str, dtype: torch.dtype) -> dict[str, float]:
    rows, classes = map(int, shape.split("x"))
    s, t = (3 * torch.randn(2, rows, classes, generator=torch.Generator().manual_seed(0))).to(dtype)
    s, out = s.requires_grad_(), torch.empty((rows, classes), dtype=dtype)
    torch.compiler.reset()
    compiled = torch.compile(formula)

    def step(function, *labels):
        s.grad = None
        function(s, t, *labels).backward()

    return interleaved({
        "kdkernels": lambda: step(loss),
        "out=": lambda: loss.value_and_grad(s.detach(), t, out=out),
        "eager": lambda: step(formula, None),
        "compile": lambda: step(compiled, None),
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
        for name, (loss, formula) in contenders(int(options.shape.split("x")[1])).items():
            if options.only.lower() not in name.lower():
                continue
            ms = measure(loss, formula, options.shape, getattr(torch, dtype))
            results.append(dict(loss=name, shape=options.shape, dtype=dtype, ms=ms))
            shown = ", ".join(f"{k} {v:.3g} ms ({v / ms['kdkernels']:.2g}x)" for k, v in ms.items())
            print(f"{name} {options.shape} {dtype}: {shown}", flush=True)
            if options.json:
                options.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
    print(machine())


if __name__ == "__main__":
    main()
