"""The figures of rank_gradients.md."""

import io
from pathlib import Path

import matplotlib
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot

COLORS = {"KL": "black", "Spearman": "tab:blue", "Spearman top 1024": "tab:cyan", "Spearman top 128": "tab:red",
          "Kendall top 128": "tab:orange", "Plackett-Luce": "tab:green"}  # fmt: skip
WIDTH = 8.4


def draw(folder: Path, numbers: dict, row: dict) -> None:
    settings = {"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False,
                "axes.spines.right": False, "legend.frameon": False, "savefig.dpi": 110}  # fmt: skip
    with pyplot.rc_context(settings):
        save(draw_row(row, numbers["seen"]), folder / "rank_gradients_row.png")
        save(draw_share(numbers), folder / "rank_gradients_share.png")
        save(draw_weight(numbers["weights"]), folder / "rank_gradients_weight.png")
        save(draw_eps(numbers), folder / "rank_gradients_permutahedron.png")


def save(figure, path: Path) -> None:
    """In 64 colours: a third of the bytes."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    pyplot.close(figure)
    Image.open(picture).convert("RGB").quantize(64).save(path, optimize=True)


def draw_row(row: dict, seen: int):
    figure, axes = pyplot.subplots(4, 1, figsize=(WIDTH, 7.2), sharex=True, layout="constrained")
    axes[0].plot(row["rank"], row["t"], color="black", lw=1.2, label="teacher")
    axes[0].plot(row["rank"], row["s"], ".", color="tab:purple", ms=2.5, alpha=0.6, label="student")
    axes[0].set_ylabel("logit")
    axes[0].legend(loc="upper right", markerscale=3)
    for axis in axes:
        axis.axvline(seen, color="gray", ls=":", lw=1)
    axes[1].annotate("tokens the teacher was trained on", (seen, 0.85), (-4, 0), ha="right",
                     xycoords=("data", "axes fraction"), textcoords="offset points", color="gray",
                     fontsize=8)  # fmt: skip
    for axis, (name, step) in zip(axes[1:], row["step"].items(), strict=True):
        axis.axhline(0, color="gray", lw=0.6)
        axis.plot(row["rank"], step / step.abs().max(), ".", color=COLORS[name], ms=2.5)
        axis.set_ylim(-1.1, 1.1)
        axis.set_ylabel("−gradient\n/ largest")
        axis.set_title(f"{name}: largest entry {step.abs().max():.2g}", loc="left", fontsize=9)
    axes[-1].set_xscale("log")
    axes[-1].set_xlabel("the teacher's rank of the class (1: its most likely token)")
    return figure


def draw_share(numbers: dict):
    figure, axis = pyplot.subplots(figsize=(WIDTH, 3.4), layout="constrained")
    for name, found in numbers["losses"].items():
        share = found["share"]
        axis.plot(share["k"], share["share"], color=COLORS[name], label=name, lw=1.6)
    axis.axvline(numbers["seen"], color="gray", ls=":", lw=1, label="tokens the teacher\nwas trained on")
    axis.set_xscale("log")
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("k, the teacher's first classes")
    axis.set_ylabel("share of ‖gradient‖² in them")
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def draw_weight(weights: dict):
    figure, axes = pyplot.subplots(1, 2, figsize=(WIDTH, 3.2), layout="constrained", width_ratios=(1, 1.3))
    names = ("Spearman", "Spearman top 128")
    times = [when for when in weights[names[0]] if when != "scaled"]
    for i, name in enumerate(names):
        for j, when in enumerate(times):
            low, middle, high = weights[name][when]
            place = i + 0.25 * (j - 0.5)
            axes[0].plot([place, place], [low, high], color=COLORS[name], lw=2, alpha=1 if j else 0.5)
            axes[0].plot(place, middle, "o", color=COLORS[name], ms=6, mfc=COLORS[name] if j else "white", zorder=3)
        middle = [x[1] for x in weights[name]["scaled"]]
        axes[1].plot(weights["scales"], middle, "o-", color=COLORS[name], ms=4, label=name)
        low, high = ([x[k] for x in weights[name]["scaled"]] for k in (0, 2))
        axes[1].fill_between(weights["scales"], low, high, color=COLORS[name], alpha=0.15, lw=0)
    for j, when in enumerate(times):
        axes[0].plot([], [], "o", color="gray", mfc="gray" if j else "white", label=when)
    axes[0].set_xticks(range(len(names)), names)
    axes[0].set_xlim(-0.5, len(names) - 0.5)
    axes[0].set_ylabel("‖gradient of KL‖ / ‖its gradient‖")
    axes[0].legend(loc="upper right")
    axes[1].set_xlabel("both rows of logits times c; below: teacher's entropy, nats")
    entropy = weights["teacher entropy"]
    axes[1].set_xticks(weights["scales"], [f"{c}\n({h:.1f})" for c, h in zip(weights["scales"], entropy, strict=True)])
    axes[1].legend(loc="lower left")
    for axis in axes:
        axis.set_yscale("log")
        axis.axhline(1, color="gray", lw=0.8)
    low = min(axis.get_ylim()[0] for axis in axes)
    high = max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
        axis.set_ylim(low, high)
    return figure


def draw_eps(numbers: dict):
    found, lapsum = numbers["permutahedron"], numbers["LapSum"]
    figure, axes = pyplot.subplots(1, 3, figsize=(WIDTH, 3.0), layout="constrained")
    axes[0].plot(found["eps"], found["blocks"], "o-", color="tab:brown", ms=3.5)
    axes[0].set_yscale("log")
    axes[0].set_title(f"blocks of {numbers['classes']:,} classes", fontsize=9)
    axes[1].plot(found["eps"], found["cosine"], "o-", color="tab:brown", ms=3.5, label="permutahedron, eps")
    axes[1].plot(lapsum["tau"], lapsum["cosine"], "s-", color="tab:blue", ms=3.5, label="LapSum, tau")
    axes[1].set_title("cosine with the gradient of Pearson", fontsize=9)
    axes[1].legend(loc="lower right", fontsize=8)
    axes[2].plot(found["eps"], found["zeros"], "o-", color="tab:brown", ms=3.5)
    axes[2].set_title("gradient 0 at teacher's first 100", fontsize=9)
    axes[2].set_ylabel("share")
    axes[2].set_ylim(-0.03, 1.03)
    for axis in axes:
        axis.set_xscale("log")
        axis.axvline(found["one block from"], color="gray", ls=":", lw=1)
        axis.set_xlabel("eps" if axis is not axes[1] else "eps, tau")
    return figure
