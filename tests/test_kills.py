"""kill -9 at random moments of a training and of writing a teacher cache: what was saved is gone on from, and the bytes
in the end are the same.

    python tests/test_kills.py 30      that many moments of each; the suite takes three
"""

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import test_cache
import torch

import kdkernels as kd
from kdkernels.cache import Reader
from kdkernels.trainer import checkpoint, report
from kdkernels.trainer.lab import Lab, Update


class Rows:
    """Data of Lab.train: features, labels, masks."""

    key = "rows"

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        self.train = torch.randn(64, 8, generator=g), torch.randint(50, (64,), generator=g), torch.zeros(64)

    def draw(self, rng, size):
        return torch.from_numpy(rng.integers(64, size=size))


class Watched(Lab):
    def batch(self, data, step, size):
        note(self.folder, step)
        return super().batch(data, step, size)


def note(folder, at: int) -> None:
    """Beside the folder, where a process began: only the first call counts."""
    if not (path := folder.with_suffix(".began")).exists():
        path.write_text(str(at))


def training(folder):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net, teacher, loss = torch.nn.Linear(8, 50), torch.nn.Linear(8, 50).requires_grad_(False), kd.KDLoss()
    update = Update(lambda b: loss(net(b.images), teacher(b.images), b.labels), list(net.parameters()))
    Watched(folder, folder, 0, report.silent).train("kd", net, [update], steps=30, size=8, data=Rows(), every=2)


def caching(folder):
    example = test_cache.example
    with patch.object(test_cache, "example", lambda i, vocab: (note(folder, i), example(i, vocab))[1]):
        test_cache.write(folder, 60)


def saved(job, folder) -> int:
    """The steps of its checkpoint, or the examples that its index counts, all of which can be read."""
    if job is training:
        path = folder / "kd.safetensors"
        return checkpoint.load_tensors(path)[1]["step"] if path.exists() else 0
    if not (folder / "index.json").exists():
        return 0
    reader = Reader(folder, partial=True)
    reader.verify()
    return len(reader)


def killed(job, folder, after: float) -> bool:
    """Whether the job, in a process of its own, was killed so many seconds after its start, before its end."""
    if not (child := os.fork()):
        try:
            job(folder)
            os._exit(0)
        finally:
            os._exit(1)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), f"{job.__name__} failed after {after:.3f} s"
    return status != 0


def contents(folder) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def check(job, place: Path, moments: int, dice: random.Random) -> int:
    """-> how many processes went on from something saved: each where it says, and the last to the same bytes."""
    start = time.monotonic()
    job(place / "whole")
    span, kills, run, resumed = time.monotonic() - start, 0, 0, 0
    while kills < moments:
        folder, alive, more = place / f"run-{run}", 0, True
        while more:
            more, before, began = kills < moments and alive < 4, saved(job, folder), folder.with_suffix(".began")
            began.unlink(missing_ok=True)
            if more and (more := killed(job, folder, dice.uniform(0, span / 2))):
                kills, alive = kills + 1, alive + 1
            elif not more:
                job(folder)
            if began.exists() and (at := began.read_text()):  # it came as far as its first step
                assert int(at) == before, f"{job.__name__}, run {run}: began at {at} where {before} were saved"
                resumed += before > 0
        assert contents(folder) == contents(place / "whole"), f"{job.__name__}, run {run}"
        run += 1
    print(f"{job.__name__}: {kills} kills within {run} runs; {resumed} processes began where something was saved, "
          "exactly there; all runs ended in the same bytes")  # fmt: skip
    return resumed


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("job", [training, caching])
def test_killed_at_random_moments(job, tmp_path):
    check(job, tmp_path, 3, random.Random(1))


if __name__ == "__main__":
    for one in (training, caching):
        with tempfile.TemporaryDirectory() as place:
            check(one, Path(place), int(sys.argv[1]) if len(sys.argv) > 1 else 30, random.Random())
