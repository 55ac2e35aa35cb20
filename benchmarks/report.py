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
    """A line for each loss, a panel for each shape and dtype: above, eager's time over each contender's; below, the
    share of a copy's bandwidth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(who for c in cells for who in c["contenders"] if "reference" not in who))
    losses = list(dict.fromkeys(c["loss"] for c in sorted(cells, key=lead)))
    panels: dict = {}
    for cell in cells:
        panels.setdefault(f"{cell['shape'].replace('x', ' × ')}\n{cell['dtype']}", []).append(cell)
    size = max(6, 2.6 * len(panels) + 2), 0.36 * len(losses) + 3
    figure, axes = plt.subplots(2, len(panels), figsize=size, squeeze=False, sharex="row", sharey=True,
                                layout="constrained")  # fmt: skip
    labels = {"of_eager": "eager's time / time", "of_copy": "bandwidth / a copy's"}
    for (key, label), row in zip(labels.items(), axes, strict=True):
        for axis, (title, group) in zip(row, panels.items(), strict=True):
            for k, who in enumerate(names):
                found = [(c["contenders"].get(who, {}).get(key), losses.index(c["loss"])) for c in group]
                values = [(1 / x if key == "of_eager" else x, y) for x, y in found if x]
                axis.plot(*zip(*values, strict=True) if values else ((), ()), MARKS[k % len(MARKS)], markersize=4.5,
                          color=f"C{k % 10}", label=who)  # fmt: skip
            axis.axvline(1, color="black", lw=0.8)
            axis.set(xscale="log", xlabel=label)
            axis.set_title(title, fontsize=9)
            axis.grid(alpha=0.3)
        row[0].set_yticks(range(len(losses)), [name.removesuffix("Loss") for name in losses], fontsize=8)
    known = axes[0, 0].get_legend_handles_labels()
    figure.legend(*known, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(f"further right is faster; {about['machine']}; commit {about['commit']}", fontsize=8, wrap=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def lead(cell: dict) -> float:
    """How far the best of kdkernels is before eager."""
    own = [c["of_eager"] for who, c in cell["contenders"].items() if who.startswith("kdkernels") and c.get("of_eager")]
    return -min(own, default=1.0)


MARKS = "osD^v<>PX*"
