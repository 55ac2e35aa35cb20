"""The catalogue as a table: what `kdkernels losses` prints, all of it from the classes themselves."""

import inspect
from typing import NamedTuple

from .elements import HEADER, LINE, OPERANDS
from .loss import MOMENTS
from .options import MEAN_S
from .rowwise import RowsLoss
from .tape import Op

EXPONENTIALS = (Op.EXP, Op.EXPM1, Op.LOG, Op.LOG1P, Op.SOFTPLUS)
COST = (
    "Cost: of a training step, for each class: w is the bytes of a logit (s and t read and the gradient written, each "
    "once, as where a row stays in cache or on chip; two sweeps read s and t twice), exp the exponentials and "
    "logarithms of the statistics + of the gradient."
)


def run_losses(options):
    """List every loss of the catalogue: its short name for `--loss`, the class with its own options, the formula, the
    paper, what it needs beside the student's logits, its points of the log-partition in the logits s and t, cost."""
    import kdkernels as kd

    from .trainer.losses import describe, options_of, short

    rows = []
    for name, cls in kd.catalogue().items():
        _, formula, paper = describe(cls)
        loss = cls()
        points = ", ".join(map(spelled_point, loss.points())) if isinstance(loss, kd.Loss) else "none: whole rows"
        points += ", and phi" * isinstance(loss, kd.SeparableLoss)
        rows.append([short(name), constructor(cls), needs(cls), formula, paper, points, spelled_cost(loss)])
    shared = ", ".join(f"{name}={value!r}" for name, value in options_of(kd.Loss).items())
    foot = f"Every loss also takes {shared} (KDLoss: alpha in place of kd_weight and ce_weight; those without points " \
           "have no teacher_temperature and no standardize)."
    columns = ["--loss", "class", "needs", "formula", "paper", "points", "cost"]
    print_catalogue(columns, rows, f"{foot} With a ce_weight it needs labels. {COST}")


def constructor(cls):
    """'RenyiLoss(alpha=0.5)': the options of its own, and those of every loss for which it has another default."""
    import kdkernels as kd

    from .trainer.losses import options_of

    shared, order = options_of(kd.Loss), [*inspect.signature(cls.__init__).parameters]
    own = {name: value for name, value in options_of(cls).items() if name not in shared or shared[name] != value}
    return f"{cls.__name__}({', '.join(f'{name}={own[name]!r}' for name in sorted(own, key=order.index))})"


def needs(cls):
    return ", ".join(["teacher"] * cls.needs_teacher + ["labels"] * cls()._uses.labels)


def spelled_point(point):
    """Point(student=0.5, teacher=1) -> '0.5 s + t'."""
    scales = {"s": point.student, "t": point.teacher}
    terms = [name if scale == 1 else f"{scale:.3g} {name}" for name, scale in scales.items() if scale]
    notes = {"constant": point.frozen, "without the label": point.exclude_label, "at T = 1": point.raw}
    noted = ", ".join(note for note, holds in notes.items() if holds)
    return (" + ".join(terms) or "0") + (f" ({noted})" if noted else "")


class Cost(NamedTuple):
    """Of a training step, for each class: logits moved (those read and the gradient written, each once), and
    exponentials and logarithms of the statistics and of the gradient."""

    moved: int
    statistics: int
    gradient: int


def cost(loss):
    """-> the Cost of a Loss, from its points and its phi; None of one with neither, or with kernels of its own."""
    import kdkernels as kd

    own = isinstance(loss, RowsLoss) and loss.kernels
    if own or not isinstance(loss, kd.Loss):
        return None
    points, code = loss.all_points(), loss._single.code.tolist()
    tilted = [k for k, p in enumerate(points) if p.student or p.teacher]
    means = [k for k in tilted if int(code[4 + k]) & MEAN_S]  # their slope weighs by softmax(x)
    lines = [code[at : at + 5] for at in range(4 + len(points), 4 + len(points) + 5 * int(code[1]), 5)]
    used = {code[3]} | {r for op, *operands, _ in lines for r in operands[: OPERANDS.get(Op(int(op)), 1)]}
    sloped = {k for k in tilted if points[k].student and not points[k].frozen and MOMENTS * k in used} | set(means)
    logs = logarithms(code[4 + len(points) + 5 * int(code[1]) :]) if code[2] else 0
    return Cost(2 + loss.needs_teacher, len(tilted) + logs, len(sloped) + logs)


def logarithms(program):
    """Of phi and its slope by the student, of a program of `kdkernels.elements`."""
    early, constants = int(program[1]), int(program[3])
    lines = program[HEADER + constants :]
    return sum(int(lines[LINE * i]) in EXPONENTIALS for i in range(early))


def spelled_cost(loss):
    """'3 w, 2 + 2 exp', and what a class says of itself."""
    found = cost(loss)
    derived = f"{found.moved} w, {found.statistics} + {found.gradient} exp" if found else ""
    return "; ".join(filter(None, (derived, loss.work)))


def print_catalogue(columns, rows, foot):
    """A table as wide as the terminal, or as COLUMNS says; without rich (it comes with the train extra) plain lines."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(*("\n  ".join(row) for row in [columns, *rows]), foot, sep="\n")
        return
    console, table = Console(), Table(box=None, padding=(0, 2, 1, 0))
    if console.width < 160:  # no room for seven columns: the last four lie below each other
        columns, rows = [*columns[:3], ", ".join(columns[3:])], [[*row[:3], "\n".join(row[3:])] for row in rows]
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
    console.print(Text(foot))
