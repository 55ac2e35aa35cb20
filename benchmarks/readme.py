"""Tables of the README, of pages/peers.md and of pages/speed.md, made of the JSON in results/.

    python -m benchmarks.readme    writes them; a test says where they differ
"""

import re
import statistics

from .harness import ROOT
from .peers_page import peers_page, peers_short
from .tables import footer, millis, of, table, two, where

PAGE = ROOT / "benchmarks" / "pages" / "peers.md"
GALLERY = PAGE.with_name("gallery.md")
SPEED = """# Every loss, fused linear and ranks beside others

Written by `python -m benchmarks.readme` of the JSON in benchmarks/results. Medians of interleaved calls, forward and
backward.

## Every loss, by `kdkernels bench`

Milliseconds of kdkernels, and the time of eager torch and of `torch.compile` over that: below 1× kdkernels loses, to
whom stands in the last column. Gexp/s are 10⁹ exponentials a second of kdkernels, as its points or phi count them; a
loss with kernels of its own has no such count, and its work on a class stands there instead (w: words moved).
"""
FROM_HIDDEN = """## From hidden states, by `python -m benchmarks.linear`

Forward KL of rows × classes × hidden size: time over that of the four matrix products alone. Then the memory of a step
at its peak, gradients included, of 32000 classes and hidden size 128 in float32.
"""
RANKS = """## Ranks and correlations, by `python -m benchmarks.ranks`

Spearman's loss of 64 × 131072 in three runs. "forward" and the metrics (rho, tau-b) have no backward. Turns of at least
50 ms, the median call of each; and a single call of ours straight after one of the others.
"""
def rows_table() -> str:
    """Of benchmarks.rows."""
    from .rows import LOSSES, MODES

    modes, cells, found = {**MODES, "out": "the same, `out=` given"}, {}, of("rows-cpu")
    for r in found["results"]:
        cells.setdefault((r["shape"], r["dtype"], r["mode"]), {})[r["loss"]] = r["ms"]
    lines, lost = [], []
    for (shape, dtype, mode), ms in cells.items():
        ratios = [" / ".join(two(ms[n][k] / ms[n]["kdkernels"]) for k in ("eager", "compile")) if n in ms else "not run"
                  for n in LOSSES]  # fmt: skip
        lost += [f"{k} in {n} of {shape.replace('x', ' × ')} {dtype}, {modes[mode]}"
                 for n in ms for k in ("eager", "compile") if ms[n][k] < ms[n]["kdkernels"]]  # fmt: skip
        lines.append([f"{shape.replace('x', ' × ')} {dtype}", modes[mode], *ratios])
    wide = [r for r in found["results"] if (r["loss"], r["shape"], r["mode"]) == ("ForwardKL", "512x128256", "step")]
    own = [f"{millis(r['ms']['kdkernels'])} in {r['dtype']}, where the bytes alone take {millis(r['floors']['bytes'])}"
           for r in wide]  # fmt: skip
    said = [f"ForwardKL of 512 × 128256, forward and backward, took {'; '.join(own)}.",
            f"kdkernels is slower than {'; '.join(lost)}." if lost else "No cell is below 1×."]  # fmt: skip
    return "\n\n".join([table(["logits", "work", *LOSSES], lines), *said, footer(found)])


def of_losses(found: dict) -> dict[str, dict[str, dict]]:
    """Of `kdkernels bench`: {loss: {dtype: milliseconds, others' over that, who is faster, exponentials}}."""
    lines: dict = {}
    for cell in found["cells"].values():
        ms = {who: c["ms"] for who, c in cell["contenders"].items() if "ms" in c}
        own = next(who for who in ("kdkernels cpu", "kdkernels torch") if who in ms)
        faster = [who for who in ms if ms[who] < ms[own] and not who.startswith("kdkernels")]
        rate = cell["contenders"][own].get("exp_s")
        lines.setdefault(cell["loss"], {})[cell["dtype"]] = dict(
            ms=ms[own], eager=ms["eager"] / ms[own], compile=ms["compile"] / ms[own], faster=faster,
            exponentials=cell.get("work", "not recorded") if rate is None else f"{rate / 1e9:.2g}",
        )  # fmt: skip
    return lines


def of_shapes() -> dict[str, dict]:
    """{shape: what `kdkernels bench` found of it}."""
    found, shapes = of("bench-cpu"), {}
    for name, cell in found["cells"].items():
        shapes.setdefault(cell["shape"], {"runs": found["runs"], "cells": {}})["cells"][name] = cell
    return shapes


def losses_short() -> str:
    """The medians, and who is slower than another contender in any dtype."""
    found, said = of_shapes()["64x32000"], []
    lines = of_losses(found)
    for key, other in (("eager", "eager torch"), ("compile", "`torch.compile`")):
        ratios = [cell[key] for cells in lines.values() for cell in cells.values()]
        slower = [f"`{name}`" for name, cells in lines.items() if any(cell[key] < 1 for cell in cells.values())]
        said.append(f"{other} takes {two(statistics.median(ratios))} in the median, and is faster than "
                    + (", ".join(slower) or "none"))  # fmt: skip
    return f"Of {len(lines)} losses, in float32 and bfloat16: {'; '.join(said)}.\n\n{where(found)}"


def losses_table() -> str:
    return "\n\n".join(map(of_shape, of_shapes().values()))


def of_shape(found: dict) -> str:
    lines = of_losses(found)
    dtypes = list(dict.fromkeys(dtype for cells in lines.values() for dtype in cells))
    least = lambda name: min(min(c["eager"], c["compile"]) for c in lines[name].values())  # noqa: E731
    rows = []
    for name in sorted(lines, key=least, reverse=True):
        cells = lines[name]
        times = [x for d in dtypes for x in (millis(cells[d]["ms"]), " / ".join(two(cells[d][k]) for k in OTHERS))]
        rates = " / ".join(dict.fromkeys(cells[d]["exponentials"] for d in dtypes))
        faster = [f"{who} in {d}" for d in dtypes for who in cells[d]["faster"]]
        rows.append([f"`{name}`", *times, rates, ", ".join(faster) or "none"])
    head = ["", *(f"{dtype}{of}" for dtype in dtypes for of in ("", ", eager / compile")), "Gexp/s, or why none",
            "faster than kdkernels"]  # fmt: skip
    return table(head, rows) + "\n\n" + where(found)


OTHERS = "eager", "compile"
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
        faster = [LINEAR[name] for name in names if cell["ms"][name] < cell["ms"]["LinearLoss"] and "64" not in name]
        lines.append([shape, millis(cell["ms"]["products"]), *ratios, ", ".join(faster) or "none"])
    for cell in found["memory"] if memory else ():
        mib = [f"{cell['bytes'][name] / 2**20:.0f}" for name in names]
        lines.append([f"{cell['rows']} rows: MiB", "no step", *mib, "memory"])
    absent = "; ".join(f"{name}: {why}" for name, why in found["missing"].items())
    best = "; ".join(f"{cell['shape'].replace('x', ' × ')} {cell['dtype']} {v}" for cell in found["time"]
                     for best in cell.get("settings", {}).values() for v in best.values())  # fmt: skip
    said = [footer(found), absent and f"Not timed: {absent}.", best and f"Liger's fastest chunks, in rows: {best}."]
    head = ["", "products", *(LINEAR[name] for name in names), "faster than LinearLoss"]
    return table(head, lines) + "\n\n" + " ".join(filter(None, said))


def ranks_table(only: str = "") -> str:
    """Of benchmarks.ranks: the whole run, and two more of Spearman's loss."""
    runs, lines = [of(name) for name in ("ranks-cpu", "ranks-cpu-spearman", "ranks-cpu-spearman-again")], []
    for k, cell in ((k, cell) for k, found in enumerate(runs, 1) for cell in found["results"]):
        shape, ours = f"{cell['shape'].replace('x', ' × ')} {cell['dtype']}", cell["ms"]["kdkernels"]
        after = millis(cell["after"]) if "after" in cell else ""
        others = ", ".join(f"{who} {two(ms / ours)}{' (faster)' if ms < ours else ''}"
                           for who, ms in cell["ms"].items() if who != "kdkernels")  # fmt: skip
        if others and f"{cell['name']} {shape}".startswith(only):
            lines.append([cell["name"], shape, str(k), millis(ours), after, others])
    said = "\n".join(f"* Run {k}: {footer(found)}" for k, found in enumerate(runs, 1))
    head = ["", "logits", "run", "kdkernels", "straight after another", "others over kdkernels"]
    return table(head, lines) + "\n\n" + said


def speed_page() -> str:
    parts = [SPEED, losses_table(), FROM_HIDDEN, linear_table(), RANKS, ranks_table()]
    return "\n".join([*(part.strip() + "\n" for part in parts)])


def soak_line() -> str:
    """Of benchmarks.soak: the lowest memory, and not the mean, for what a step needs comes and goes."""
    found = of("soak")
    samples, size = found["samples"], len(found["samples"]) // 6
    early, late = (min(s["bytes"] for s in part) / 2**20 for part in (samples[size : 2 * size], samples[-size:]))
    return (f"{found['steps']:,} forward and backward passes of {found['losses']} losses in {found['minutes']:.0f} "
            f"minutes, each of a shape and dtype of its own. The lowest memory seen in the second sixth of them was "
            f"{early:.1f} MiB, in the last {late:.1f}; a line through all but the first sixth rises by "
            f"{found['growth_kib_per_1000_steps']:.1f} KiB a thousand steps. {footer(found)}")  # fmt: skip


BLOCKS = {"rows": rows_table, "losses": losses_short, "linear": lambda: linear_table(memory=False),
          "ranks": lambda: ranks_table("Spearman 64 × 131072"), "peers": peers_short}  # fmt: skip
IN_GALLERY = {"soak": soak_line}


def made(text: str, blocks: dict | None = None) -> str:
    """The README, or a page with other blocks, with its blocks made anew."""
    for name, block in (blocks or BLOCKS).items():
        marks = re.compile(rf"(<!-- {name}: [^>]*-->\n).*?(\n<!-- end -->)", re.DOTALL)
        text, count = marks.subn(lambda m, b=block: m[1] + b() + m[2], text)
        if count != 1:
            raise ValueError(f"the page has {count} blocks <!-- {name}: ... --> ... <!-- end -->")
    return text


def write() -> None:
    readme = ROOT / "README.md"
    readme.write_text(made(readme.read_text()))
    GALLERY.write_text(made(GALLERY.read_text(), IN_GALLERY))
    PAGE.write_text(peers_page(of("peers-cpu")))
    PAGE.with_name("speed.md").write_text(speed_page())


if __name__ == "__main__":
    write()
