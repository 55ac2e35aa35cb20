"""Every peer beside kdkernels: `kdkernels bench --peers`.

Writes benchmarks/results/peers-DEVICE.json as it goes, benchmarks/pages/peers.md and the README's table of it.
Times: 64 x 32000 logits, or from hidden states of 256 rows, 8192 classes, hidden size 256. Cases and features:
`benchmarks/adversarial.py`. Without a GPU Triton's kernels run those in Triton's interpreter, and are not timed.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import warnings

import torch
import torch.nn.functional as F

import kdkernels as kd

from . import adversarial, bench, eager, harness, peers, readme
from .bench import RESULTS

LOGITS, LINEAR = "64x32000", "256x8192x256"
LOSSES = ("ForwardKLLoss", "ReverseKLLoss", "SymmetricKL", "JSDLoss", "TVDLoss", "SpearmanLoss", "CrossEntropyLoss")
FROM_HIDDEN = (*peers.BETAS, "CrossEntropyLoss")


def ours(loss: str, **options):
    if loss == "SymmetricKL":
        return 0.5 * kd.ForwardKLLoss(**options) + 0.5 * kd.ReverseKLLoss(**options)
    if loss == "CrossEntropyLoss" and options:
        raise TypeError("a temperature is of student and teacher: cross-entropy is of the logits as they are")
    return getattr(kd, loss)(**options)


def usual(loss: str, temperature: float = 1.0):
    """Eager torch; a temperature it has by dividing."""
    formula = eager.pair(loss, 8)[1]
    return lambda s, t, y=None: formula(s / temperature, t / temperature, y)


def tried(make, loss: str, linear: bool = False, constant: bool = False) -> dict:
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):  # what is compiled is no other formula
        warnings.simplefilter("ignore")
        return dict(cases=adversarial.survived(make(), loss, linear, constant),
                    features=adversarial.features(make, loss, linear, constant))  # fmt: skip


def robust(peer: peers.Peer, device: str) -> dict:
    """Cases and features of a peer, or why there are none; Triton's without a GPU in its interpreter."""
    if peer.gpu and device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return interpreted()[peers.PEERS.index(peer)]
    function, why = peers.made(peer, device, interpreted=True)
    if not function:
        return dict(why=why)
    if not peer.same:
        return dict(why="another definition of soft ranks")
    return tried(peer.make, peer.loss, peer.linear, peer.constant)


@functools.cache
def interpreted() -> list[dict]:
    """Of every peer that needs a GPU, in one process: Triton reads the variable when it is imported."""
    code = ("import json; from benchmarks import peers, peers_table as p; "
            "print(json.dumps([p.robust(x, 'cpu') if x.gpu else {} for x in peers.PEERS]))")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=harness.ROOT,
                          timeout=300, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False)  # fmt: skip
    if done.returncode:
        return [dict(why=done.stderr.strip().splitlines()[-1][:200])] * len(peers.PEERS)
    return json.loads(done.stdout.splitlines()[-1])


def measure_linear(loss: str, shape: str, dtype: str, device: str, compiled: bool) -> dict:
    rows, classes, hidden = map(int, shape.split("x"))
    g, kind = torch.Generator().manual_seed(0), getattr(torch, dtype)
    new = lambda n: (torch.randn(n, hidden, generator=g) * hidden**-0.25 * 1.5).to(device, kind)  # noqa: E731
    h, w, th, tw = new(rows).requires_grad_(), new(classes).requires_grad_(), new(rows), new(classes)
    y = torch.randint(classes, (rows,), generator=g).to(device)
    formula, own, labels = eager.pair(loss, classes)[1], kd.LinearLoss(ours(loss)), loss == "CrossEntropyLoss"
    teacher = lambda: None if labels else F.linear(th, tw)  # noqa: E731
    whole = lambda h, w: formula(F.linear(h, w), teacher(), y)  # noqa: E731
    functions = {"LinearLoss": lambda h, w: own(h, w, labels=y) if labels else own(h, w, th, tw), "eager": whole}
    if compiled:
        torch.compiler.reset()
        functions["compile"] = torch.compile(whole, dynamic=False)
    others, missing, settings = peers.linear(loss, h, w, th, tw, y)
    functions |= others
    found = [p for p in peers.PEERS if p.name in others and p.loss == loss]
    shifts = {p.name: float(peers.shift(p, F.linear(th, tw))) for p in found}

    def clear():
        h.grad = w.grad = None

    def step(function):
        def run():
            clear()
            value = function(h, w)
            value.backward()
            return value.detach()

        return run

    steps = {name: step(f) for name, f in functions.items()}
    floor = (2 if labels else 3) * (h.nbytes + w.nbytes)
    found = harness.measured(steps, floor, w.detach(), clear, least=0.3, repeats=5, seconds=6)
    leaf = h.detach().double().requires_grad_()
    value = formula(F.linear(leaf, w.detach().double()), None if labels else F.linear(th.double(), tw.double()), y)
    exact = value.item(), torch.autograd.grad(value, leaf)[0]
    for who, cell in found.items():
        if "ms" in cell:
            cell["errors"] = bench.errors(steps[who], h, None, exact, shifts.get(who, 0.0))
            cell["of_eager"] = cell["ms"] / found["eager"]["ms"]
            if who not in ("compile", "Liger chunked") and device == "cpu":
                cell["moved"] = harness.traffic(steps[who]) / (rows * classes)
    return dict(loss=loss, shape=shape, dtype=dtype, device=device, floor=floor, contenders=found,
                missing=missing, settings=settings)  # fmt: skip


def work(options) -> dict:
    """Key -> what makes the cell."""
    device, dtypes = options.device, options.dtype or ["float32", "bfloat16"]
    shapes = {"logits": (options.shape or [LOGITS])[0], "linear": "16x200x8" if options.quick else LINEAR}
    jobs: dict = {}
    for loss in LOSSES:
        for dtype in dtypes:
            jobs[f"{loss} logits {dtype}"] = lambda loss=loss, dtype=dtype: bench.measure(
                loss, shapes["logits"], dtype, device, [b for b in bench.backends(device) if b != "reference"],
                options.compile, 1 if options.quick else 2)  # fmt: skip
            if loss in FROM_HIDDEN:
                jobs[f"{loss} linear {dtype}"] = lambda loss=loss, dtype=dtype: measure_linear(
                    loss, shapes["linear"], dtype, device, options.compile)  # fmt: skip
        if loss != "SpearmanLoss":
            jobs[f"{loss} tried kdkernels"] = lambda loss=loss: tried(lambda **o: ours(loss, **o), loss)
            jobs[f"{loss} tried eager"] = lambda loss=loss: tried(lambda **o: usual(loss, **o), loss)
        if loss in FROM_HIDDEN:
            jobs[f"{loss} tried LinearLoss"] = lambda loss=loss: tried(
                lambda **o: kd.LinearLoss(ours(loss, **o)), loss, linear=True)  # fmt: skip
        for peer in (p for p in peers.PEERS if p.loss == loss):
            jobs[f"{loss} tried {peer.name}"] = lambda peer=peer: robust(peer, device)
    return jobs


def run(options) -> int:
    from . import report

    if options.threads:
        torch.set_num_threads(options.threads)
    options.compile = options.compile and not options.quick
    path = options.json or RESULTS / f"peers-{options.device}.json"
    jobs, results = work(options), harness.Results(path, options.device, options.again)
    with report.progress(len(jobs)) as tell:
        for key, job in jobs.items():
            tell(key)
            if key not in results.known:
                results.keep(key, job())
    if not options.json:
        readme.write()
    report.console().print(readme.peers_page(json.loads(path.read_text())), markup=False)
    return 0


def main(arguments=None) -> int:
    from kdkernels.benchmarking import add_flags

    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers_table", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    return run(add_flags(parser).parse_args(arguments))


if __name__ == "__main__":
    main()
