"""Vocabulary shards on real processes (gloo on a CPU): sharded is whole. The checks are in tests/parallel_checks.py."""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import parallel_checks
import pytest

TESTS = Path(__file__).parent
CONTEXT = multiprocessing.get_context("spawn")


def launch(target, world, where):
    ranks = [CONTEXT.Process(target=target, args=(rank, world, str(where))) for rank in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(300)
        alive = rank.is_alive()
        rank.kill()
        assert not alive, "a rank hangs"
    files = [where / f"{rank}.json" for rank in range(world)]
    return [json.loads(file.read_text()) if file.exists() else None for file in files]


@pytest.fixture(scope="module", params=[2, 4])
def group(request, tmp_path_factory):
    """What every rank found."""
    return launch(parallel_checks.run, request.param, tmp_path_factory.mktemp("group"))


@pytest.mark.parametrize("name", parallel_checks.CHECKS)
def test_sharded_is_whole(group, name):
    assert all(found is not None for found in group), "a rank died"
    assert [found[name] for found in group] == [""] * len(group)


def test_a_rank_that_dies_is_an_error_for_the_others(tmp_path):
    start = time.monotonic()
    *others, last = launch(parallel_checks.die, 3, tmp_path)
    assert last is None and all("Error" in error for error in others)
    assert time.monotonic() - start < 60


def test_the_example_of_the_readme(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (TESTS.parent / "README.md").read_text(), re.DOTALL)
    (example,) = (block for block in blocks if "torchrun" in block)
    script = tmp_path / "shards.py"
    script.write_text(example)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    subprocess.run(command, check=True, timeout=120, env={**os.environ, "PYTHONPATH": str(TESTS.parent)})
