"""The table and the plots of a result; they need neither torch nor a device.

Of each time: GB/s at the floor's bytes, that rate over a device-to-device copy's, and the time that the copy's rate or
the measured rate of exponentials asks for, whichever is longer, over the time taken.
"""

OURS = ("cuda 1", "cuda 2", "triton")


def row(cell, rates):
    roof, shown = max(cell["roof"].values()), []
    for name, ms in cell["ms"].items():
        if not isinstance(ms, float):
            shown.append(f"{name} FAILED")
        elif name in OURS:
            copy = cell["floor"] / ms / rates["copy"]
            shown.append(f"{name} {ms:.3f} ({cell['floor'] / ms / 1e6:.0f} GB/s {copy:.2f} {roof / ms:.2f})")
        else:
            shown.append(f"{name} {ms:.3f}")
    shape = "x".join(map(str, cell["shape"]))
    return f"{cell['loss']:<9} {shape:<11} {cell['dtype'][:6]:<6} {cell['mode']:<7}", " | ".join(shown)


def lines(found):
    """A line for each loss and shape: milliseconds of ours, the best one's shares of the copy and of the lower roof."""
    groups = {}
    for cell in found.get("cells", []):
        groups.setdefault((cell["loss"], *cell["shape"], cell["dtype"]), []).append(cell)
    for (loss, rows, classes, dtype), cells in groups.items():
        line = f"{loss:<9} {f'{rows}x{classes}':<11} {dtype[:6]:<6}"
        for cell in cells:
            good = {name: ms for name, ms in cell["ms"].items() if isinstance(ms, float)}
            ours = {name: good[name] for name in OURS if name in good}
            if not ours:
                continue
            best, roof = min(ours.values()), max(cell["roof"].values())
            if cell["mode"] == "step":
                line += " " + "/".join(f"{good[o]:.3f}" if o in good else "FAILED" for o in OURS if o in cell["ms"])
                line += f" copy {cell['floor'] / best / found['rates']['copy']:.2f}"
                line += "".join(f" {o} {ms / best:.1f}x" for o, ms in good.items() if o not in OURS)
            line += f" {cell['mode']} {roof / best:.2f}"
        yield line


def show(result):
    """The compact table: what a terminal that keeps 12,000 characters keeps."""
    found = result["steps"].get("measure", {})
    print(*lines(found), sep="\n")
    ours = "/".join(found.get("contenders", []))
    print(f"ms, forward + backward, of {ours}; the rate of the best one's bytes over a copy's; others over the best;")
    print("the best one's share of the lower roof in each mode (half: incoming gradient 0.5)")
    for name, step in result["steps"].items():
        if "checked" in step or "unavailable" in step:
            wrong = {k: v for k, v in step.get("properties", {}).items() if v != "ok"}
            print(f"{name}: {step.get('unavailable') or ''} {step.get('checked')}/{step.get('planned')} batches, "
                  f"{len(step.get('faults', []))} too far off; {len(step.get('properties', {}))} properties, "
                  f"failed: {wrong or 'none'}")  # fmt: skip
            for fault in step.get("faults", [])[:8]:
                print("  ", fault["case"], "|", fault["batch"], "|", *fault["faults"])
        elif name != "measure":
            print(f"{name}: {step['code']} {step.get('output_tail', '')[-300:] if step['code'] else 'ok'}")
    for cell in found.get("cells", []):
        if "wall" in cell:
            kernels = {o: len(k or ()) for o, k in cell["kernels"].items()}
            print(cell["loss"], cell["shape"], "host ms", {k: round(v, 4) for k, v in cell["wall"].items()}, kernels)
    if "rates" in found:
        print(f"copy {found['rates']['copy'] / 1e6:.0f} GB/s, {found['rates']['exp'] / 1e9:.2f}e12 exponentials/s; "
              f"{found['done']}/{found['planned']} cells;", *found["errors"][:3], result["machine"])  # fmt: skip


def plot(result, stem):
    """Our share of the lower roof by width, and the times beside the others'."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = [c for c in result["steps"]["measure"]["cells"] if c["mode"] == "step"]
    figure, axes = plt.subplots(1, 2, figsize=(13, 5))
    shares, times = {}, {}
    for cell in cells:
        for name, ms in cell["ms"].items():
            if isinstance(ms, float):
                times.setdefault(name, {})[f"{cell['loss']}\n{cell['shape'][1]} {cell['dtype'][:4]}"] = ms
                if name in OURS and cell["dtype"] == "bfloat16":
                    best = shares.setdefault(cell["loss"], {})
                    share = max(cell["roof"].values()) / ms
                    best[cell["shape"][1]] = max(best.get(cell["shape"][1], 0), share)
    for name, line in shares.items():
        axes[0].plot(range(len(line)), [line[v] for v in sorted(line)], "o-", label=name)
        axes[0].set_xticks(range(len(line)), sorted(line))
    axes[0].set(xlabel="classes", ylabel="share of the lower roof, forward + backward", ylim=(0, 1.1))
    axes[0].legend()
    compared = list(times.get("eager", {}))
    for i, (name, line) in enumerate(times.items()):
        at = [k for k in compared if k in line]
        axes[1].bar([compared.index(k) + i * 0.15 for k in at], [line[k] for k in at], 0.15, label=name)
    axes[1].set_xticks(range(len(compared)), compared, fontsize=7)
    axes[1].set(ylabel="ms, forward + backward", yscale="log")
    axes[1].legend()
    figure.suptitle(f"{result['machine'].get('device')}, torch {result['machine'].get('torch')}")
    figure.tight_layout()
    figure.savefig(f"{stem}.png", dpi=120)
    plt.close(figure)
