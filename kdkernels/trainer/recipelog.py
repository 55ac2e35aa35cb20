"""What a recipe leaves beside its figures: metrics.jsonl and the same for TensorBoard, and a plot of both."""

from pathlib import Path

from .. import files
from . import checkpoint


def write(result: dict, out: Path, seeds: int):
    """Of every training of the recipe's runs: the loss of each step and how far student and teacher agreed, from the
    files of its nets."""
    journal, curves = checkpoint.Journal(out / "metrics.jsonl"), {}
    journal.path.unlink(missing_ok=True)
    journal.board.rewrite([])
    for seed in range(seeds):
        for path in sorted((out / f"seed-{seed}").glob("*.safetensors")):
            tensors, _ = checkpoint.load_tensors(path)
            curves[seed, path.stem] = curve = tensors["curve"].tolist()
            stage, held = f"seed-{seed}/{path.stem}", tensors["held"].tolist() if "held" in tensors else []
            records = [{"step": step, "loss": value} for step, value in enumerate(curve, 1)]
            records += [{"step": int(step), "held_out": {"agreement": value}} for step, value in held]
            for record in sorted(records, key=lambda one: one["step"]):
                journal.write(stage=stage, **record)
    journal.close()
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
