"""`kdkernels distill --recipe NAME`: a published system, a few seeds of it, and whether its claim holds here."""

import contextlib
import functools
import statistics
import tempfile
from pathlib import Path

import torch

from .. import files
from . import parallel, recipelog, recipes, report
from .checkpoint import read_json
from .config import Config, UserError, check, flag
from .distill import check_room, need_extra, set_up
from .lab import Lab, settings

ROOM = 100 << 20  # bytes of a seed, more than any recipe writes to its folder
SHARED = 60 << 20  # and, teachers and text, to the cache
FLAGS = {"accumulate", "cache", "dtype", "out", "recipe", "seeds", "threads"}


def run(name: str, out, cache, seeds: int = 3, show=report.progress, cfg: Config | None = None, log=None) -> dict:
    """-> {"arms": {arm: [figure of each seed]}, "trend": [...]}, in out/results.json too.

    What an earlier call has done is not repeated. cfg: what `Runs` looks at; log: a `recipelog.Log` of the runs.
    """
    recipe, found, cfg = recipes.load(name), [], cfg or Config()
    if (cfg.accumulate > 1 or parallel.size() > 1) and (why := getattr(recipe, "WHOLE", "")):
        raise UserError(f"--recipe {name}: {why}: no --accumulate and no torchrun for it")
    parallel.first(lambda: claim(Path(out) / "config.json", {"recipe": name, **settings(cfg)}))
    torch.use_deterministic_algorithms(True)
    for seed in range(seeds):
        path = Path(out) / f"seed-{seed}" / "figures.json"
        if parallel.total(torch.tensor(float(path.exists()))) < parallel.size():  # all ranks see it, or none
            titled = functools.partial(lambda seed, title, unit: show(f"{name}, seed {seed}: {title}", unit), seed)
            lab = getattr(recipe, "LAB", Lab)(path.parent, cache, seed, titled, cfg=cfg)
            if log:
                lab.log = functools.partial(lambda seed, name, *values: log.add(f"seed-{seed}/{name}", *values), seed)
            figures = recipe.run(lab)
            parallel.first(functools.partial(files.write_json, path, figures))
        found.append(read_json(path))
    arms = {arm: [figures[arm] for figures in found] for arm in found[0]}
    trend = [dict(better=a, worse=b, holds=holds(arms[a], arms[b])) for a, b in recipe.TREND]
    result = {"recipe": name, "source": recipe.SOURCE, "claim": recipes.claim(recipe), "figure": recipe.FIGURE,
              "arms": arms, "trend": trend}  # fmt: skip
    parallel.first(lambda: files.write_json(Path(out) / "results.json", result))
    return result


def check_places(*needs: tuple[Path, int]):
    """UserError, before anything is trained, where a folder has too little room for so many bytes, with what else is on
    the same device, or cannot be written to."""
    for folder, need in needs:
        if need:
            check_room(folder, sum(other for one, other in needs if mount(one) == mount(folder)))
    for folder, _ in needs:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UserError(f"{folder} cannot be written to: {error}") from None


def mount(folder: Path) -> int:
    """The device that a folder is on, or will be."""
    while not folder.exists():
        folder = folder.parent
    return folder.stat().st_dev


def claim(path: Path, record: dict):
    """Writes down what a folder is of, or checks it."""
    if not path.exists():
        files.write_json(path, record)
    elif (found := read_json(path)) != record:
        raise UserError(f"{path.parent} holds a run of {found}, not {record}; take another --out")


def holds(better: list[float], worse: list[float]) -> str:
    """Whether the mean of the differences, seed by seed, is more than two standard errors away from 0: "yes", "no" or
    "within noise". Of one seed, or of one pair of nets counted several times, nothing is known of the noise: "one
    seed"."""
    differences = [a - b for a, b in zip(better, worse, strict=True)]
    if len(set(better)) == len(set(worse)) == 1:
        return "one seed"
    error = statistics.stdev(differences) / len(differences) ** 0.5
    mean = statistics.mean(differences)
    return "within noise" if abs(mean) <= 2 * error else "yes" if mean > 0 else "no"


def table(result: dict) -> str:
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
    recipes.load(options.recipe)  # before anything is written
    cfg = Config(**{name: value for name, value in vars(options).items() if name in FLAGS - {"recipe", "seeds"}})
    cfg.out = cfg.out or str(Path("runs") / options.recipe)
    check(cfg)
    set_up(cfg)
    out = Path(cfg.out)
    undone = sum(not (out / f"seed-{seed}" / "figures.json").exists() for seed in range(seeds))
    check_places((out, undone * ROOM), (Path(cfg.cache), undone * SHARED))
    with contextlib.closing(recipelog.Log(out)) as log:
        result = run(options.recipe, out, cfg.cache, seeds, cfg=cfg, log=log)
        parallel.first(lambda: recipelog.finish(log, result, out, seeds))
    print(f"\n{table(result)}\nin {out}", flush=True)
    return 0
