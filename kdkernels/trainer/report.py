"""What a run shows: bars, lines where there is no terminal, the table, the curves."""

import contextlib
import sys
import time

COLUMNS = {
    "ce": "validation CE",
    "kl": "KL to teacher",
    "agreement": "top-1 agreement",
    "acceptance": "acceptance 1-TVD",
}
SECONDS_BETWEEN_LINES = 5.0


@contextlib.contextmanager
def progress(title, unit):
    """Yield bar(done, total, speed=..., **losses): a rich bar on a terminal, a line every few seconds elsewhere."""
    if sys.stdout.isatty():
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        text, rest = TextColumn("{task.description:<10}"), TextColumn("{task.fields[note]}")
        with Progress(text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), rest) as bars:
            task = bars.add_task(title, total=None, note="")

            def bar(done, total, **values):
                bars.update(task, completed=done, total=total, note=note(values, unit))

            yield bar
        return

    started, shown, before = time.monotonic(), 0.0, None

    def line(done, total, **values):
        nonlocal shown, before
        now = time.monotonic()
        before = before or (done, now)  # a resumed stage does not start at 0
        if now - shown >= SECONDS_BETWEEN_LINES or done == total:
            shown = now
            left = (now - before[1]) / (done - before[0]) * (total - done) if done > before[0] else None
            eta = "" if left is None else f"  ETA {left:.0f} s"
            print(f"{title}: {done}/{total}  {note(values, unit)}{eta}", flush=True)

    yield line
    if before:
        print(f"{title}: {time.monotonic() - started:.0f} s", flush=True)


@contextlib.contextmanager
def silent(title, unit):
    yield lambda done, total, **values: None


def note(values, unit):
    values = dict(values)
    speed = values.pop("speed", None)
    shown = [f"{name} {value:.3f}" for name, value in values.items()]
    return "  ".join(shown + ([f"{speed} {unit}"] if speed else []))


def print_table(title, columns, rows):
    """A rich table; without rich (it comes with the train extra) the same in plain columns."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(title)
        for row in [columns, *rows]:
            print("  " + "  |  ".join(map(str, row)))
        return
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(str(cell).replace("[", "\\[") for cell in row))
    console = Console()
    # A pipe has no width: 80 columns would fold every formula.
    (console if console.is_terminal else Console(width=160)).print(table)


def print_results(table, path):
    rows = [[name, *(f"{figures[key]:.4f}" for key in COLUMNS)] for name, figures in table.items()]
    print_table("held-out text", ["model", *COLUMNS.values()], rows)
    print(f"run folder: {path}")


def draw_curves(records, path, names, teacher_ce):
    """From the journal, against the step: training loss, then validation CE, KL and acceptance."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [r for r in records if r["stage"] == "student"]
    losses = [r for r in records if "loss" in r]
    held = [r for r in records if "held_out" in r]
    figure, axes = pyplot.subplots(1, 4, figsize=(18, 4))
    for color, (key, name) in zip(("tab:gray", "tab:blue"), names.items(), strict=True):
        axes[0].plot([r["step"] for r in losses], [r["loss"][key] for r in losses], color=color, label=name, lw=0.8)
        for axis, figure_name in zip(axes[1:], ("ce", "kl", "acceptance"), strict=True):
            points = [r["held_out"][key][figure_name] for r in held]
            axis.plot([r["step"] for r in held], points, color=color, label=name, marker=".")
            axis.set_title(COLUMNS[figure_name])
    axes[0].set_title("training loss (each its own)")
    if all(value > 0 for r in losses for value in r["loss"].values()):
        axes[0].set_yscale("log")
    axes[1].axhline(teacher_ce, color="tab:green", ls=":", label="teacher")
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    # One legend below all: the label of a loss with its settings would hide the curves of a single plot.
    figure.legend(*axes[1].get_legend_handles_labels(), loc="lower center", ncols=3)
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)
