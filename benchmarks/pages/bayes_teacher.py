"""A student's error against how far its teacher is from the Bayes posterior, on a Gaussian mixture where that is known.

    python -m benchmarks.pages.bayes_teacher                  some 2 minutes on one core
    python -m benchmarks.pages.bayes_teacher --seeds 1        fewer teachers

After the toy experiment of Hamidi et al. 2024 (How to train the teacher model for effective knowledge distillation).
Ten classes, each a Gaussian of unit variance in ten dimensions. Teachers learn from n labelled examples with the
cross-entropy or with the squared error of their probabilities; a small student then learns from each teacher's
distribution at 2,000 other points, with KL. Measured on 20,000 more: the mean of |p(x) - P(.|x)|^2 of the teacher, P
the posterior, and the student's error beyond that of the posterior.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from torch import nn

import kdkernels as kd

from ..harness import commit, machine

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
CLASSES, DIMENSIONS, SPREAD = 10, 10, 1.0
LABELLED = 250, 500, 1000, 2000, 4000, 8000
TRANSFER, TEST, STEPS, TEACHER, STUDENT = 2000, 20000, 500, 128, 12
LOSSES = {"cross-entropy": lambda s, y: nn.functional.cross_entropy(s, y),
          "squared error": lambda s, y: kd.BrierLoss()(s, labels=y)}  # fmt: skip


class Mixture:
    """Equally likely classes with means drawn once."""

    def __init__(self, seed=0):
        self.rng = torch.Generator().manual_seed(seed)
        self.means = SPREAD * torch.randn(CLASSES, DIMENSIONS, generator=self.rng)

    def draw(self, n):
        """-> points (n, DIMENSIONS), labels (n,)."""
        labels = torch.randint(CLASSES, (n,), generator=self.rng)
        return self.means[labels] + torch.randn(n, DIMENSIONS, generator=self.rng), labels

    def logits(self, x):
        """log P(class | x), up to a constant of each row."""
        return x @ self.means.T - self.means.square().sum(1) / 2


def network(width, seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(DIMENSIONS, width), nn.ReLU(), nn.Linear(width, CLASSES))


def train(net, loss, x, target, seed, steps=STEPS, size=128):
    """loss(logits, target); the learning rate falls to 0."""
    rng = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        at = torch.randint(len(x), (size,), generator=rng)
        optimizer.zero_grad()
        loss(net(x[at]), target[at]).backward()
        optimizer.step()
        schedule.step()
    return net.eval().requires_grad_(False)


def error(logits, labels) -> float:
    return 100 * (logits.argmax(1) != labels).double().mean().item()


def measure(seeds: int, show=print) -> dict:
    mixture = Mixture()
    (x, _), (test, labels) = mixture.draw(TRANSFER), mixture.draw(TEST)
    posterior = mixture.logits(test)
    least, found, kl = error(posterior, labels), [], kd.ForwardKLLoss()
    pool = {seed: mixture.draw(max(LABELLED)) for seed in range(seeds)}

    def student(logits, seed):
        return error(train(network(STUDENT, seed), kl, x, logits, seed)(test), labels) - least

    for seed in range(seeds):
        for n in LABELLED:
            for name, loss in LOSSES.items():
                points, own = (v[:n] for v in pool[seed])
                teacher = train(network(TEACHER, seed), loss, points, own, seed)
                logits = teacher(test)
                distance = (logits.softmax(1) - posterior.softmax(1)).square().sum(1).mean().item()
                found.append({"loss": name, "n": n, "seed": seed, "distance": distance,
                              "teacher": error(logits, labels) - least, "student": student(teacher(x), seed)})
            show(f"seed {seed}, n {n}: " + ", ".join(f"{row['loss']} {row['distance']:.4f} -> {row['student']:.2f}"
                                                     for row in found[-2:]))  # fmt: skip
    exact = [student(mixture.logits(x), seed) for seed in range(seeds)]
    return {"Bayes error": least, "students of the posterior": exact, "runs": found, **summary(found)}


def summary(found: list[dict]) -> dict:
    """Rank correlations, and squared error less cross-entropy in pairs of one n and seed."""
    columns = {name: torch.tensor([row[name] for row in found], dtype=torch.float64)
               for name in ("distance", "teacher", "student")}  # fmt: skip
    pairs: dict = {}
    for key in ("distance", "student"):
        for row in found:
            sign = 1 if row["loss"] == "squared error" else -1
            pairs.setdefault(key, {}).setdefault((row["n"], row["seed"]), []).append(sign * row[key])
    less = {key: sum(sum(pair) < 0 for pair in found.values()) for key, found in pairs.items()}
    rank = {name: kd.metrics.spearman(columns[name], columns["student"]).item() for name in ("distance", "teacher")}
    return {"rank correlation with the student's error": rank, "pairs": len(pairs["student"]),
            "of which squared error has the smaller": less}  # fmt: skip


def draw(numbers: dict, path: Path) -> None:
    from .drawings import WIDTH, pyplot, save

    figure, axes = pyplot.subplots(1, 2, figsize=(WIDTH, 3.4), sharey=True, layout="constrained")
    shown = {"distance": ("teacher's mean |p − P|²", (0.01, 0.02, 0.05, 0.1, 0.2)),
             "teacher": ("teacher's excess error, %", (1, 2, 4, 8))}  # fmt: skip
    for axis, (key, (label, ticks)) in zip(axes, shown.items(), strict=True):
        for name, marker in zip(LOSSES, "ox", strict=True):
            rows = [row for row in numbers["runs"] if row["loss"] == name]
            columns = [[row[name] for row in rows] for name in (key, "student")]
            axis.plot(*columns, marker, ms=4.5, alpha=0.7, label=name)
        least = statistics.mean(numbers["students of the posterior"])
        axis.axhline(least, color="gray", ls=":", lw=1, label="of the posterior itself")
        axis.set_xlabel(label)
        axis.set_xscale("log")
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks], minor=False)
        axis.set_xticks([], minor=True)
    axes[0].set_ylabel("student's excess error, %")
    axes[0].legend(frameon=False, title="teacher trained with", fontsize=8)
    for axis, value in zip(axes, numbers["rank correlation with the student's error"].values(), strict=True):
        axis.set_title(f"rank correlation {value:.2f}", fontsize=9, loc="left")
    save(figure, path)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pages.bayes_teacher", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, help="of teachers and students (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default: 1)")
    parser.add_argument("--json", type=Path, default=RESULTS / "bayes-teacher.json", help="the numbers")
    parser.add_argument("--out", type=Path, default=HERE / "bayes_teacher.png", help="the figure")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    numbers = {"machine": machine(), "commit": commit()} | measure(options.seeds)
    options.json.write_text(json.dumps(numbers) + "\n")
    draw(numbers, options.out)
    print(json.dumps({key: value for key, value in numbers.items() if key != "runs"}, indent=1))


if __name__ == "__main__":
    main()
