"""Distilling the trainer's language model with KL alone, and with KL + w (1 - Spearman's rho of the teacher's top k).

    python -m benchmarks.rank_distillation --threads 1              5 seeds, 4 students: 84 minutes on a busy core
    python -m benchmarks.rank_distillation --quick --seeds 2        a small teacher and few steps: 3 minutes
    python -m benchmarks.rank_distillation --json result.json       and what was measured, for a machine to read

Teacher, student, text and batches are those of `kdkernels distill`: a Llama-style teacher trained on Python's standard
library (129,280 tokens; from the cache folder if it is there), students of its first and last layer. All students of a
seed start alike and see the same batches in the same order. Mean and standard deviation are over seeds, which choose
the batches; there is one teacher. On held-out text, as means over its positions: cross-entropy (ce), KL(p||q),
agreement of the most likely tokens, acceptance sum_i min(p_i, q_i), Spearman's rho of the whole rows (rho), and rho and
Kendall's tau-b of the teacher's top 128 classes (rho top, tau top).
"""

import argparse
import dataclasses
import functools
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

import kdkernels as kd
from kdkernels import metrics
from kdkernels.trainer import checkpoint, distill, models, report
from kdkernels.trainer.config import QUICK, Config
from kdkernels.trainer.data import Corpus
from kdkernels.trainer.evaluate import evaluate
from kdkernels.trainer.loop import Learner, Stage

from .harness import commit, machine

TOP, ROWS = 128, 256


def language_model(cfg: Config):
    """-> the corpus and the trained teacher of these settings."""
    cfg.keep_layers = cfg.keep_layers or [0, cfg.layers - 1]
    distill.set_up(cfg)
    with report.progress("tokenise (characters)", "") as bar:
        corpus = Corpus(cfg).load(bar)
    with tempfile.TemporaryDirectory() as folder:
        teacher, _ = distill.trained_teacher(cfg, corpus, checkpoint.Journal(Path(folder) / "metrics.jsonl"))
    return corpus, teacher


def train(cfg: Config, corpus, teacher, losses: dict, title: str) -> dict:
    """-> {name: student} after cfg.steps steps on the same batches."""
    learners = {name: Learner(models.cut_student(cfg, teacher), loss, cfg) for name, loss in losses.items()}
    stage = Stage("student", 1, cfg.batch, cfg.steps, cfg.lr, None, "")
    with report.progress(title, "tok/s") as bar:
        for step in range(cfg.steps):
            inputs, labels = corpus.batch(stage.number, step, stage.batch)
            with torch.no_grad():
                logits = models.logits_of(teacher, inputs, cfg.dtype)
            for one in learners.values():
                one.add(inputs, labels, logits, labels.numel(), 1.0, True)  # the batch in one part
                one.update(stage.rate(step, cfg.warmup))
            bar(step + 1, cfg.steps)
    return {name: one.model for name, one in learners.items()}


@torch.no_grad()
def agreement(students: dict, teacher, inputs, labels) -> dict:
    """{name: figures of `evaluate`, and those of order}."""
    found, kept = evaluate(students, teacher, inputs, labels), int((labels != -100).sum())
    ranks = {name: torch.zeros(3, dtype=torch.float64) for name in students}
    step = max(1, ROWS // inputs.shape[1])
    for first in range(0, len(inputs), step):
        keep = labels[first : first + step].flatten() != -100
        t = models.logits_of(teacher, inputs[first : first + step])[keep]
        head, places = t.topk(min(TOP, t.shape[-1]), -1)
        for name, student in students.items():
            s = models.logits_of(student, inputs[first : first + step])[keep]
            own = s.gather(-1, places)
            ranks[name] += torch.stack([metrics.spearman(s, t).sum(), metrics.spearman(own, head).sum(),
                                        metrics.kendall_tau(own, head).sum()])  # fmt: skip
    names = ("rho", "rho top", "tau top")
    return {name: found[name] | dict(zip(names, (ranks[name] / kept).tolist(), strict=True)) for name in students}


def contenders(weights, top_k) -> dict:
    def of(loss):
        return lambda student, teacher, labels, *_part: loss(student, teacher, labels)

    kl, rank = kd.ForwardKLLoss(), kd.SpearmanLoss(top_k=top_k)

    def both(weight, student, teacher, labels, *_part):
        return kl(student, teacher, labels) + weight * rank(student, teacher, labels)

    return {"KL": of(kl)} | {f"KL + {w:g} Spearman top {top_k}": functools.partial(both, w) for w in weights}


def spread(values: list) -> dict:
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}


def summary(runs: list) -> dict:
    """{name: {figure: mean and sd over seeds, and of its difference to KL alone seed by seed}}."""
    return {name: {figure: spread([run[name][figure] for run in runs])
                   | {"minus KL": spread([run[name][figure] - run["KL"][figure] for run in runs])}
                   for figure in runs[0][name]} for name in runs[0]}  # fmt: skip


def shown(figure: dict) -> str:
    return f"{figure['mean']:.4f}" + ("" if figure["sd"] is None else f" ± {figure['sd']:.4f}")


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rank_distillation", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--seeds", type=int, default=5, help="how many (default: 5)")
    parser.add_argument("--steps", type=int, help="of each student (default: 100)")
    parser.add_argument("--lr", type=float, default=Config.lr, help=f"peak learning rate (default: {Config.lr})")
    parser.add_argument("--weights", type=float, nargs="+", default=[0.1, 0.3, 1.0], help="of the rank term")
    parser.add_argument("--top-k", type=int, default=TOP, help="classes that it compares (default: 128)")
    parser.add_argument("--val-tokens", type=int, default=4096, help="held-out tokens (default: 4096)")
    parser.add_argument("--threads", type=int, default=0, help="torch's threads (default: its own choice)")
    parser.add_argument("--quick", action="store_true", help="the model and steps of `kdkernels distill --quick`")
    parser.add_argument("--json", type=Path, help="write what was measured here")
    options = parser.parse_args(arguments)
    settings = {"steps": 100} | (QUICK if options.quick else {}) | ({"steps": options.steps} if options.steps else {})
    cfg = Config(**settings | {"threads": options.threads, "val_tokens": options.val_tokens, "lr": options.lr})
    started, found = time.perf_counter(), commit()
    corpus, teacher = language_model(cfg)
    held = corpus.held_out(cfg.val_tokens)
    start = agreement({"teacher": teacher, "student at the start": models.cut_student(cfg, teacher)}, teacher, *held)
    runs = []
    for seed in range(options.seeds):
        corpus.cfg = dataclasses.replace(cfg, seed=seed)  # which chooses the batches
        students = train(cfg, corpus, teacher, contenders(options.weights, options.top_k), f"seed {seed}")
        runs.append(agreement(students, teacher, *held))
        table = summary(runs)
        if options.json:
            names = ("hidden", "layers", "keep_layers", "steps", "batch", "seq_len", "lr", "val_tokens")
            options.json.write_text(json.dumps({
                "machine": machine(), "commit": found, "seconds": round(time.perf_counter() - started),
                "settings": {name: getattr(cfg, name) for name in names} | {"top_k": options.top_k},
                "before": start, "summary": table, "seeds": runs,
            }, indent=1) + "\n")  # fmt: skip
    figures = list(runs[0]["KL"])
    lines = [[name, *(f"{row[k]:.4f}" for k in figures)] for name, row in start.items()]
    lines += [[name, *(shown(row[k]) for k in figures)] for name, row in table.items()]
    report.print_table(f"mean ± sd of {options.seeds} seeds; {machine()}", ["student", *figures], lines)
    lines = [[name, *(shown(row[k]["minus KL"]) for k in figures)] for name, row in table.items() if name != "KL"]
    report.print_table("the same minus KL alone, seed by seed", ["student", *figures], lines)


if __name__ == "__main__":
    main()
