"""What tables of measurements have in common: numbers in few digits, and of which run they are."""

import json
from collections.abc import Iterable

from .harness import ROOT, Results

RESULTS = ROOT / "benchmarks" / "results"


def show(x: float | None, form: str = ".3g") -> str:
    return "" if x is None else format(x, form)


def where(found: dict) -> str:
    """Shapes, and machine, versions and commit of every run that a cell is of; of several, which cells those are."""
    shapes, runs = [c["shape"].replace("x", " × ") for c in found["cells"].values() if "shape" in c], {}
    for name, cell in found["cells"].items():
        about = found["runs"][cell["run"]]
        runs.setdefault(json.dumps(Results.named(about)), (about, [], []))
        for kept, new in zip(runs[json.dumps(Results.named(about))][1:], (name, about["load"]), strict=True):
            kept.append(new)
    said = [("" if len(runs) == 1 else f"{', '.join(dict.fromkeys(' '.join(n.split()[:2]) for n in names))}: ")
            + footer(about, loads) for about, names, loads in runs.values()]  # fmt: skip
    return "\n\n".join([f"{' and '.join(dict.fromkeys(shapes))} (rows × classes, × hidden size).", *said])


def footer(about: dict, loads: Iterable[float] = ()) -> str:
    """Machine, versions, commit and load of a run."""
    loads = loads or [about["load"]] if "load" in about else []
    versions = ", ".join(f"{k} {v}" for k, v in about.get("versions", {}).items() if k not in ("torch", "python"))
    load = " to ".join(dict.fromkeys(f"{pick(loads):.1f}" for pick in (min, max))) if loads else "not recorded"
    return (f"{about['machine']}; {versions or 'versions not recorded'}; commit {about.get('commit', 'not recorded')}; "
            f"load of the machine {load}.")  # fmt: skip


def of(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def two(x: float) -> str:
    """A ratio, in two digits."""
    return f"{x:.0f}×" if x >= 9.95 else f"{x:.1f}×"


def millis(x: float) -> str:
    return f"{x:.0f} ms" if x >= 99.5 else f"{x:.3g} ms"


def table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])
