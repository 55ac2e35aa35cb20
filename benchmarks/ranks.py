"""Rank and correlation losses and metrics beside eager torch, torchsort and scipy, interleaved in one run.

    python -m benchmarks.ranks                      the whole table (some 6 minutes)
    python -m benchmarks.ranks --only Spearman --shape 64x131072
    python -m benchmarks.ranks --json result.json   and what was measured, for a machine to read

Times are medians of turns of at least 50 ms, the median call of each: contenders take from half a millisecond to two
seconds, and what one of gigabytes leaves behind (cold caches, memory given back to the system) is not the next one's
time. `after` is what a single call of ours takes straight behind them. Ratios are of the times. `error` is the distance
of the gradient (of the value, for a metric) from the float64 definition over the definition's norm, on two rows, before
the gradient is rounded to 16 bits; `beyond, MB` what a step took at its peak beside logits and gradient; `floor` the
milliseconds that the machine takes at best to read both logits once and to hand out and write a gradient. torchsort is
measured where it is installed (pip install --no-build-isolation torchsort).
"""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import scipy.stats
import torch

import kdkernels as kd
from kdkernels import metrics

from . import eager, peers
from .harness import about, interleaved, machine, save, step
from .rows import machine_rates

SHAPES = [("64x131072", "bfloat16"), ("64x131072", "float32"), ("64x1000", "float32"), ("64x1000", "bfloat16")]
# (contender, shape, dtype) -> the least ratio that the library promises.
PROMISED = {
    ("eager LapSum", "64x131072", "bfloat16"): 80, ("eager hard, forward", "64x131072", "bfloat16"): 50,
    ("torchsort", "64x131072", "bfloat16"): 80, ("torchsort", "64x1000", "float32"): 1,
    ("scipy", "64x131072", "bfloat16"): 5,
}  # fmt: skip


def torchsort_spearman(s, t):
    return peers.torchsort()(s, t)


def one_by_one(weight, rank):
    kl = kd.ForwardKLLoss()
    return lambda s, t: kl(s, t) + weight * rank(s, t)


LOSSES = {  # name -> loss, {contender: function, whether it is differentiated}
    "Spearman": (kd.SpearmanLoss(), {"eager LapSum": (eager.lapsum, True),
                                     "eager hard, forward": (eager.hard_spearman, False),
                                     "the same, one sort a row": (eager.scattered_spearman, False),
                                     "torchsort": (torchsort_spearman, True)}),
    "Spearman exact": (kd.SpearmanLoss(exact=True), {"eager LapSum": (eager.lapsum, True)}),
    "Spearman top 128": (kd.SpearmanLoss(top_k=128), {}),
    "Pearson": (kd.PearsonLoss(), {"eager": (eager.pearson, True)}),
    "Pearson of probabilities": (kd.PearsonLoss("probs"), {"eager": (eager.pearson_of_probabilities, True)}),
    "Plackett-Luce": (kd.PlackettLuceLoss(), {"eager": (eager.plackett_luce, True)}),
    "Kendall top 128": (kd.KendallLoss(), {"eager": (eager.kendall, True)}),
    "Kendall 16 shifts": (kd.KendallLoss("shifts", seed=0), {}),
    "KL + Spearman": (kd.ForwardKLLoss() + 5 * kd.SpearmanLoss(),
                      {"one by one": (one_by_one(5, kd.SpearmanLoss()), True)}),
    "KL + Spearman top 128": (kd.ForwardKLLoss() + kd.SpearmanLoss(top_k=128),
                              {"one by one": (one_by_one(1, kd.SpearmanLoss(top_k=128)), True)}),
}  # fmt: skip
TURN = 0.05  # seconds
METRICS = {"rho": (metrics.spearman, scipy.stats.spearmanr), "tau-b": (metrics.kendall_tau, scipy.stats.kendalltau)}


def torchmetrics_spearman(s, t):
    """It ranks columns, and knows floats of 32 bits and more."""
    return peers.of("torchmetrics.functional", "spearman_corrcoef")(s.T.float(), t.T.float())


def logits(rows, classes, dtype):
    torch.manual_seed(0)
    t = 3 * torch.randn(rows, classes)
    return (0.7 * t + 1.5 * torch.randn(rows, classes)).to(dtype), t.to(dtype)


def timed(function, leaf, t, differentiated):
    return step(function, leaf, t) if differentiated else torch.no_grad()(lambda: function(leaf, t))


def gradient_error(loss, s, t):
    """Of two rows, in float32: 16-bit numbers that are held in float32 take the same way, and keep their gradient."""
    found = []
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        leaf = s[:2].to(dtype).requires_grad_()
        with kd.use_backend(backend):
            loss(leaf, t[:2].to(dtype)).backward()
        found.append(leaf.grad.double())
    return ((found[0] - found[1]).norm() / found[1].norm()).item()


def beyond(name, shape, dtype):
    """MB at the peak of a process's first step beside what was there and the gradient; None if the system is silent."""
    rows, classes = map(int, shape.split("x"))
    s, t = logits(rows, classes, getattr(torch, dtype))
    leaf = s.clone().requires_grad_()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        status = lambda key: int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1024  # noqa: E731
        before = status("VmRSS")
        LOSSES[name][0](leaf, t).backward()
        return status("VmHWM") - before - s.nbytes / 2**20
    except (OSError, IndexError):
        return None


def beyond_in_a_process_of_its_own(*cell):
    code = f"from benchmarks import ranks; print(ranks.json.dumps(ranks.beyond(*{cell!r})))"
    return json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def measure_loss(name, shape, dtype):
    rows, classes = map(int, shape.split("x"))
    s, t = logits(rows, classes, getattr(torch, dtype))
    loss, others = LOSSES[name]
    leaf = s.clone().requires_grad_()
    ours = step(loss, leaf, t)
    extra, rates = beyond_in_a_process_of_its_own(name, shape, dtype), machine_rates(s, t)
    floor = rates["read"] + rates["write"] + rates["faults"]
    contenders = {
        other: timed(function, leaf, t, differentiated) for other, (function, differentiated) in others.items()
        if other != "torchsort" or importlib.util.find_spec("torchsort")
    }  # fmt: skip
    slow, calls = rows * classes > 1 << 20, {**contenders, "kdkernels": ours}
    ms = interleaved(calls, repeats=7 if slow else 20, turn=TURN)
    after = interleaved(calls, repeats=5)["kdkernels"]
    return dict(name=name, shape=shape, dtype=dtype, ms=ms, after=after, error=gradient_error(loss, s, t),
                beyond_mb=extra, floor=floor)  # fmt: skip


def measure_metric(name, shape, dtype):
    rows, classes = map(int, shape.split("x"))
    s, t = logits(min(rows, 8), classes, getattr(torch, dtype))
    function, theirs = METRICS[name]
    a, b = s.double().numpy(), t.double().numpy()
    scipy_of = lambda: np.array([theirs(x, y).statistic for x, y in zip(a, b, strict=True)])  # noqa: E731
    others = {"scipy": scipy_of}
    if name == "rho" and importlib.util.find_spec("torchmetrics"):  # its Kendall compares all pairs of classes
        others["torchmetrics"] = lambda: torchmetrics_spearman(s, t)
    ms = interleaved({**others, "kdkernels": lambda: function(s, t)}, repeats=3, turn=TURN)
    error = np.abs(function(s, t).numpy() - scipy_of()).max().item()
    return dict(name=f"{name} ({len(s)} rows)", shape=shape, dtype=dtype, ms=ms, error=error, beyond_mb=None)


def report(result):
    ours = result["ms"]["kdkernels"]
    ratios, kept = [], []
    for other, ms in result["ms"].items():
        if other != "kdkernels":
            ratios.append(f"{other} {ms:.4g} ({ms / ours:.1f}x)")
            least = PROMISED.get((other, result["shape"], result["dtype"]))
            if least and (other != "eager LapSum" or result["name"] == "Spearman") and "rho" not in result["name"]:
                kept.append(f"{other} {least}x: {'yes' if ms / ours >= least else 'NO'}")
    extra = "" if result["beyond_mb"] is None else f"{result['beyond_mb']:.1f}"
    floor = f"{result['floor']:.2g}" if "floor" in result else ""
    after = f"{result['after']:.3g}" if "after" in result else ""
    return [result["name"], result["shape"], result["dtype"], f"{ours:.3g}", after, floor, "\n".join(ratios),
            f"{result['error']:.1e}", extra, "\n".join(kept)]  # fmt: skip


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--only", default="", help="losses and metrics whose name contains this")
    parser.add_argument("--shape", help="ROWSxCLASSES, such as 2048x32000, in place of the usual ones")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: 2)")
    parser.add_argument("--json", type=Path, help="write what was measured here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    from rich.console import Console
    from rich.table import Table

    console, results, found = Console(), [], about()
    table = Table("loss", "shape", "dtype", "ms", "after", "floor", "others, ms", "error", "beyond, MB", "promised")
    shapes = [(options.shape, x) for x in ("bfloat16", "float32")] if options.shape else SHAPES
    for shape, dtype in shapes:
        if options.dtype not in (None, dtype):
            continue
        for name in (n for n in (*LOSSES, *METRICS) if options.only.lower() in n.lower()):
            if "exact" in name and dtype != "float32":  # numbers of 16 bits are exact anyway
                continue
            console.print(f"{name} {shape} {dtype} ...", highlight=False)
            results.append((measure_loss if name in LOSSES else measure_metric)(name, shape, dtype))
            table.add_row(*report(results[-1]))
            save({**found, "results": results}, options.json)
    console.print(table)
    console.print(f"milliseconds, medians; {machine()}")


if __name__ == "__main__":
    main()
