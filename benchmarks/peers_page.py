"""Tables of every peer: pages/peers.md, and the README's, of results/peers-cpu.json."""

import statistics

from .tables import of, show, where

HEAD = """# Every peer beside kdkernels

Written by `kdkernels bench --peers`. ms: forward and backward, the median of interleaved calls. bytes: of an element
of the logits, into and out of operators (of compiled code unknown). peak: what torch's allocator held beyond what was
there, gradients included. error: of the gradient, from float64, over its norm; the peer's own dtype. survived: hard
inputs for which value and gradient are those of the textbook, of those that could be tried (below, with what went
wrong). Cells of libraries that need a GPU were tried in Triton's interpreter and are not timed. eager is the formula as
one writes it in torch, of CrossEntropyLoss `F.cross_entropy`; compile is `torch.compile` of that. "over kdkernels'" is
the time over that of kdkernels with its gradient allocated (float32 / bfloat16), and says where kdkernels is slower.
"""
RANKED = "not tried: the inputs are hard ones of divergences, and libraries define soft ranks differently"
NOT_RUN = {
    "QuACK": "cross-entropy alone, in CuTe DSL for Hopper and Blackwell",
    "CCE (cut-cross-entropy)": "cross-entropy alone, in Triton for GPUs from Ampere on; without one torch.compile's",
    "Liger's CuTe cross-entropy": "for Hopper, cross-entropy and entropy alone",
    "Fast-LLM": "Triton kernels inside a training framework, no module to call: needs a GPU; not tried",
    "speculators": "Triton kernels of 32 warps a row, without temperature and mask: needs a GPU; not tried",
    "NeMo Automodel": "its Triton soft cross-entropy takes the teacher's probabilities and overwrites the student's "
                      "logits: needs a GPU; not tried",
    "NeMo, Megatron, ModelOpt": "eager torch over the process groups of Megatron: on one rank it is the row eager",
    "verl": "FlashKL is a kernel for GPUs within its trainer; what it runs without is eager torch",
    "VeOmni, axolotl": "forward KL over the teacher's first k classes: another loss",
    "DistillKit": "of a dense teacher log_softmax and kl_div in float32, which is the row eager; on no package index",
    "distillm, abkd, TTM, DIST, mdistiller, torchdistill": "eager torch, and no package of losses: the row eager is "
                                                           "the formula; `kdkernels recipes` has what they claim",
    "LapSum": "its formula, by sorting, is the row eager of SpearmanLoss",
    "diffsort": "sorting networks: a matrix of V × V for each row, 4 GB at 32000 classes in float32",
    "torchmetrics": "metrics, not losses: its Spearman is timed beside ours by `python -m benchmarks.ranks`",
}  # fmt: skip
COLUMNS = ("| | ms float32 | ms bfloat16 | over kdkernels' | bytes float32 | peak, MB float32 / bfloat16 | error "
           "float32 / bfloat16 | survived | has |")  # fmt: skip


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


def base_of(rows: list) -> str:
    """The row that others are measured in: kdkernels with its gradient allocated."""
    return next(name for name, *_ in rows if name == "LinearLoss" or (name.startswith("kdkernels") and "," not in name))


def beside(name: str, base: str, rows: list) -> str:
    """A row's time over kdkernels', and in words where kdkernels is slower."""
    ms = {who: {d: c["ms"] for d, c in measured.items() if "ms" in c} for who, measured, *_ in rows}
    less = lambda who: [d for d, x in ms[who].items() if x < ms[base][d]]  # noqa: E731
    if name == base:
        faster = [f"{who} in {' and '.join(less(who))}" for who in ms if less(who) and not who.startswith("kdkernels")]
        return f"1×; slower than {', '.join(faster)}" if faster else "1×"
    said = " / ".join(f"{x / ms[base][d]:.2f}×" for d, x in ms[name].items()) or "not timed"
    lost = f"; kdkernels is slower in {' and '.join(less(name))}" if less(name) and "," not in name else ""
    return said + lost


def survival(name: str, tried: dict) -> str:
    if "cases" not in tried:
        return tried.get("why") or ("as eager" if name == "compile" else RANKED)
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
            lines += [f"## {loss}, {cell['shape']} {level}\n", COLUMNS, "|---" * 9 + "|"]
            base = base_of(rows)
            for name, measured, tried, why in rows:
                both = [measured.get(d, {}) for d in ("float32", "bfloat16")]
                cells = [show(c.get("ms")) or why for c in both]
                peak = " / ".join(show(c["peak"] / 1e6, ".1f") for c in both if "peak" in c) or "not timed"
                error = " / ".join(show(c["errors"]["gradient"], ".1e") for c in both if "errors" in c) or "not timed"
                if name == "torchsort":
                    error = "another definition"
                moved = show(both[0].get("moved")) or ("unknown" if "ms" in both[0] else "not timed")
                has = ", ".join(k for k, v in tried.get("features", {}).items() if v)
                untried = "as eager" if name == "compile" else "not tried"
                has = has or ("none of these" if "features" in tried else untried)
                lines.append(f"| {name} | {cells[0]} | {cells[1]} | {beside(name, base, rows)} | {moved} | {peak} | "
                             f"{error} | {survival(name, tried)} | {has} |")  # fmt: skip
            lines.append("")
    lines += ["## What went wrong\n"]
    for key, cell in found["cells"].items():
        wrong = {k: v for k, v in cell.get("cases", {}).items() if v != "ok"}
        if wrong:
            loss, _, name = key.split(" ", 2)
            lines.append(f"* {name}, {loss}: " + "; ".join(f"{k}: {v}" for k, v in wrong.items()))
    absent = [f"* {name}: {why}." for name, why in NOT_RUN.items()]
    return "\n".join([*lines, "", "## Not in these tables\n", *absent, "", where(found), ""])


def peers_short() -> str:
    """A line for each library: its time and peak over kdkernels' (medians over losses and dtypes), cases survived."""
    found, lines = of("peers-cpu"), {}
    for loss in dict.fromkeys(key.split()[0] for key in found["cells"]):
        for level in ("logits", "linear"):
            rows = rows_of(found, loss, level)
            if not rows:
                continue
            base = dict(row[:2] for row in rows)[base_of(rows)]
            for name, measured, tried, why in rows:
                line = lines.setdefault((level, name), dict(ms=[], peak=[], good=0, cases=0, losses=[], why=why,
                                                             faster=[]))  # fmt: skip
                line["losses"].append(loss.removesuffix("Loss"))
                for dtype, cell in measured.items():
                    if "ms" in cell:
                        line["ms"].append(cell["ms"] / base[dtype]["ms"])
                        if line["ms"][-1] < 1:
                            line["faster"].append(f"{loss.removesuffix('Loss')} {dtype}")
                        line["peak"].append(cell["peak"] / base[dtype]["peak"])
                verdicts = tried.get("cases", {}).values()
                line["good"] += sum(v == "ok" for v in verdicts)
                line["cases"] += len(verdicts)
    out = ["| | losses | time | peak memory | hard inputs survived |", "|---|---|---|---|---|"]
    times = lambda x: f"{x:.2g}×" if x >= 0.01 else "< 0.01×"  # noqa: E731
    for (level, name), line in sorted(lines.items(), key=lambda item: item[0][0], reverse=True):
        shown = name if level == "logits" else f"{name}, from hidden states"
        untried = "as eager" if name == "compile" else "not tried"
        survived = f"{line['good']} of {line['cases']}" if line["cases"] else untried
        time, peak = (times(statistics.median(x)) if x else line["why"] for x in (line["ms"], line["peak"]))
        if line["faster"] and not name.startswith("kdkernels"):
            time += f"; kdkernels is slower in {', '.join(line['faster'])}"
        of_ours = f"{time} | {peak}"
        out.append(f"| {shown} | {', '.join(line['losses'])} | {of_ours} | {survived} |")
    return "\n".join([*out, "", where(found)])
