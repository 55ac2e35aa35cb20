"""What `kdkernels bench` prints and draws of its cells."""

import contextlib
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

COLUMNS = ("contender", "ms", "quartiles", "eager / it", "GB/s", "of a copy", "Gexp/s", "bytes", "peak, MB",
           "error of value", "of gradient")  # fmt: skip


def console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 150, highlight=False)


@contextlib.contextmanager
def progress(total: int):
    """-> a function that says what is measured next."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
               TextColumn("{task.description}"))  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task, first = bar.add_task("", total=total), [True]

        def tell(what: str) -> None:
            if not first.pop():
                bar.advance(task)
            first.append(False)
            bar.update(task, description=what)
            if not sys.stderr.isatty():
                print(what, file=sys.stderr, flush=True)

        yield tell


def number(x: float | None, form: str = ".3g") -> str:
    return "" if x is None else format(x, form)


def line(who: str, cell: dict) -> list[str]:
    if "ms" not in cell:
        return [who, cell["error"]]
    off, rate = cell.get("errors", {}), cell.get("exp_s")
    times = f"{1 / cell['of_eager']:.2f}x" if cell.get("of_eager") else ""
    numbers = rate and rate / 1e9, cell.get("moved")
    return [who, f"{cell['ms']:.3g}", f"{cell['low']:.3g} - {cell['high']:.3g}", times, f"{cell['gb_s']:.3g}",
            f"{100 * cell['of_copy']:.0f} %", *map(number, numbers), f"{cell['peak'] / 1e6:.1f}",
            *(number(off.get(key), ".1e") for key in ("value", "gradient"))]  # fmt: skip


def table(cells: list[dict], about: dict) -> None:
    out = console()
    for cell in cells:
        shown = Table(title=f"{cell['loss']} {cell['shape']} {cell['dtype']} on {cell['device']}", title_justify="left",
                      caption=f"work on a class: {cell['work']}", caption_justify="left")  # fmt: skip
        for name in COLUMNS:
            shown.add_column(name, justify="left" if name == "contender" else "right")
        for who, found in cell["contenders"].items():
            shown.add_row(*line(who, found))
        for who, why in cell["missing"].items():
            shown.add_row(who, why)
        out.print(shown)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    out.print(f"forward and backward; {about['machine']}; commit {about['commit']}; {versions}; load {about['load']}")


def plot(cells: list[dict], about: dict, path: Path) -> None:
    """Above, eager's time over each contender's; below, the share of a copy's bandwidth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(who for c in cells for who in c["contenders"] if "reference" not in who))
    labels = [f"{c['loss'].removesuffix('Loss')} {c['shape']} {c['dtype']}" for c in cells]
    figure, axes = plt.subplots(2, 1, figsize=(max(6, 0.45 * len(cells) + 3), 8), sharex=True, layout="constrained")
    for axis, key in zip(axes, ("of_eager", "of_copy"), strict=True):
        for k, who in enumerate(names):
            at = [i for i, c in enumerate(cells) if c["contenders"].get(who, {}).get(key)]
            values = [cells[i]["contenders"][who][key] for i in at]
            heights = [1 / x for x in values] if key == "of_eager" else values
            places = [i + 0.6 * k / len(names) - 0.3 for i in at]
            axis.plot(places, heights, "o", markersize=4, label=who, color=f"C{k}")
    axes[0].axhline(1, color="black", lw=0.8)
    axes[0].set(yscale="log", ylabel="time of eager / time (higher is faster)")
    axes[1].axhline(1, color="black", lw=0.8)
    axes[1].set(yscale="log", ylabel="bandwidth of the bytes needed / a copy's")
    axes[1].set_xticks(range(len(cells)), labels, rotation=90, fontsize=7)
    axes[0].legend(fontsize=7, ncols=3)
    figure.suptitle(f"{about['machine']}; commit {about['commit']}", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
