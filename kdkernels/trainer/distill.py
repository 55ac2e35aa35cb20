"""The whole job, top to bottom: text, teacher, two students on the same batches, the table.

    kdkernels distill                                    # WTTM on Python's standard library
    kdkernels distill --quick --loss renyi --alpha 0.7   # smaller, another loss
    kdkernels distill --resume runs/wttm-20250101-120000 # after a kill: the same result to the last bit

A run folder holds config.json, metrics.jsonl and the same for TensorBoard, checkpoint.safetensors (both students and
their optimizers), and at the end ce.safetensors, distilled.safetensors, results.json, curves.png. Text and teachers lie
in the cache folder. Under torchrun see parallel.py.
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
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import kdkernels as kd

from .. import files
from . import checkpoint, models, parallel, report
from .config import PLACES, TEACHER_FIELDS, Config, UserError, check, flag
from .data import Corpus
from .evaluate import evaluate
from .loop import Learner, Stage, fit
from .losses import call, label, make_loss, resolve

FORMAT = "kdkernels-run-1"
STATE = 12  # bytes of a parameter in a checkpoint: weight and two moments


def distill(cfg, resume=False):
    """Run the job of `cfg`; with `resume`, go on in cfg.out. -> the table {model: {ce, kl, agreement, acceptance}}."""
    started = time.perf_counter()
    check(cfg)
    cfg.loss_options = resolve(cfg.loss, cfg.loss_options)
    loss = make_loss(cfg.loss, cfg.loss_options)
    check_parts(loss, cfg)
    need_extra()
    set_up(cfg)

    with report.progress("tokenise (characters)", "") as bar:
        corpus = Corpus(cfg)
        if not parallel.first(lambda: corpus.load(bar)):
            corpus.load(bar)  # what the first rank has tokenised
    out = Path(cfg.out)
    record = record_of(cfg, corpus)
    parallel.first(lambda: claim(out, cfg, record, resume))
    print(f"{'resuming' if resume else 'run folder'}: {out}", flush=True)
    if (out / "results.json").exists():
        table = checkpoint.read_json(out / "results.json")["table"]
        report.print_results(table, out)
        return table
    check_room(out, 4 * STATE * models.size(cfg, corpus.vocab_size, len(cfg.keep_layers)))
    journal = checkpoint.Journal(out / "metrics.jsonl") if parallel.rank() == 0 else checkpoint.Unwritten()

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
    owner = f"run {fingerprint(record)} with teacher {teacher_crc}"
    stage = Stage("student", 1, cfg.batch, cfg.steps, cfg.lr, out / "checkpoint.safetensors", owner)
    with report.progress("students", "tok/s") as bar:
        fit(stage, learners, corpus, cfg, journal, bar, teach, lambda: evaluate(students, teacher, *points))

    start = models.cut_student(cfg, teacher)
    name = f"distilled: {label(loss, cfg.loss_options)}"
    compared = {"teacher": teacher, "student at the start": start, "cross-entropy only": ce, name: distilled}
    table = evaluate(compared, teacher, *corpus.held_out(cfg.val_tokens))

    weights = {name: {k: parallel.whole(v) for k, v in models.weights_of(x).items()} for name, x in students.items()}
    teacher_ce = evaluate({"teacher": teacher}, teacher, *points)["teacher"]["ce"]
    took = {"seconds": round(time.perf_counter() - started, 1), "peak_rss_mb": peak_rss_mb()}

    def finish():
        for one, model in students.items():  # under transformers' names, the model's configuration in the header
            checkpoint.save_tensors(out / f"{one}.safetensors", weights[one], model=model.config.to_diff_dict())
        with files.replacing(out / "curves.png") as temporary:
            names = {"ce": "cross-entropy only", "distilled": name}
            report.draw_curves(journal.records(), temporary, names, teacher_ce)
        files.write_json(out / "results.json", {"table": table, **took, "environment": environment()})

    parallel.first(finish)
    journal.close()
    report.print_results(table, out)
    print(f"took {took['seconds']:.0f} s, at most {took['peak_rss_mb']} MB of memory", flush=True)
    return table


def teaching(cfg, corpus, teacher, crc, loss):
    """-> f(step, row, inputs): the teacher's logits of a step's rows from `row` on, or what its cache has of them."""
    if not cfg.teacher_cache:
        return lambda step, row, inputs: models.logits_of(teacher, inputs, cfg.dtype)
    from .caching import CachedTeacher

    cached = CachedTeacher(cfg, corpus, crc, loss)
    cached.check(loss, corpus)
    return cached


def teacher_of(cfg, corpus):
    """What decides the weights of the teacher."""
    return {name: getattr(cfg, name) for name in TEACHER_FIELDS} | {"text": corpus.key}


def teacher_file(cfg, corpus):
    return Path(cfg.cache) / f"teacher-{fingerprint(teacher_of(cfg, corpus))}.safetensors"


def trained_teacher(cfg, corpus, journal):
    """-> the teacher in evaluation mode and its checksum: from the cache, or trained (and resumed) there."""
    wanted, path = teacher_of(cfg, corpus), teacher_file(cfg, corpus)
    key, partial = fingerprint(wanted), path.with_suffix(".partial.safetensors")
    if not path.exists():
        check_room(Path(cfg.cache), 2 * STATE * models.size(cfg, corpus.vocab_size, cfg.layers))
        trained = models.build(cfg, corpus.vocab_size, cfg.layers)
        learners = {"teacher": Learner(trained, cross_entropy, cfg)}
        stage = Stage("teacher", 0, cfg.teacher_batch, cfg.teacher_steps, cfg.teacher_lr, partial, key)
        with report.progress("teacher", "tok/s") as bar:
            fit(stage, learners, corpus, cfg, journal, bar)
        weights = {k: parallel.whole(v) for k, v in models.weights_of(trained).items()}
        parallel.first(lambda: checkpoint.save_tensors(path, weights, teacher=wanted))
    partial.unlink(missing_ok=True)  # also what a run killed between these two lines left
    teacher = models.build(cfg, corpus.vocab_size, cfg.layers)
    tensors, header = checkpoint.load_tensors(path)
    models.fill(teacher, tensors)
    return teacher.eval().requires_grad_(False), header["crc32"]


def cross_entropy(student_logits, teacher_logits, labels, items, share):
    return F.cross_entropy(student_logits.float(), labels, ignore_index=-100, reduction="sum") / items


def in_order(loss):
    """The loss as that of a `Learner`. A loss that knows no teacher is not given one."""
    teaches = getattr(loss, "needs_teacher", True)

    def part(student, teacher, labels, items, share):
        given = (student, teacher) if teaches else (student,)
        if loss.reduction == "mean":
            return loss(*given, labels=labels, num_items=items)
        return loss(*given, labels=labels) * (share if loss.reduction == "batchmean" else 1)

    return part


def check_parts(loss, cfg):
    if (cfg.accumulate > 1 or parallel.size() > 1) and not loss.rowwise:
        raise UserError(f"{type(loss).__name__} compares the rows of a batch: no --accumulate and no torchrun for it")
    smallest = min(cfg.batch, cfg.teacher_batch)
    if parallel.size() > smallest:
        raise UserError(f"{parallel.size()} ranks need a --batch and --teacher-batch as large, got {smallest}")


def check_room(folder, need):
    """UserError for a disk that the checkpoints of a stage, `need` bytes of them, do not fit on."""
    while not folder.exists():
        folder = folder.parent
    if (free := shutil.disk_usage(folder).free) < need:
        raise UserError(f"too little room in {folder}: {free >> 20} MB free, {(need >> 20) + 1} MB needed")


def record_of(cfg, corpus):
    """What decides the result of a run: its settings and its text."""
    settings = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in PLACES}
    return {"format": FORMAT, "text": corpus.key, "settings": settings}


def claim(out, cfg, record, resume):
    """Write config.json, or check it on a resume."""
    path = out / "config.json"
    if resume:
        if checkpoint.read_json(path).get("text") != record["text"]:
            raise UserError(f"the text or tokenizer is not what {out} was started with; start a new run")
    elif path.exists():
        raise UserError(f"{out} already holds a run: give --resume {out} to go on, or another --out")
    else:
        files.write_json(path, {**record, "cache": cfg.cache, "environment": environment()})
    files.sweep(out)
    files.sweep(cfg.cache)


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
    parallel.start(cfg)
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


def need_extra(*more):
    names = ("transformers", "tokenizers", "safetensors", "rich", "matplotlib", *more)
    missing = [n for n in names if not find(n)]
    if missing:
        raise UserError(f"missing: {', '.join(missing)}. The trainer needs, in a clone: pip install '.[train]'")


find = functools.cache(importlib.util.find_spec)


def environment():
    return {
        "kdkernels": getattr(kd, "__version__", ""),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "ranks": parallel.size(),
        "backend": os.environ.get("KDKERNELS_BACKEND", ""),
    }


def fingerprint(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def peak_rss_mb():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1 << 20) if sys.platform == "darwin" else peak // 1024
