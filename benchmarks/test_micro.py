"""Microkernels under pytest-benchmark, in units of eager torch: not part of the test suite.

    python -m pytest benchmarks/test_micro.py --benchmark-storage=file://benchmarks/results/micro \\
        --benchmark-compare --benchmark-compare-fail=median:50%        fails where a kernel has become slower
    python -m pytest benchmarks/test_micro.py --benchmark-storage=file://benchmarks/results/micro \\
        --benchmark-save=baseline                                      a new baseline

Each round runs the kernel and the same work in eager torch in turns, five times, and the clock that pytest-benchmark
reads advances by the quotient of the best times: "1 s" in its tables is one eager step, a stored baseline is a ratio of
the same run, and other work on the machine, which slows both, is no regression.
"""

import pytest
import torch

import kdkernels as kd
from benchmarks import eager
from benchmarks.harness import clocked, step

ROWS, CLASSES, ROUNDS, TURNS = 8, 32000, 7, 5
KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Clock:
    """In steps of eager torch."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()
pytestmark = pytest.mark.benchmark(timer=CLOCK, disable_gc=True, warmup=False)


def logits(kind: str):
    g = torch.Generator().manual_seed(0)
    s, t = 3 * torch.randn(2, ROWS, CLASSES, generator=g)
    return s.to(KINDS[kind]), t.to(KINDS[kind]), torch.randint(CLASSES, (ROWS,), generator=g)


def compare(benchmark, kernel, usual) -> None:
    def both():
        ours, theirs = zip(*((clocked(kernel), clocked(usual)) for _ in range(TURNS)), strict=True)
        CLOCK.now += min(ours) / min(theirs)

    with kd.use_backend("cpu"):
        benchmark.pedantic(both, rounds=ROUNDS, warmup_rounds=1)


def engine(loss, s, t, y):
    """Arguments of the three row operations for a loss, as its call makes them."""
    program, ops = loss._single, torch.ops.kdkernels
    stats = lambda: ops.reduce(s[None], t[None], y, None, program.args, program.code, CLASSES, -100)  # noqa: E731
    rows = lambda found: ops.rows(found, program.args, program.code, 1)  # noqa: E731
    return stats, rows


@pytest.mark.parametrize("kind", KINDS)
def test_reduce(benchmark, kind):
    """Both log-partitions and their means: logsumexp and the expectation of a logit."""
    s, t, y = logits(kind)
    stats, _ = engine(kd.ForwardKLLoss(), s, t, y)
    compare(benchmark, stats, lambda: [(x.logsumexp(-1), (x.softmax(-1) * s).sum(-1)) for x in (s, t)])


@pytest.mark.parametrize("kind", KINDS)
def test_spread(benchmark, kind):
    """The gradient of forward KL from row statistics: q - p."""
    s, t, y = logits(kind)
    stats, rows = engine(kd.ForwardKLLoss(), s, t, y)
    _, coef = rows(stats())
    one, shape = torch.ones(1, dtype=torch.float64), (s[None], t[None], y, None)
    kernel = lambda: torch.ops.kdkernels.spread(one, *shape, coef[0], CLASSES, -100, 0)  # noqa: E731
    compare(benchmark, kernel, lambda: (s.softmax(-1) - t.softmax(-1)) / ROWS)


def test_rows(benchmark):
    """Value and slope of the rows, beside the same from three numbers a row in torch."""
    s, t, y = logits("float32")
    stats, rows = engine(kd.ForwardKLLoss(), s, t, y)
    found, numbers = stats(), torch.randn(3, ROWS, dtype=torch.float64, requires_grad=True)
    usual = lambda: torch.autograd.grad((numbers[0] - numbers[1] + numbers[2] * 2).sum(), numbers)  # noqa: E731
    compare(benchmark, lambda: rows(found), usual)


@pytest.mark.parametrize("size", [1 << 11, 1 << 18])
def test_exponential(benchmark, size):
    x = torch.linspace(-20, 0, size)
    compare(benchmark, lambda: torch.ops.kdkernels.exp2(x), x.exp2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ForwardKLLoss", "AlphaBetaLoss", "DKDLoss", "JSDLoss", "TVDLoss", "ULDLoss",
                                  "GroupedKLLoss", "PearsonLoss", "SpearmanLoss", "KendallLoss"])  # fmt: skip
def test_step(benchmark, name, kind):
    """Forward and backward of one kernel of each kind."""
    s, t, y = logits(kind)
    loss, formula = eager.pair(name, CLASSES)
    compare(benchmark, step(loss, s.clone().requires_grad_(), t, y), step(formula, s.clone().requires_grad_(), t, y))
