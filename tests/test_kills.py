"""kill -9 at random moments of a training and of writing a teacher cache: nothing is lost, the same bytes in the end.

    python tests/test_kills.py 30      that many moments of each; the suite takes three
"""

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
import test_cache
import torch

import kdkernels as kd
from kdkernels.cache import Reader
from kdkernels.trainer import report
from kdkernels.trainer.lab import Lab, Update


class Rows:
    """Data of Lab.train: features, labels, masks."""

    key = "rows"

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        self.train = torch.randn(64, 8, generator=g), torch.randint(50, (64,), generator=g), torch.zeros(64)

    def draw(self, rng, size):
        return torch.from_numpy(rng.integers(64, size=size))


def training(folder):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net, teacher, loss = torch.nn.Linear(8, 50), torch.nn.Linear(8, 50).requires_grad_(False), kd.KDLoss()
    update = Update(lambda b: loss(net(b.images), teacher(b.images), b.labels), list(net.parameters()))
    Lab(folder, folder, 0, report.silent).train("kd", net, [update], steps=30, size=8, data=Rows(), every=2)


def caching(folder):
    test_cache.write(folder, 60)


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


def check(job, place: Path, moments: int, dice: random.Random) -> None:
    start = time.monotonic()
    job(place / "whole")
    span, kills, run = time.monotonic() - start, 0, 0
    while kills < moments:
        folder, alive = place / f"run-{run}", 0
        while kills < moments and alive < 4:
            if killed(job, folder, dice.uniform(0, span / 2)):
                kills, alive = kills + 1, alive + 1
                if job is caching and (folder / "index.json").exists():
                    Reader(folder, partial=True).verify()
            else:
                break
        job(folder)
        assert contents(folder) == contents(place / "whole"), f"{job.__name__}, run {run}"
        run += 1
    print(f"{job.__name__}: {kills} kills within {run} runs, all ended in the same bytes")


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("job", [training, caching])
def test_killed_at_random_moments(job, tmp_path):
    check(job, tmp_path, 3, random.Random(1))


if __name__ == "__main__":
    for one in (training, caching):
        with tempfile.TemporaryDirectory() as place:
            check(one, Path(place), int(sys.argv[1]) if len(sys.argv) > 1 else 30, random.Random())
