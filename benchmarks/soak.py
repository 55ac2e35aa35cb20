"""Training steps over all losses, and the memory of the process meanwhile.

A round is a forward and backward of every loss on logits of a shape and dtype of their own, then of a few losses
against a `SparseTeacher`, then steps of small students with AdamW, whose gradients `LinearLoss` makes and for which it
keeps memory from call to call. Their products of matrices take turns among a few shapes: oneDNN keeps kernels of each.

    python -m benchmarks.soak --minutes 30      benchmarks/results/soak.json and .png

The first sixth warms up (allocator, threads). Growth is the slope of a line through the rest, in KiB a thousand steps;
the samples themselves take about 300 bytes each.
"""

import argparse
import random
import time
from pathlib import Path

import torch

import kdkernels as kd

from .harness import about, save

SAMPLES = 600
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = (17, 64, 3000), (48, 32, 1024), (64, 64, 8192)  # rows, hidden size, classes of a student


def resident() -> int:
    """Bytes of the process in memory."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) * 1024


def losses() -> list:
    made = [loss() for name, loss in kd.catalogue().items() if name != "GroupedKLLoss"]
    sums = kd.ForwardKLLoss() + kd.CrossEntropyLoss(), kd.ForwardKLLoss() + kd.SpearmanLoss(top_k=8)
    return [*made, kd.GroupedKLLoss("label"), *sums]


def step(loss, dice: random.Random, sparse: bool = False) -> None:
    """Forward and backward of logits of a shape of their own."""
    rows, classes, dtype = dice.randint(1, 64), dice.randint(16, 8192), dice.choice(DTYPES)
    bare = isinstance(loss, (kd.CrossEntropyLoss, kd.BrierLoss, kd.LogitMSELoss))
    teacher = None if bare else torch.randn(rows, classes, dtype=dtype)
    if sparse:
        teacher = kd.SparseTeacher.from_logits(teacher, dice.randint(1, 15))
    logits = torch.randn(rows, classes, dtype=dtype, requires_grad=True)
    loss(logits, teacher, torch.randint(classes, (rows,))).backward()


class Student:
    """A layer and a head, their optimizer, and a `LinearLoss` of them: all kept from step to step."""

    def __init__(self, loss, rows: int, hidden: int, classes: int):
        self.layer, self.rows = torch.nn.Linear(hidden, hidden), rows
        self.head, self.teacher = torch.nn.Linear(hidden, classes), torch.randn(classes, hidden)
        self.loss = kd.LinearLoss(loss, memory_budget=1 << 20)  # in chunks
        self.optimizer = torch.optim.AdamW([*self.layer.parameters(), *self.head.parameters()])

    def step(self) -> None:
        x = torch.randn(self.rows, self.layer.in_features)
        labels = torch.randint(self.head.out_features, (self.rows,))
        self.loss(self.layer(x), self.head.weight, x, self.teacher, labels, student_bias=self.head.bias).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def growth(samples: list[dict]) -> float:
    """KiB a thousand steps, least squares over all but the first sixth."""
    late = samples[len(samples) // 6 :]
    x, y = (torch.tensor([s[key] for s in late], dtype=torch.float64) for key in ("step", "bytes"))
    x, y = x - x.mean(), y - y.mean()
    return (x @ y / (x @ x)).item() * 1000 / 1024


def plot(samples: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    axes.plot([s["seconds"] / 60 for s in samples], [s["bytes"] / 2**20 for s in samples])
    axes.set(xlabel="minutes", ylabel="resident memory, MiB", ylim=(0, None))
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "soak.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    now = about()  # what is run, whatever is checked out by the time it ends
    dice, every, samples, start = random.Random(0), losses(), [], time.monotonic()
    sparse = [kd.ForwardKLLoss(), kd.JSDLoss(), kd.DKDLoss()]
    students = [Student(loss(), *shape) for loss in (kd.KDLoss, kd.JSDLoss, kd.SpearmanLoss) for shape in SHAPES]
    count = 0
    while (seconds := time.monotonic() - start) < 60 * options.minutes:
        for loss in every:
            step(loss, dice)
        for loss in sparse:
            step(loss, dice, sparse=True)
        for student in students:
            student.step()
        count += len(every) + len(sparse) + len(students)
        if seconds >= 60 * options.minutes * len(samples) / SAMPLES:
            samples.append(dict(step=count, seconds=round(seconds, 2), bytes=resident()))
    found = dict(**now, minutes=options.minutes, steps=count, losses=len(every),
                 growth_kib_per_1000_steps=growth(samples), samples=samples)  # fmt: skip
    save(found, options.out)
    plot(samples, options.out.with_suffix(".png"))
    first, last = samples[len(samples) // 6]["bytes"] / 2**20, samples[-1]["bytes"] / 2**20
    print(f"{count} steps of {len(every)} losses, {first:.1f} -> {last:.1f} MiB after warming up, "
          f"{found['growth_kib_per_1000_steps']:.1f} KiB a thousand steps")  # fmt: skip


if __name__ == "__main__":
    main()
