"""The whole job, top to bottom: text, teacher, two students on the same batches, the table.

    kdkernels distill                                    # WTTM on Python's standard library
    kdkernels distill --quick --loss renyi --alpha 0.7   # smaller, another loss
    kdkernels distill --resume runs/wttm-20250101-120000 # after a kill: the same result to the last bit

A run folder holds config.json, metrics.jsonl, checkpoint.safetensors (both students and their optimizers), and at the
end ce.safetensors, distilled.safetensors, results.json, curves.png. Text and teachers lie in the cache folder.
"""

import ctypes
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import platform
import resource
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import kdkernels as kd

from .. import files
from . import checkpoint, models, report
from .config import PLACES, TEACHER_FIELDS, Config, UserError, check, flag
from .data import Corpus
from .evaluate import evaluate
from .loop import Learner, Stage, fit
from .losses import call, label, make_loss, resolve

FORMAT = "kdkernels-run-1"


def distill(cfg, resume=False):
    """Run the job of `cfg`; with `resume`, go on in cfg.out. -> the table {model: {ce, kl, agreement, acceptance}}."""
    started = time.perf_counter()
    cfg.keep_layers = cfg.keep_layers or sorted({0, cfg.layers - 1})
    check(cfg)
    cfg.loss_options = resolve(cfg.loss, cfg.loss_options)
    loss = make_loss(cfg.loss, cfg.loss_options)
    need_extra()
    set_up(cfg)

    with report.progress("tokenise (characters)", "") as bar:
        corpus = Corpus(cfg).load(bar)
    out = Path(cfg.out)
    owner = claim(out, cfg, corpus, resume)
    print(f"{'resuming' if resume else 'run folder'}: {out}", flush=True)
    if (out / "results.json").exists():
        table = checkpoint.read_json(out / "results.json")["table"]
        report.print_results(table, out)
        return table
    journal = checkpoint.Journal(out / "metrics.jsonl")

    teacher, teacher_crc = trained_teacher(cfg, corpus, journal)
    ce, distilled = models.cut_student(cfg, teacher), models.cut_student(cfg, teacher)
    learners = {"ce": Learner(ce, cross_entropy, cfg), "distilled": Learner(distilled, in_order(loss), cfg)}
    students = {name: learner.model for name, learner in learners.items()}
    print(
        f"teacher: {models.count(teacher):,} parameters, {cfg.layers} layers; students: {models.count(ce):,}, "
        f"layers {cfg.keep_layers} of the teacher; {corpus.vocab_size:,} tokens; {call(loss, cfg.loss_options)}",
        flush=True,
    )
    teach = teaching(cfg, corpus, teacher, teacher_crc, loss)
    points = corpus.held_out(cfg.curve_tokens)
    owner = f"{owner} with teacher {teacher_crc}"
    stage = Stage("student", 1, cfg.batch, cfg.steps, cfg.lr, out / "checkpoint.safetensors", owner)
    with report.progress("students", "tok/s") as bar:
        fit(stage, learners, corpus, cfg, journal, bar, teach, lambda: evaluate(students, teacher, *points))

    start = models.cut_student(cfg, teacher)
    name = f"distilled: {label(loss, cfg.loss_options)}"
    compared = {"teacher": teacher, "student at the start": start, "cross-entropy only": ce, name: distilled}
    table = evaluate(compared, teacher, *corpus.held_out(cfg.val_tokens))

    export(out, students)
    with files.replacing(out / "curves.png") as temporary:
        names = {"ce": "cross-entropy only", "distilled": name}
        teacher_ce = evaluate({"teacher": teacher}, teacher, *points)["teacher"]["ce"]
        report.draw_curves(journal.records(), temporary, names, teacher_ce)
    took = {"seconds": round(time.perf_counter() - started, 1), "peak_rss_mb": peak_rss_mb()}
    files.write_json(out / "results.json", {"table": table, **took, "environment": environment()})
    report.print_results(table, out)
    print(f"took {took['seconds']:.0f} s, at most {took['peak_rss_mb']} MB of memory", flush=True)
    return table


def teaching(cfg, corpus, teacher, crc, loss):
    """-> f(step, inputs): the teacher's logits of a step, or what its cache has of them."""
    if not cfg.teacher_cache:
        return lambda step, inputs: models.logits_of(teacher, inputs, cfg.dtype)
    from .caching import CachedTeacher

    cached = CachedTeacher(cfg, corpus, crc, loss)
    cached.check(loss, corpus)
    return cached


def export(out, students):
    """The students' weights under transformers' names, the model's configuration in the header."""
    for name, model in students.items():
        configuration = model.config.to_diff_dict()
        checkpoint.save_tensors(out / f"{name}.safetensors", models.weights_of(model), model=configuration)


def trained_teacher(cfg, corpus, journal):
    """-> the teacher in evaluation mode and its checksum: from the cache, or trained (and resumed) there."""
    wanted = {name: getattr(cfg, name) for name in TEACHER_FIELDS} | {"text": corpus.key}
    key = fingerprint(wanted)
    path = Path(cfg.cache) / f"teacher-{key}.safetensors"
    partial = Path(cfg.cache) / f"teacher-{key}.partial.safetensors"
    teacher = models.build(cfg, corpus.vocab_size, cfg.layers)
    if not path.exists():
        learners = {"teacher": Learner(teacher, cross_entropy, cfg)}
        stage = Stage("teacher", 0, cfg.teacher_batch, cfg.teacher_steps, cfg.teacher_lr, partial, key)
        with report.progress("teacher", "tok/s") as bar:
            fit(stage, learners, corpus, cfg, journal, bar)
        checkpoint.save_tensors(path, models.weights_of(teacher), teacher=wanted)
    partial.unlink(missing_ok=True)  # also what a run killed between these two lines left
    tensors, header = checkpoint.load_tensors(path)
    models.fill(teacher, tensors)
    return teacher.eval().requires_grad_(False), header["crc32"]


def cross_entropy(student_logits, teacher_logits, labels):
    return F.cross_entropy(student_logits.float(), labels, ignore_index=-100)


def in_order(loss):
    """The loss as f(student, teacher, labels). A loss that knows no teacher is not given one."""
    if not getattr(loss, "needs_teacher", True):
        return lambda student, teacher, labels: loss(student, labels=labels)
    return loss


def claim(out, cfg, corpus, resume):
    """Write config.json, or check it on a resume; -> what this run's checkpoints must be marked with."""
    settings = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in PLACES}
    record = {"format": FORMAT, "text": corpus.key, "settings": settings}
    path = out / "config.json"
    if resume:
        if checkpoint.read_json(path).get("text") != corpus.key:
            raise UserError(f"the text or tokenizer is not what {out} was started with; start a new run")
    elif path.exists():
        raise UserError(f"{out} already holds a run: give --resume {out} to go on, or another --out")
    else:
        files.write_json(path, {**record, "cache": cfg.cache, "environment": environment()})
    files.sweep(out)
    files.sweep(cfg.cache)
    return f"run {fingerprint(record)}"


def read_run(folder, changes):
    """-> the Config of a run folder. `changes` are flags given beside --resume: only places may differ."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--resume {folder}: no such folder")
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"--resume {folder}: not a run folder, or killed before it began (no config.json)")
    saved = checkpoint.read_json(path)
    known = {f.name for f in dataclasses.fields(Config)} - PLACES
    if not isinstance(saved, dict) or saved.get("format") != FORMAT or set(saved["settings"]) != known:
        raise UserError(f"{path} was not written by this version of kdkernels")
    settings = saved["settings"]
    if "loss_options" in changes:
        name = changes.get("loss", settings["loss"])
        changes = {**changes, "loss_options": resolve(name, changes["loss_options"])}
    for name, value in changes.items():
        if name not in PLACES and settings[name] != value:
            raise UserError(f"{flag(name)} {value} contradicts the run in {folder}, which has {settings[name]}")
    then, now = saved["environment"], environment()
    if then != now:
        differing = ", ".join(f"{k}: {then.get(k)} then, {v} now" for k, v in now.items() if then.get(k) != v)
        print(f"warning: the result may differ in its last bits ({differing})", file=sys.stderr)
    return Config(**settings, out=str(folder), cache=changes.get("cache", saved["cache"]))


def set_up(cfg):
    """Threads, determinism, memory. Resolves cfg.threads, so that a resumed run computes with as many."""
    cfg.threads = cfg.threads or torch.get_num_threads()
    torch.set_num_threads(cfg.threads)
    if cfg.device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise UserError(f"--device {cfg.device}: torch {torch.__version__} sees no GPU")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    keep_heap()


def keep_heap():
    """Let glibc keep freed memory: logits take hundreds of MB a step, and faulting their pages in anew each time
    doubles the time of a step (0.48 -> 0.23 s for 512 tokens of 129,280 on two Zen 5 cores)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)  # never
        mallopt(m_top_pad, 2**26)


def need_extra():
    missing = [n for n in ("transformers", "tokenizers", "safetensors", "rich", "matplotlib") if not find(n)]
    if missing:
        raise UserError(f"missing: {', '.join(missing)}. The trainer needs: pip install 'kdkernels[train]'")


find = functools.cache(importlib.util.find_spec)


def environment():
    return {
        "kdkernels": getattr(kd, "__version__", ""),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "backend": os.environ.get("KDKERNELS_BACKEND", ""),
    }


def fingerprint(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def peak_rss_mb():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1 << 20) if sys.platform == "darwin" else peak // 1024
