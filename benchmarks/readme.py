"""Tables of the README, of pages/peers.md and of pages/speed.md, made of the JSON in results/.

    python -m benchmarks.readme    writes them; a test says where they differ
"""

import json
import re
import statistics
from collections.abc import Iterable
from pathlib import Path

from .harness import Results

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "benchmarks" / "pages" / "peers.md"
HEAD = """# Every peer beside kdkernels

Written by `kdkernels bench --peers`. ms: forward and backward, the median of interleaved calls. bytes: of an element
of the logits, into and out of operators (of compiled code unknown). peak: what torch's allocator held beyond what was
there, gradients included. error: of the gradient, from float64, over its norm; the peer's own dtype. survived: hard
inputs for which value and gradient are those of the textbook, of those that could be tried (below, with what went
wrong). Cells of libraries that need a GPU were tried in Triton's interpreter and are not timed.
"""
SPEED = """# Every loss, fused linear and ranks beside others

Written by `python -m benchmarks.readme` of the JSON in benchmarks/results. Medians of interleaved calls, forward and
backward.

## Every loss, by `kdkernels bench`

Milliseconds of kdkernels, and the time of eager torch and of `torch.compile` over that. Where the ratio is below 1×,
kdkernels loses.
"""
FROM_HIDDEN = """## From hidden states, by `python -m benchmarks.linear`

Forward KL of rows × classes × hidden size: time over that of the four matrix products alone. Then the memory of a step
at its peak, gradients included, of 32000 classes and hidden size 128 in float32.
"""
RANKS = """## Ranks and correlations, by `python -m benchmarks.ranks`

Spearman's loss of 64 × 131072 in three runs. "forward" and the metrics (rho, tau-b) have no backward.
"""
COLUMNS = ("| | ms float32 | ms bfloat16 | bytes float32 | peak, MB float32 / bfloat16 | error float32 / bfloat16 | "
           "survived | has |")  # fmt: skip


def show(x: float | None, form: str = ".3g") -> str:
    return "" if x is None else format(x, form)


def level_of(name: str) -> str:
    from .peers import PEERS

    return "linear" if name == "LinearLoss" or any(p.name == name and p.linear for p in PEERS) else "logits"


def rows_of(found: dict, loss: str, level: str) -> list[tuple[str, dict, dict, str]]:
    """(name, {dtype: measured}, tried, why there is no time) of a loss at one level, the fastest first, those without
    a time at the end."""
    cells, who, why = found["cells"], {}, {}
    for key, cell in cells.items():
        if key.startswith(f"{loss} {level} "):
            for name, measured in cell["contenders"].items():
                who.setdefault(name, {})[cell["dtype"]] = measured
                why[name] = measured.get("error", "")
            for name in cell["missing"]:
                who.setdefault(name, {})
            why |= cell["missing"]
    plain = lambda name: "kdkernels" if name.startswith("kdkernels") else name  # noqa: E731
    tried = lambda name: cells.get(f"{loss} tried {plain(name)}", {})  # noqa: E731
    ms = lambda item: min([c["ms"] for c in item[1].values() if "ms" in c], default=float("inf"))  # noqa: E731
    return [(name, measured, tried(name), why[name]) for name, measured in sorted(who.items(), key=ms)]


def survival(tried: dict) -> str:
    if "cases" not in tried:
        return tried.get("why", "")
    good = sum(v == "ok" for v in tried["cases"].values())
    return f"{good} of {len(tried['cases'])}"


def peers_page(found: dict) -> str:
    lines = [HEAD]
    for loss in dict.fromkeys(key.split()[0] for key in found["cells"]):
        for level in ("logits", "linear"):
            rows = rows_of(found, loss, level)
            if not rows:
                continue
            cell = next(c for k, c in found["cells"].items() if k.startswith(f"{loss} {level} "))
            lines += [f"## {loss}, {cell['shape']} {level}\n", COLUMNS, "|---" * 8 + "|"]
            for name, measured, tried, why in rows:
                both = [measured.get(d, {}) for d in ("float32", "bfloat16")]
                cells = [show(c.get("ms")) or why for c in both]
                peak = " / ".join(show(c["peak"] / 1e6, ".1f") for c in both if "peak" in c)
                error = " / ".join(show(c["errors"]["gradient"], ".1e") for c in both if "errors" in c)
                if name == "torchsort":
                    error = "another definition"
                has = ", ".join(k for k, v in tried.get("features", {}).items() if v)
                lines.append(f"| {name} | {cells[0]} | {cells[1]} | {show(both[0].get('moved'))} | {peak} | {error} | "
                             f"{survival(tried)} | {has} |")  # fmt: skip
            lines.append("")
    lines += ["## What went wrong\n"]
    for key, cell in found["cells"].items():
        wrong = {k: v for k, v in cell.get("cases", {}).items() if v != "ok"}
        if wrong:
            loss, _, name = key.split(" ", 2)
            lines.append(f"* {name}, {loss}: " + "; ".join(f"{k}: {v}" for k, v in wrong.items()))
    return "\n".join([*lines, "", where(found), ""])


def peers_short() -> str:
    """A line for each library: its time and peak over kdkernels' (medians over losses and dtypes), cases survived."""
    found, lines = of("peers-cpu"), {}
    for loss in dict.fromkeys(key.split()[0] for key in found["cells"]):
        for level in ("logits", "linear"):
            rows = rows_of(found, loss, level)
            base = dict(row[:2] for row in rows).get("LinearLoss" if level == "linear" else "kdkernels cpu")
            for name, measured, tried, why in rows:
                line = lines.setdefault((level, name), dict(ms=[], peak=[], good=0, cases=0, losses=[], why=why))
                line["losses"].append(loss.removesuffix("Loss"))
                for dtype, cell in measured.items():
                    if "ms" in cell:
                        line["ms"].append(cell["ms"] / base[dtype]["ms"])
                        line["peak"].append(cell["peak"] / base[dtype]["peak"])
                verdicts = tried.get("cases", {}).values()
                line["good"] += sum(v == "ok" for v in verdicts)
                line["cases"] += len(verdicts)
    out = ["| | losses | time | peak memory | hard inputs survived |", "|---|---|---|---|---|"]
    times = lambda x: f"{x:.2g}×" if x >= 0.01 else "< 0.01×"  # noqa: E731
    for (level, name), line in sorted(lines.items(), key=lambda item: item[0][0], reverse=True):
        shown = name if level == "logits" else f"{name}, from hidden states"
        survived = f"{line['good']} of {line['cases']}" if line["cases"] else ""
        of_ours = " | ".join(times(statistics.median(x)) if x else line["why"] for x in (line["ms"], line["peak"]))
        out.append(f"| {shown} | {', '.join(line['losses'])} | {of_ours} | {survived} |")
    return "\n".join([*out, "", where(found)])


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


def rows_table() -> str:
    """Of benchmarks.rows."""
    from .rows import LOSSES, MODES

    modes, cells = {**MODES, "out": "the same, `out=` given"}, {}
    for r in of("rows-cpu")["results"]:
        cells.setdefault((r["shape"], r["dtype"], r["mode"]), {})[r["loss"]] = r["ms"]
    lines = []
    for (shape, dtype, mode), ms in cells.items():
        ratios = [" / ".join(two(ms[n][k] / ms[n]["kdkernels"]) for k in ("eager", "compile")) if n in ms else ""
                  for n in LOSSES]  # fmt: skip
        lines.append([f"{shape.replace('x', ' × ')} {dtype}", modes[mode], *ratios])
    return table(["logits", "work", *LOSSES], lines) + "\n\n" + footer(of("rows-cpu"))


def of_losses() -> dict[str, list[tuple[float, float, float]]]:
    """Of `kdkernels bench`: {loss: (ms, eager's over that, torch.compile's over that) of each dtype}."""
    lines: dict = {}
    for cell in of("bench-cpu")["cells"].values():
        ms = {who: c["ms"] for who, c in cell["contenders"].items() if "ms" in c}
        ours = next(ms[who] for who in ("kdkernels cpu", "kdkernels torch") if who in ms)
        lines.setdefault(cell["loss"], []).append((ours, ms["eager"] / ours, ms["compile"] / ours))
    return lines


def losses_short() -> str:
    """The medians, and who is slower than another contender in any dtype."""
    lines, said = of_losses(), []
    for k, other in ((1, "eager torch"), (2, "`torch.compile`")):
        ratios = [cell[k] for cells in lines.values() for cell in cells]
        slower = [f"`{name}`" for name, cells in lines.items() if min(cell[k] for cell in cells) < 1]
        said.append(f"{other} takes {two(statistics.median(ratios))} in the median, and is faster than "
                    + (", ".join(slower) or "none"))  # fmt: skip
    return f"Of {len(lines)} losses, in float32 and bfloat16: {'; '.join(said)}.\n\n{where(of('bench-cpu'))}"


def losses_table() -> str:
    lines = of_losses()
    least = lambda name: min(ratio for _, *ratios in lines[name] for ratio in ratios)  # noqa: E731
    cells = [[f"`{name}`", *(x for ms, *ratios in lines[name] for x in (millis(ms), " / ".join(map(two, ratios))))]
             for name in sorted(lines, key=least, reverse=True)]  # fmt: skip
    head = ["", *(f"{dtype}{of}" for dtype in ("float32", "bfloat16") for of in ("", ", eager / compile"))]
    return table(head, cells) + "\n\n" + where(of("bench-cpu"))


LINEAR = {"LinearLoss": "LinearLoss", "in 64 MiB": "in 64 MiB", "logits": "whole logits", "eager": "eager",
          "torch linear_ce": "`F.linear_cross_entropy`", "Liger chunked": "Liger chunked",
          "TRL chunked": "TRL chunked"}  # fmt: skip


def linear_table(memory: bool = True) -> str:
    """Of benchmarks.linear."""
    found = of("linear-cpu")
    names, lines = [name for name in LINEAR if name in found["time"][0]["ms"]], []
    for cell in found["time"]:
        ratios = [format(cell["ms"][name] / cell["ms"]["products"], ".3g") for name in names]
        shape = f"{cell['shape'].replace('x', ' × ')} {cell['dtype']}"
        lines.append([shape, millis(cell["ms"]["products"]), *ratios])
    for cell in found["memory"] if memory else ():
        lines.append([f"{cell['rows']} rows: MiB", "", *(f"{cell['bytes'][name] / 2**20:.0f}" for name in names)])
    absent = "; ".join(f"{name}: {why}" for name, why in found["missing"].items())
    about = footer(found) + (f" Without a time: {absent}." if absent else "")
    return table(["", "products", *(LINEAR[name] for name in names)], lines) + "\n\n" + about


def ranks_table(only: str = "") -> str:
    """Of benchmarks.ranks: the whole run, and two more of Spearman's loss."""
    runs, lines = [of(name) for name in ("ranks-cpu", "ranks-cpu-spearman", "ranks-cpu-spearman-again")], []
    for k, cell in ((k, cell) for k, found in enumerate(runs, 1) for cell in found["results"]):
        shape, ours = f"{cell['shape'].replace('x', ' × ')} {cell['dtype']}", cell["ms"]["kdkernels"]
        others = ", ".join(f"{who} {two(ms / ours)}" for who, ms in cell["ms"].items() if who != "kdkernels")
        if others and f"{cell['name']} {shape}".startswith(only):
            lines.append([cell["name"], shape, str(k), millis(ours), others])
    said = "\n".join(f"* Run {k}: {footer(found)}" for k, found in enumerate(runs, 1))
    return table(["", "logits", "run", "kdkernels", "others over that"], lines) + "\n\n" + said


def speed_page() -> str:
    parts = [SPEED, losses_table(), FROM_HIDDEN, linear_table(), RANKS, ranks_table()]
    return "\n".join([*(part.strip() + "\n" for part in parts)])


BLOCKS = {"rows": rows_table, "losses": losses_short, "linear": lambda: linear_table(memory=False),
          "ranks": lambda: ranks_table("Spearman 64 × 131072"), "peers": peers_short}  # fmt: skip


def made(text: str) -> str:
    """The README with its blocks made anew."""
    for name, block in BLOCKS.items():
        marks = re.compile(rf"(<!-- {name}: [^>]*-->\n).*?(\n<!-- end -->)", re.DOTALL)
        text, count = marks.subn(lambda m, b=block: m[1] + b() + m[2], text)
        if count != 1:
            raise ValueError(f"README.md has {count} blocks <!-- {name}: ... --> ... <!-- end -->")
    return text


def write() -> None:
    readme = ROOT / "README.md"
    readme.write_text(made(readme.read_text()))
    PAGE.write_text(peers_page(of("peers-cpu")))
    PAGE.with_name("speed.md").write_text(speed_page())


if __name__ == "__main__":
    write()
