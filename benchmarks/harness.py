"""What all benchmarks share: turns, clocks, memory, the machine's own rates, and results that survive being stopped."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from allocations import allocations
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("liger-kernel", "trl", "torchtune", "flash-linear-attention", "torchsort", "triton", "scipy",
         "torchmetrics")  # fmt: skip


def turns(contenders: dict[str, Callable], device: str = "cpu", least: float = 0.6, repeats: int = 5,
          seconds: float = float("inf"), lead: int = 1_000_000,
          turn: float = 0.0) -> dict[str, list[float] | str]:  # fmt: skip
    """Milliseconds of every call, the contenders taking turns; of one that fails what it raised.

    There are at least `repeats` turns and at least `least` seconds of them; past `seconds` two are enough. Their order
    is drawn anew each turn: what a contender leaves behind (caches, sleeping cores) meets all others. On a GPU
    times are those of device events, behind `lead` cycles of sleep in which the host gets ahead of the device.
    """
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: dict = {name: [] for name in contenders}
    for name, function in contenders.items():
        try:
            begin = time.perf_counter()
            function(), wait()
            if time.perf_counter() - begin < 0.3:  # caches and pages settle; what is slow has no need of it
                function(), wait()
        except Exception as error:  # a contender that cannot is no reason to do without the others
            times[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            wait()  # an error that stays ends the process
    good = [name for name in contenders if isinstance(times[name], list)]
    start, count, dice = time.perf_counter(), 0, random.Random(0)
    while count < repeats or time.perf_counter() - start < least:
        if count >= 2 and time.perf_counter() - start > seconds:
            break
        for name in dice.sample(good, len(good)):
            times[name].append(events(contenders[name], lead) if device == "cuda" else clocked(contenders[name], turn))
        wait()
        count += 1
    ms = lambda x: x if device != "cuda" else x[0].elapsed_time(x[1])  # noqa: E731
    return {name: found if isinstance(found, str) else [ms(x) for x in found] for name, found in times.items()}


def clocked(function: Callable, turn: float = 0.0) -> float:
    calls = []
    while not calls or sum(calls) < turn * 1e3:
        begin = time.perf_counter()
        function()
        calls.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(calls)


def events(function: Callable, lead: int):
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
    if lead:
        torch.cuda._sleep(lead)
    begin.record()
    function()
    end.record()
    return begin, end


def interleaved(contenders: dict, least: float = 0.6, repeats: int = 5, pick=statistics.median,
                turn: float = 0.0) -> dict[str, float]:  # fmt: skip
    """Milliseconds of each on the CPU (the median), taking turns; what fails raises."""
    found = turns(contenders, least=least, repeats=repeats, turn=turn)
    for name, times in found.items():
        if isinstance(times, str):
            raise RuntimeError(f"{name}: {times}")
    return {name: pick(times) for name, times in found.items()}


def spread(times: list[float]) -> dict[str, float]:
    """Median, and between what half of the calls lie."""
    ordered = sorted(times)
    at = lambda share: ordered[round(share * (len(ordered) - 1))]  # noqa: E731
    return dict(ms=statistics.median(ordered), low=at(0.25), high=at(0.75), calls=len(ordered))


def step(function: Callable, leaf: torch.Tensor, *rest) -> Callable:
    """Forward and backward, the gradient allocated anew; -> the value."""

    def run():
        leaf.grad = None
        value = function(leaf, *rest)
        value.backward()
        return value.detach()

    return run


def peak_bytes(function: Callable, device: str = "cpu") -> int:
    """The most that torch's allocator holds at a time during a call beyond what was there before."""
    if device != "cuda":
        with silent():
            return allocations(function).peak
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class Traffic(TorchDispatchMode):
    """Bytes into and out of every operator that is not a view."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            touched = torch.utils._pytree.tree_leaves((args, kwargs, out))
            self.bytes += sum(x.nbytes for x in touched if isinstance(x, torch.Tensor))
        return out


def traffic(function: Callable) -> int:
    """Bytes into and out of the operators of a call: what memory moves where nothing stays in cache between two of
    them. Inside of compiled code no operator is seen."""
    with Traffic() as seen:
        function()
    return seen.bytes


@contextlib.contextmanager
def silent():
    """Without what the profiler's C++ writes to stderr."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept), os.close(nowhere)


def copier(like: torch.Tensor) -> Callable:
    """A contender that reads the bytes of `like` and writes as many: what bandwidth is measured by."""
    source, target = like.detach().clone(), torch.empty_like(like)
    return lambda: target.copy_(source)


def measured(steps: dict[str, Callable], floor: int, like: torch.Tensor, clear: Callable, **options) -> dict[str, dict]:
    """Of each step: its `spread`, GB/s of the `floor` bytes it cannot do without, what that is of the bandwidth of a
    copy of `like` measured in turns with it, and its peak bytes; or {"error": what it raised}.

    clear: frees what a step leaves behind; freed within the next one it would be missing in the peak.
    """
    found, device = turns({"copy": copier(like), **steps}, like.device.type, **options), like.device.type
    copy = 2 * like.nbytes / statistics.median(found.pop("copy")) / 1e6
    out = {}
    for name, times in found.items():
        if isinstance(times, str):
            out[name] = {"error": times}
            continue
        rate = floor / statistics.median(times) / 1e6
        clear()
        out[name] = spread(times) | dict(gb_s=rate, of_copy=rate / copy, peak=peak_bytes(steps[name], device))
    return out


def versions() -> dict[str, str]:
    found = {"torch": torch.__version__, "python": platform.python_version()}
    for name in ("kdkernels", *PEERS):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit of the source tree; with a + and a mark of the edits where library or benchmarks have been edited."""
    git = lambda *words: subprocess.run(["git", *words], capture_output=True, text=True, check=False,  # noqa: E731
                                        cwd=ROOT).stdout  # fmt: skip
    edits = git("diff", "HEAD", "--", "kdkernels", "csrc", "benchmarks/*.py", "setup.py")
    mark = f"+{hashlib.sha256(edits.encode()).hexdigest()[:6]}" if edits else ""
    return git("rev-parse", "--short", "HEAD").strip() + mark


def machine(device: str = "cpu") -> str:
    from kdkernels.backends import cpu
    from kdkernels.doctor import processor

    gpu = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, " if device == "cuda" else ""
    return (f"{gpu}{processor()}, {cpu.isa()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
            f"Python {platform.python_version()}")  # fmt: skip


def about(device: str = "cpu") -> dict:
    """What figures are worth knowing with. Load: other work on the machine, as it is now."""
    return dict(machine=machine(device), versions=versions(), commit=commit(), load=round(os.getloadavg()[0], 2),
                time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))  # fmt: skip


def save(found: dict, path: Path | None) -> None:
    """Whole or not at all."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(found, indent=1) + "\n")
        part.replace(path)


class Results:
    """Cells by name in a JSON file. An earlier run's stay, and what was measured at this commit, on this machine and
    beside these versions is not measured again; each cell says of which run it is."""

    def __init__(self, path: Path | None, device: str = "cpu", again: bool = False):
        kept = json.loads(path.read_text()) if path and path.exists() else {}
        self.path, self.runs, self.cells = path, kept.get("runs", []), kept.get("cells", {})
        same = [i for i, run in enumerate(self.runs) if self.named(run) == self.named(about(device))]
        self.known = set() if again else {name for name, cell in self.cells.items() if cell["run"] in same}
        self.runs.append(about(device))

    @staticmethod
    def named(run: dict) -> list:
        return [run[key] for key in ("machine", "versions", "commit")]

    def keep(self, name: str, cell: dict) -> None:
        self.cells[name] = cell | {"run": len(self.runs) - 1}
        self.known.add(name)
        save({"runs": self.runs, "cells": self.cells}, self.path)
