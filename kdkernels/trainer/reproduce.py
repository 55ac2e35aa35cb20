"""`kdkernels distill --recipe NAME`: a published system, a few seeds of it, and whether its claim holds here."""

import statistics
from pathlib import Path

import torch

from .. import files
from . import parallel, recipelog, recipes
from .checkpoint import read_json
from .config import Config, UserError, flag
from .distill import check_room, need_extra
from .lab import Lab

ROOM = 100 << 20  # bytes, more than any recipe writes
FLAGS = {"recipe", "seeds", "out", "cache", "threads"}


def run(name: str, out, cache, seeds: int = 3, show=print) -> dict:
    """-> {"arms": {arm: [figure of each seed]}, "trend": [...]}, in out/results.json too.

    What an earlier call has done is not repeated.
    """
    recipe, found = recipes.load(name), []
    torch.use_deterministic_algorithms(True)
    for seed in range(seeds):
        path = Path(out) / f"seed-{seed}" / "figures.json"
        if not path.exists():
            kind = getattr(recipe, "LAB", Lab)
            lab = kind(path.parent, cache, seed, lambda text, seed=seed: show(f"{name}, seed {seed}: {text}"))
            files.write_json(path, recipe.run(lab))
        found.append(read_json(path))
    arms = {arm: [figures[arm] for figures in found] for arm in found[0]}
    trend = [dict(better=a, worse=b, holds=holds(arms[a], arms[b])) for a, b in recipe.TREND]
    result = {"recipe": name, "source": recipe.SOURCE, "claim": recipe.CLAIM, "figure": recipe.FIGURE, "arms": arms,
              "trend": trend}  # fmt: skip
    files.write_json(Path(out) / "results.json", result)
    return result


def holds(better: list[float], worse: list[float]) -> str:
    """Whether the mean of the differences, seed by seed, is more than two standard errors away from 0: "yes", "no" or
    "within noise". With one seed nothing is known of the noise."""
    differences = [a - b for a, b in zip(better, worse, strict=True)]
    if len(differences) < 2:
        return "one seed"
    error = statistics.stdev(differences) / len(differences) ** 0.5
    mean = statistics.mean(differences)
    return "within noise" if abs(mean) <= 2 * error else "yes" if mean > 0 else "no"


def report(result: dict) -> str:
    """The table of a result."""
    seeds = len(next(iter(result["arms"].values())))
    lines = [f"{result['recipe']}: {result['source']}", f"claim: {result['claim']}",
             f"{result['figure']}, mean and standard deviation of {seeds} seed{'s' * (seeds > 1)}:"]  # fmt: skip
    for arm, values in result["arms"].items():
        spread = f" +- {statistics.stdev(values):.2f}" if seeds > 1 else ""
        lines.append(f"  {arm:<28} {statistics.mean(values):7.2f}{spread}")
    lines += [f"  {x['better']} > {x['worse']}: {x['holds']}" for x in result["trend"]]
    return "\n".join(lines)


def command(options) -> int:
    """Reproduce a published system at a small size, for some seeds, and say whether its claim holds there."""
    if others := sorted(set(vars(options)) - FLAGS - {"run"}):
        raise UserError(f"--recipe takes {', '.join(map(flag, sorted(FLAGS - {'recipe'})))}, not {flag(others[0])}")
    seeds = getattr(options, "seeds", 3)
    if seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {seeds}")
    need_extra("sklearn")
    if parallel.size() > 1:
        raise UserError("--recipe runs in one process, without torchrun")
    if threads := getattr(options, "threads", 0):
        torch.set_num_threads(threads)
    recipes.load(options.recipe)  # before anything is written
    out = Path(getattr(options, "out", "") or Path("runs") / options.recipe)
    check_room(out, ROOM)
    result = run(options.recipe, out, getattr(options, "cache", Config().cache), seeds)
    recipelog.write(result, out, seeds)
    print(f"\n{report(result)}\nin {out}", flush=True)
    return 0
