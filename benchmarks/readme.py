"""Tables of the README and of pages/peers.md, made of the JSON in results/.

    python -m benchmarks.readme    writes them; a test says where they differ
"""

import json
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "benchmarks" / "pages" / "peers.md"
HEAD = """# Every peer beside kdkernels

Written by `kdkernels bench --peers`. ms: forward and backward, the median of interleaved calls. bytes: of an element
of the logits, into and out of operators (of compiled code unknown). peak: what torch's allocator held beyond what was
there, gradients included. error: of the gradient, from float64, over its norm; the peer's own dtype. survived: hard
inputs for which value and gradient are those of the textbook, of those that could be tried (below, with what went
wrong). Cells of libraries that need a GPU were tried in Triton's interpreter and are not timed.
"""
COLUMNS = ("| | ms float32 | ms bfloat16 | bytes float32 | peak, MB float32 / bfloat16 | error float32 / bfloat16 | "
           "survived | has |")  # fmt: skip


def show(x: float | None, form: str = ".3g") -> str:
    return "" if x is None else format(x, form)


def level_of(name: str) -> str:
    from .peers import PEERS

    return "linear" if name == "LinearLoss" or any(p.name == name and p.linear for p in PEERS) else "logits"


def rows_of(found: dict, loss: str, level: str) -> list[tuple[str, dict, dict]]:
    """(name, {dtype: measured}, tried) of a loss at one level, the fastest first, those without a time at the end."""
    cells, of = found["cells"], {}
    for key, cell in cells.items():
        if key.startswith(f"{loss} {level} "):
            for name, measured in cell["contenders"].items():
                of.setdefault(name, {})[cell["dtype"]] = measured
            for name in cell["missing"]:
                of.setdefault(name, {})
    plain = lambda name: "kdkernels" if name.startswith("kdkernels") else name  # noqa: E731
    tried = lambda name: cells.get(f"{loss} tried {plain(name)}", {})  # noqa: E731
    ms = lambda item: min([c["ms"] for c in item[1].values() if "ms" in c], default=float("inf"))  # noqa: E731
    return [(name, measured, tried(name)) for name, measured in sorted(of.items(), key=ms)]


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
            for name, measured, tried in rows:
                both = [measured.get(d, {}) for d in ("float32", "bfloat16")]
                cells = [show(c.get("ms")) or ("" if measured else "needs a GPU") for c in both]
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
    found = json.loads((RESULTS / "peers-cpu.json").read_text())
    of: dict = {}
    for loss in dict.fromkeys(key.split()[0] for key in found["cells"]):
        for level in ("logits", "linear"):
            rows = rows_of(found, loss, level)
            base = dict(row[:2] for row in rows).get("LinearLoss" if level == "linear" else "kdkernels cpu")
            for name, measured, tried in rows:
                line = of.setdefault((level, name), dict(ms=[], peak=[], good=0, cases=0, losses=[]))
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
    ratio = lambda x: times(statistics.median(x)) if x else "needs a GPU"  # noqa: E731
    for (level, name), line in sorted(of.items(), key=lambda item: item[0][0], reverse=True):
        shown = name if level == "logits" else f"{name}, from hidden states"
        survived = f"{line['good']} of {line['cases']}" if line["cases"] else ""
        of_ours = f"{ratio(line['ms'])} | {ratio(line['peak'])}"
        out.append(f"| {shown} | {', '.join(line['losses'])} | {of_ours} | {survived} |")
    return "\n".join([*out, "", where(found)])


def where(found: dict) -> str:
    """Shapes, machine, commit, versions."""
    about, cells = found["runs"][-1], [c for c in found["cells"].values() if "shape" in c]
    shapes = " and ".join(dict.fromkeys(c["shape"].replace("x", " × ") for c in cells))
    versions = ", ".join(f"{name} {v}" for name, v in about["versions"].items() if name not in ("torch", "python"))
    return (f"{shapes} (rows × classes, × hidden size); {about['machine']}; {versions}; commit {about['commit']}; load "
            f"of the machine {about['load']}.")  # fmt: skip


def rows_table() -> str:
    """Of benchmarks.rows."""
    found = json.loads((RESULTS / "rows-cpu.json").read_text())["results"]
    from .rows import LOSSES, MODES

    modes = {**MODES, "out": "the same, `out=` given"}
    lines = ["| logits | work | " + " | ".join(LOSSES) + " |", "|---" * (len(LOSSES) + 2) + "|"]
    two = lambda x: f"{x:.0f}" if x >= 9.95 else f"{x:.1f}"  # noqa: E731
    of: dict = {}
    for r in found:
        of.setdefault((r["shape"], r["dtype"], r["mode"]), {})[r["loss"]] = r["ms"]
    for (shape, dtype, mode), ms in of.items():
        cells = [" / ".join(f"{two(ms[n][k] / ms[n]['kdkernels'])}×" for k in ("eager", "compile")) if n in ms else ""
                 for n in LOSSES]  # fmt: skip
        lines.append(f"| {shape.replace('x', ' × ')} {dtype} | {modes[mode]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


BLOCKS = {"rows": rows_table, "peers": peers_short}


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
    PAGE.write_text(peers_page(json.loads((RESULTS / "peers-cpu.json").read_text())))


if __name__ == "__main__":
    write()
