"""Every published system at its small size: what was measured, what its paper claims, and whether that holds here.

    python -m benchmarks.validation                       # all of them, 3 seeds, two processes of a thread each
    python -m benchmarks.validation --recipe kd ttm       # some; the rest of the report stays
    python -m benchmarks.validation --full                # 5 seeds, and 129,280 tokens: hours

Writes validation.json, .md and .png, and validation-curves.json and .png (five losses and their textbook formulas), to
benchmarks/results. What an earlier call has finished is not repeated: delete runs/validation for that. The first seed
says how long a recipe takes; then those that take longest lose seeds until the others fit into --minutes. Teachers are
trained once, and students that several recipes compare with (the same name, settings and first loss), too.
"""

import argparse
import collections
import functools
import json
import math
import multiprocessing
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

from kdkernels import files
from kdkernels.trainer import recipes, report, reproduce
from kdkernels.trainer.config import Config, UserError, flag
from kdkernels.trainer.lab import Lab

from . import curves
from .harness import about
from .sharing import sharing

ROOT = Path(__file__).resolve().parents[1]
COLOURS = {"yes": "tab:green", "no": "tab:red", "within noise": "tab:gray", "one seed": "tab:olive"}
ROOM = 12 << 20  # bytes of a seed, the mean of all recipes and more
FULL = ("wttm", "forwardkl", "reversekl", "jsd")  # with the demo's vocabulary


def defining(name):
    """The class of the labs that has it."""
    return next(one for one in Lab.__mro__ if name in vars(one))


def prepare():
    """A process reads its data once."""
    torch.set_num_threads(1)
    init, data = defining("__init__").__init__, {}

    def shared(self, *given, **options):
        init(self, *given, **options)
        self._data = data

    defining("__init__").__init__ = shared


def work(task, out, cache, share):
    """One seed of a recipe, after those before it; -> name, seed, an error or None."""
    name, seed = task
    spent, folder = dict(teachers=0.0), out / name
    labs, train = defining("train"), Lab.train
    path = folder / f"seconds-{seed}.json"
    before = json.loads(path.read_text()) if path.exists() else dict(own=0.0, teachers=0.0)
    labs.train, start = sharing(train, out / "common", spent, share), time.process_time()
    try:
        reproduce.run(name, folder, cache, seed + 1, report.silent)
    except Exception as error:  # the others go on, and the table says it
        return name, seed, f"{type(error).__name__}: {error}"
    finally:
        labs.train = train
        own = time.process_time() - start - spent["teachers"]
        files.write_json(path, dict(own=before["own"] + own, teachers=before["teachers"] + spent["teachers"]))
    return name, seed, None


def seconds(out, name, seed):
    path = out / name / f"seconds-{seed}.json"
    return json.loads(path.read_text()) if path.exists() else None


def fitting(times, seeds, budget):
    """{name: seeds}: those of the slowest are taken away one by one until the sum fits, but for the first."""
    found = dict.fromkeys(times, seeds)
    while sum(times[name] * n for name, n in found.items()) > budget:
        longest = max(found, key=lambda name: (found[name] > 1, times[name] * found[name]))
        if found[longest] == 1:
            break
        found[longest] -= 1
    return found


def processes(jobs):
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), prepare)


def run_all(names, options):
    """-> {name: error} of what failed. Seed by seed, each for all recipes, so that one that is stopped has all."""
    failed, seeds = {}, dict.fromkeys(names, options.seeds)
    one = functools.partial(work, out=options.out, cache=options.cache, share=options.share)
    with processes(options.jobs) as pool:
        for seed in range(options.seeds):
            tasks = [(name, seed) for name in names if seed < seeds[name] and name not in failed]
            tasks = [t for t in tasks if not (options.out / t[0] / f"seed-{seed}" / "figures.json").exists()]
            for done in as_completed([pool.submit(one, task) for task in tasks]):
                name, _, error = done.result()
                took = seconds(options.out, name, seed)
                print(f"{name}, seed {seed}: {error or ''} {took['own']:.0f} s, teachers {took['teachers']:.0f} s",
                      flush=True)  # fmt: skip
                if error:
                    failed[name] = error
            if seed == 0:
                times = {n: (seconds(options.out, n, 0) or {"own": 0.0})["own"] for n in names}
                seeds = fitting(times, options.seeds, 60 * options.minutes * options.jobs)
    return failed


def collected(names, options, failed):
    """One record a recipe, of all seeds that are there."""
    found = []
    for name in names:
        done = sum((options.out / name / f"seed-{seed}" / "figures.json").exists() for seed in range(options.seeds))
        if name in failed or not done:
            found.append({"recipe": name, "failed": failed.get(name, "not run")})
            continue
        result = reproduce.run(name, options.out / name, options.cache, done, report.silent)
        took = [seconds(options.out, name, seed) for seed in range(done)]
        found.append(result | {key: [t and t[key] for t in took] for key in ("own", "teachers")})
    return found


def few(name, share):
    return math.ceil(share * getattr(Config(), name))


def large(options):
    """The trainer's two students with 129,280 tokens, `kdkernels distill`, as a record like a recipe's."""
    arms: dict[str, list[float]] = {}
    for seed in range(options.seeds):
        for loss in FULL:
            out = options.out / f"full-{loss}-{seed}"
            new = ["--loss", loss, "--seed", seed, "--cache", options.cache, "--out", out]
            if options.share < 1:
                new += [x for name in ("steps", "teacher_steps") for x in (flag(name), few(name, options.share))]
            given = ["--resume", out] if (out / "config.json").exists() else new
            command = [sys.executable, "-m", "kdkernels", "distill", *map(str, given)]
            subprocess.run(command, check=True)
            table = json.loads((out / "results.json").read_text())["table"]
            arms.setdefault(loss, []).append(100 * list(table.values())[-1]["acceptance"])
            if loss == FULL[0]:
                arms.setdefault("cross-entropy", []).append(100 * table["cross-entropy only"]["acceptance"])
    trend = [dict(better=loss, worse="cross-entropy", holds=reproduce.holds(arms[loss], arms["cross-entropy"]))
             for loss in FULL]  # fmt: skip
    return {"recipe": "129,280 tokens", "source": "kdkernels distill", "arms": arms, "trend": trend,
            "claim": "A distilled student is nearer to its teacher than one of the text alone.",
            "figure": "acceptance 1 - TVD on held-out text, %"}  # fmt: skip


def spread(values):
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def table(record):
    """Markdown: a line for each thing that a claim says of two arms."""
    about = f"on {record['machine']}, {record['processes']} processes, {commits(record['recipes'])}"
    lines = ["# Validation", "", f"`python -m benchmarks.validation` {about}. Mean ± standard deviation; a trend holds "
             "(yes, no) where the mean difference, seed by seed, is more than two standard errors from 0. Each seed "
             "has a student and a teacher of its own, so that ± is of both (but all have the same ensemble in "
             "`bayesian_teacher`).", "",
             "| recipe | claim | figure | seeds | here | holds |", "|" + "---|" * 6]  # fmt: skip
    for one in record["recipes"]:
        if "failed" in one:
            lines.append(f"| {one['recipe']} | | | | {one['failed']} | |")
        first = True
        for trend in one.get("trend", []):
            better, worse = (one["arms"][trend[side]] for side in ("better", "worse"))
            about = [one["recipe"], f"{one['claim']} ({one['source']})", one["figure"], str(len(better))]
            here = f"{trend['better']} {spread(better)} > {trend['worse']} {spread(worse)}"
            lines.append(f"| {' | '.join(about if first else [''] * 4)} | {here} | {trend['holds']} |")
            first = False
    total = {k: sum(x or 0 for one in record["recipes"] for x in one.get(k, [])) / 60 for k in ("own", "teachers")}
    held = collections.Counter(trend["holds"] for one in record["recipes"] for trend in one.get("trend", []))
    took = f"{held.total()} trends: " + ", ".join(f"{held[holds]} {holds}" for holds in COLOURS if held[holds])
    took += f". {total['own']:.1f} minutes of one core, and {total['teachers']:.1f} for the teachers."
    return "\n".join([*lines, "", took]) + "\n"


def draw(record, path):
    """The differences with two standard errors, a line each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [(one, trend) for one in record["recipes"] for trend in one.get("trend", [])][::-1]
    figure, axis = pyplot.subplots(figsize=(10, 1.5 + 0.28 * len(shown)))
    for place, (one, trend) in enumerate(shown):
        pairs = zip(one["arms"][trend["better"]], one["arms"][trend["worse"]], strict=True)
        apart = [a - b for a, b in pairs]
        error = 2 * statistics.stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else 0
        axis.errorbar(statistics.mean(apart), place, xerr=error, fmt="o", color=COLOURS[trend["holds"]], capsize=3)
    names = [f"{one['recipe']}: {t['better']} > {t['worse']}" for one, t in shown]
    axis.set_yticks(range(len(shown)), names, fontsize=8)
    axis.set_ylim(-0.6, len(shown) - 0.4)
    axis.axvline(0, color="black", lw=0.8)
    axis.set_xscale("symlog", linthresh=1)
    axis.set_xlabel("difference in points, ± 2 standard errors (right: as claimed)")
    for holds, colour in COLOURS.items():
        axis.plot([], [], "o", color=colour, label=holds)
    figure.legend(loc="lower center", ncols=4, fontsize=8)
    figure.tight_layout(rect=(0, 0.4 / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)


def merged(path, same, rows):
    """These rows, and those of other recipes that the file has of the same machine, processes and share."""
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    old = record["recipes"] if same.items() <= record.items() else []
    every = {one["recipe"]: {"commit": record.get("commit")} | one for one in old} | {r["recipe"]: r for r in rows}
    return [every[name] for name in sorted(every, key=lambda name: (name not in recipes.names(), name))]


def commits(rows):
    """'commit a', or 'commit a (kd, ttm), commit b (wttm)'."""
    of: dict[str, list[str]] = {}
    for one in rows:
        of.setdefault(one["commit"], []).append(one["recipe"])
    return ", ".join(f"commit {one}" + f" ({', '.join(names)})" * (len(of) > 1) for one, names in of.items())


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.validation", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--recipe", nargs="+", metavar="NAME", help="those alone (see `kdkernels recipes`); the "
                        "rest of the report stays")  # fmt: skip
    parser.add_argument("--seeds", type=int, help="of each recipe (default: 3; 5 with --full)")
    parser.add_argument("--full", action="store_true", help="more seeds, and 129,280 tokens: hours")
    parser.add_argument("--minutes", type=float, help="for the recipes alone (default: 20; no end with --full)")
    parser.add_argument("--jobs", type=int, default=2, help="processes, a thread each (default: 2)")
    parser.add_argument("--out", type=Path, default=Path("runs/validation"), help="folder of the runs")
    parser.add_argument("--cache", type=Path, default=Path(Config().cache), help="folder of the teachers")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="where the report goes")
    parser.add_argument("--share", type=float, default=1.0, help="of all steps, to try it")
    parser.add_argument("--no-curves", action="store_true", help="without the five losses beside their formulas")
    options = parser.parse_args(arguments)
    options.seeds = options.seeds or (5 if options.full else 3)
    options.minutes = options.minutes or (1e9 if options.full else 20.0)
    names = options.recipe or recipes.names()
    tasks = options.seeds * len(names)
    try:
        for name in names:
            recipes.load(name)
        reproduce.check_places((options.out, tasks * ROOM), (options.cache, options.seeds * reproduce.SHARED),
                               (options.results, ROOM))  # fmt: skip
    except UserError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    now = about()  # what is run, whatever is checked out by the time it ends
    failed = run_all(names, options)
    found = collected(names, options, failed) + ([large(options)] if options.full else [])
    same = {"machine": now["machine"], "processes": options.jobs, "share": options.share}
    rows, path = [one | {"commit": now["commit"]} for one in found], options.results / "validation.json"
    record = now | same | {"recipes": merged(path, same, rows) if options.recipe else rows}
    files.write_json(path, record)
    (options.results / "validation.md").write_text(text := table(record), encoding="utf-8")
    draw(record, options.results / "validation.png")
    print(text)
    if not options.no_curves:
        curves.write(options.out / "curves", options.cache, options.results, about(), options.share)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
