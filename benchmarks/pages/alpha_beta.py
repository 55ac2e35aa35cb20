"""The recipe `abkd` over a grid of alpha and beta: the student's accuracy after few steps, and how far seeds differ.

    python -m benchmarks.pages.alpha_beta                   some 2 minutes on one core, and a teacher once
    python -m benchmarks.pages.alpha_beta --seeds 4 --steps 800

(1, 0) is the forward KL, (0, 1) the reverse one, (1, 1) half the squared distance, (0, 0) half that of the logarithms.
All at temperature 4 and the weight of the recipe, 32: points differ in the size of their gradients as well, and where a
class that the student thinks impossible costs most (alpha and beta small) the steps are too large to learn anything.
Two seeds of 200 steps show coarse differences alone: the figure's title says how large one has to be.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

from kdkernels.trainer import report
from kdkernels.trainer.config import Config
from kdkernels.trainer.images import accuracy
from kdkernels.trainer.lab import Lab
from kdkernels.trainer.recipes import abkd

from ..harness import commit, machine
from .bayes_teacher import HERE, RESULTS

ALPHA, BETA = (0.0, 0.2, 0.5, 0.8, 1.0), (0.0, 0.3, 0.7, 1.0)


def measure(seeds: int, steps: int, out: Path, cache, show=print) -> dict:
    """{"accuracy": [beta][alpha][seed], "noise": of one student, from the differences between seeds}."""
    found: list = [[[] for _ in ALPHA] for _ in BETA]
    for seed in range(seeds):
        lab = Lab(out / f"steps-{steps}-seed-{seed}", cache, seed, report.silent)
        teacher, data = lab.teacher(seed=1000), lab.data()
        for i, beta in enumerate(BETA):
            for j, alpha in enumerate(ALPHA):
                student = lab.distil(f"{alpha}-{beta}", abkd.loss(alpha, beta), teacher, steps=steps)
                found[i][j].append(accuracy(student, data))
            show(f"seed {seed}, beta {beta}: " + ", ".join(f"{x[-1]:.2f}" for x in found[i]))
    several = [statistics.variance(x) for row in found for x in row if len(x) > 1]
    noise = statistics.mean(several) ** 0.5 if several else None
    return {"alpha": ALPHA, "beta": BETA, "steps": steps, "seeds": seeds, "accuracy": found, "noise": noise}


def draw(numbers: dict, path: Path) -> None:
    from .drawings import WIDTH, pyplot, save

    mean = [[statistics.mean(x) for x in row] for row in numbers["accuracy"]]
    figure, axis = pyplot.subplots(figsize=(0.75 * WIDTH, 3.6), layout="constrained")
    shown = axis.imshow(mean, origin="lower", cmap="viridis", aspect="auto")
    named = {(1.0, 0.0): "KL", (0.0, 1.0): "reverse KL", (0.8, 0.3): "paper, images", (0.2, 0.7): "paper, text"}
    middle = (max(map(max, mean)) + min(map(min, mean))) / 2
    for i, beta in enumerate(numbers["beta"]):
        for j, alpha in enumerate(numbers["alpha"]):
            text = f"{mean[i][j]:.1f}\n{named.get((alpha, beta), '')}"
            axis.text(j, i, text.strip(), ha="center", va="center", fontsize=8,
                      color="black" if mean[i][j] > middle else "white")  # fmt: skip
    axis.set_xticks(range(len(ALPHA)), ALPHA)
    axis.set_yticks(range(len(BETA)), BETA)
    axis.set_xlabel("alpha")
    axis.set_ylabel("beta")
    title = f"accuracy, %, mean of {numbers['seeds']} seeds, {numbers['steps']} steps"
    if numbers["noise"] is not None:
        coarse = 2 * numbers["noise"] * (2 / numbers["seeds"]) ** 0.5
        title += f"; one student varies by ± {numbers['noise']:.1f} with its seed:\n"
        title += f"differences of less than {coarse:.1f} points, two standard errors, say nothing"
    axis.set_title(title, fontsize=9)
    figure.colorbar(shown)
    save(figure, path)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pages.alpha_beta", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--seeds", type=int, default=2, help="of students (default: 2)")
    parser.add_argument("--steps", type=int, default=200, help="of each (default: 200; the recipe has 800)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default: 1)")
    parser.add_argument("--runs", type=Path, default=Path("runs/alpha-beta"), help="where the students go")
    parser.add_argument("--cache", default=Config().cache, help="where the teacher is (default: the trainer's)")
    parser.add_argument("--json", type=Path, default=RESULTS / "alpha-beta.json", help="the numbers")
    parser.add_argument("--out", type=Path, default=HERE / "alpha_beta.png", help="the figure")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    about = {"machine": machine(), "commit": commit()}
    numbers = about | measure(options.seeds, options.steps, options.runs, options.cache)
    options.json.write_text(json.dumps(numbers) + "\n")
    draw(numbers, options.out)
    print(f"{options.out}: noise of one student {numbers['noise']}")


if __name__ == "__main__":
    main()
