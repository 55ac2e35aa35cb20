"""What a recipe leaves beside its figures: metrics.jsonl and the same for TensorBoard, and a plot of both."""

import collections
from pathlib import Path

from .. import files
from . import checkpoint


class Log:
    """Of every training of the recipe's runs: the loss of each step and how far student and teacher agreed, as far as
    the file of its net has come. What a killed process had no time to write comes from that file."""

    def __init__(self, out: Path):
        self.journal = checkpoint.Journal(out / "metrics.jsonl")
        self.have: collections.Counter | None = None  # records of each stage

    def add(self, stage: str, curve, held):
        """Whatever of these is new: the losses of all steps so far, and (step, agreement)."""
        if self.have is None:
            self.journal.rewind("", 0)  # without a line cut short, and the same for TensorBoard
            self.have = collections.Counter(record["stage"] for record in self.journal.records())
        records: list[dict] = [{"step": step, "loss": value} for step, value in enumerate(curve, 1)]
        records += [{"step": int(step), "held_out": {"agreement": value}} for step, value in held]
        if len(records) < self.have[stage]:  # the net's file is another one
            self.journal.rewind(stage, 0)
            self.have[stage] = 0
        for record in sorted(records, key=lambda one: one["step"])[self.have[stage] :]:
            self.journal.write(stage=stage, **record)
        self.have[stage] = len(records)
        self.journal.sync()

    def close(self):
        self.journal.close()


def finish(log: Log, result: dict, out: Path, seeds: int):
    """What is missing, and the plot."""
    curves = {}
    for seed in range(seeds):
        for path in sorted((out / f"seed-{seed}").glob("*.safetensors")):
            tensors, _ = checkpoint.load_tensors(path)
            curves[seed, path.stem] = curve = tensors["curve"].tolist()
            log.add(f"seed-{seed}/{path.stem}", curve, tensors["held"].tolist() if "held" in tensors else [])
    with files.replacing(out / "curves.png") as temporary:
        draw(result, curves, temporary)


def draw(result, curves, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 4.5))
    names = sorted({name for _, name in curves})
    for (_, name), curve in curves.items():
        left.plot(smooth(curve), lw=0.8, color=f"C{names.index(name) % 10}")
    for place, name in enumerate(names):
        left.plot([], [], color=f"C{place % 10}", label=name)
    left.set(xlabel="step", title="training loss (each its own), the mean of 20 steps")
    left.legend(fontsize=8)
    for place, values in enumerate(list(result["arms"].values())[::-1]):
        right.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.6)
    right.set_yticks(range(len(result["arms"])), list(result["arms"])[::-1], fontsize=8)
    right.set(title=f"{result['recipe']}: a point a seed", xlabel=result["figure"])
    figure.tight_layout()
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)


def smooth(curve, width=20):
    return [sum(part) / len(part) for k in range(len(curve)) if (part := curve[max(0, k + 1 - width) : k + 1])]
