"""Vocabulary shards on real processes (gloo on a CPU): sharded is whole. The checks are in tests/parallel_checks.py."""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import parallel_checks
import pytest
import torch
from accuracy import can_shard, make
from hypothesis import given
from hypothesis import strategies as st
from textbook import CASES

import kdkernels as kd
from kdkernels import parallel

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


@pytest.mark.parametrize("hangs", [False, True], ids=["dies", "hangs"])
def test_a_rank_that_dies_or_hangs_is_an_error_for_the_others(tmp_path, hangs):
    *others, last = launch(partial(parallel_checks.die, hangs=hangs), 3, tmp_path)
    assert last is None
    for error, seconds in others:
        assert "Error" in error and seconds < 2 * parallel_checks.SHORT  # the timeout, and a busy machine


def test_the_example_of_the_readme(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (TESTS.parent / "README.md").read_text(), re.DOTALL)
    (example,) = (block for block in blocks if "torchrun" in block)
    script = tmp_path / "shards.py"
    script.write_text(example)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    subprocess.run(command, check=True, timeout=120, env={**os.environ, "PYTHONPATH": str(TESTS.parent)})


class Threads(parallel.Shards):
    """Shards whose ranks are threads of this process."""

    def __init__(self, rank, widths, barrier, board):
        ends = [sum(widths[: r + 1]) for r in range(len(widths))]
        self.rank, self.spans = rank, [(end - width, end) for end, width in zip(ends, widths, strict=True)]
        self.group, self.barrier, self.board, self.classes = None, barrier, board, widths[rank]

    def gather(self, x):
        self.board[self.rank] = x
        self.barrier.wait(60)
        found = torch.stack(self.board)
        self.barrier.wait(60)  # before the next one is put up
        return found


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@given(st.data())
def test_any_cut_is_whole(backend, data):
    n, widths = data.draw(st.integers(1, 4)), data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    seed, scale = data.draw(st.integers(0, 2**20)), data.draw(st.sampled_from([0.25, 1.0, 30.0]))
    case = data.draw(st.sampled_from([c for c in CASES if can_shard(c) and not c.setting("standardize", False)]))
    g = torch.Generator().manual_seed(seed)
    s, t = scale * torch.randn(2, n, sum(widths), generator=g, dtype=torch.float64)
    dead = torch.rand(n, sum(widths), generator=g) < 0.2
    y = torch.randint(sum(widths), (n,), generator=g)
    dead[torch.arange(n), y] = False
    s, t, loss = s.masked_fill(dead, -torch.inf), t.masked_fill(dead, -torch.inf), make(case)

    def run(rank, **group):
        cut = [x.split(widths, -1)[rank] if group else x for x in (s, t)]
        leaves = [x.clone().requires_grad_() for x in cut]
        with kd.use_backend(backend):
            value = loss(leaves[0], leaves[1] if case.needs_teacher else None, y, **group)
            value.backward()
        return value.detach(), *(x.grad for x in leaves)

    barrier, board = threading.Barrier(len(widths)), [None] * len(widths)
    with ThreadPoolExecutor(len(widths)) as pool:
        ranks = [pool.submit(run, r, group=Threads(r, widths, barrier, board)) for r in range(len(widths))]
        parts = [rank.result(60) for rank in ranks]
    whole = run(0)
    # A negative power makes terms of the value's size that cancel in a gradient.
    size = max(1.0, parallel_checks.largest(*(x for x in whole if x is not None)))
    for part in parts:
        parallel_checks.near(part[0], whole[0], what=str(case), size=size)
    for k in (1, 2):
        if whole[k] is not None:
            parallel_checks.near(torch.cat([p[k] for p in parts], -1), whole[k], what=str(case), size=size)
