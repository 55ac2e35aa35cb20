"""The teacher of a run on disk: the top-k log-probabilities of every batch that its students will see.

    kdkernels cache --top-k 64 --out cache                    # as often as it was killed: it goes on
    kdkernels distill --teacher-cache cache                   # the same data settings, no teacher in the steps

A cache belongs to a teacher and to its batches, which --seed, --seq-len and --batch decide; --steps as many of them.
`--teacher FOLDER` takes a causal language model of Hugging Face's, with its tokenizer, for training code of one's own:
`corpus.batch` of this trainer has its inputs, `kdkernels.cache.Reader` its rows, in the same order.
"""

import dataclasses
from pathlib import Path

import torch

import kdkernels as kd

from ..merged import refusal
from . import checkpoint, models, parallel, report
from .config import TEACHER_FIELDS, UserError, check, require
from .data import Corpus
from .distill import check_room, need_extra, set_up, trained_teacher
from .models import logits_of

STREAM = 1  # of the students' batches
SHARD_BYTES, BYTES = 32 << 20, 6  # BYTES of a token of a position: its number and its log-probability


def batches_of(cfg, corpus):
    """What the cache was made from, in a word."""
    return f"text {corpus.key}, seed {cfg.seed}, {cfg.batch} x {cfg.seq_len}"


def write_cache(cfg, top_k, temperature=1.0, teacher_file=""):
    """Writes the cache in cfg.out, or goes on with it."""
    path = Path(teacher_file)
    if teacher_file and path.is_dir() and not cfg.tokenizer:
        cfg.tokenizer = str(path / "tokenizer.json")
    check(cfg)
    need_extra()
    if parallel.size() > 1:
        raise UserError("`kdkernels cache` runs in one process, without torchrun")
    set_up(cfg)
    with report.progress("tokenise (characters)", "") as bar:
        corpus = Corpus(cfg).load(bar)
    if not 1 <= top_k <= corpus.vocab_size:
        raise UserError(f"--top-k must be between 1 and the {corpus.vocab_size} tokens, got {top_k}")
    out = Path(cfg.out)
    if not out.exists():
        check_room(out, cfg.steps * cfg.batch * cfg.seq_len * BYTES * top_k)
    if teacher_file and path.is_dir():
        teacher, checksum = models.pretrained(path, cfg, corpus.vocab_size)
        name = f"sha256 {checksum}"
    else:
        ours = read_teacher(path, cfg, corpus) if teacher_file else None
        teacher, crc = ours or trained_teacher(cfg, corpus, checkpoint.Journal(out / "metrics.jsonl"))
        name = f"crc32 {crc}"
    try:
        writer = kd.cache.Writer(
            out, vocab_size=corpus.vocab_size, k=top_k, temperature=temperature, log_tail=top_k < corpus.vocab_size,
            teacher=name, data=batches_of(cfg, corpus), shard_rows=max(1, SHARD_BYTES // (BYTES * top_k)),
        )  # fmt: skip
    except ValueError as error:
        raise UserError(str(error)) from None
    with report.progress("cache", "") as bar:
        fill(writer, cfg, corpus, teacher, bar)
    print(f"{len(writer):,} sequences of {cfg.seq_len} tokens, {top_k} of {corpus.vocab_size:,} classes: {out}")


@torch.no_grad()
def fill(writer, cfg, corpus, teacher, bar):
    """The batches of the students, those that are missing."""
    about, total = writer.index["about"], cfg.steps * cfg.batch
    if len(writer) >= total:
        return
    with writer:
        for step in range(len(writer) // cfg.batch, cfg.steps):
            inputs, _ = corpus.batch(STREAM, step, cfg.batch)
            logits = logits_of(teacher, inputs.to(cfg.device), cfg.dtype)
            sparse = kd.SparseTeacher.from_logits(logits, about["k"], about["temperature"],
                                                  vocab_size=about["vocab_size"]).reshape(*inputs.shape)  # fmt: skip
            for i in range(len(writer) - step * cfg.batch, cfg.batch):
                writer.add(sparse[i], inputs[i])
            bar(len(writer), total)


def read_teacher(path, cfg, corpus):
    """-> a teacher that `distill` or `cache` has trained, in evaluation mode, and its checksum."""
    if not path.is_file():
        raise UserError(f"--teacher {path}: no such file; it is a teacher-*.safetensors of the cache folder, or a "
                        "folder with a language model of Hugging Face's")  # fmt: skip
    tensors, header = checkpoint.load_tensors(path)
    saved = header.get("teacher")
    if not isinstance(saved, dict) or set(saved) != {*TEACHER_FIELDS, "text"}:
        raise UserError(f"--teacher {path}: not a teacher of this version of kdkernels")
    if saved["text"] != corpus.key:
        raise UserError(f"--teacher {path}: trained on other text, or with another tokenizer")
    settings = {name: saved[name] for name in TEACHER_FIELDS if name not in ("device", "seed", "seq_len", "dtype")}
    teacher = models.build(dataclasses.replace(cfg, **settings), corpus.vocab_size, settings["layers"])
    models.fill(teacher, tensors)
    return teacher.eval().requires_grad_(False), header["crc32"]


class CachedTeacher:
    """f(step, row, inputs) -> the teacher of the rows from `row` on of a step's batch, from the cache of a run."""

    def __init__(self, cfg, corpus, crc, loss):
        self.cfg = cfg
        tail = cfg.tail or ("spread" if refusal(loss) else "bucket")
        try:
            self.reader = kd.cache.Reader(cfg.teacher_cache, vocab_size=corpus.vocab_size, teacher=f"crc32 {crc}",
                                          data=batches_of(cfg, corpus), tail=tail)  # fmt: skip
        except ValueError as error:
            raise UserError(f"--teacher-cache: {error}") from None
        if not self.reader.about["log_tail"]:
            self.reader.tail = tail = None
        print(f"teacher's cache: {cfg.teacher_cache}, {self.reader.about['k']} tokens a position, tail={tail!r}")
        need = cfg.steps * cfg.batch
        require(len(self.reader) >= need, "teacher_cache", cfg, f"a cache of {need} sequences or more")

    def check(self, loss, corpus):
        """Raises UserError for a loss that takes no such teacher, before the first step."""
        if not self.cfg.steps:
            return
        inputs, labels = (x.to(self.cfg.device) for x in corpus.batch(STREAM, 0, self.cfg.batch))
        try:
            student = torch.zeros(1, corpus.vocab_size, device=self.cfg.device)
            loss(student, self(0, 0, inputs)[:1], labels.flatten()[:1])
        except ValueError as error:
            raise UserError(f"--teacher-cache {self.cfg.teacher_cache}: {error}") from None

    def __call__(self, step, row, inputs):
        first = step * self.cfg.batch + row
        try:
            found = self.reader.examples(range(first, first + len(inputs)), inputs)
        except kd.cache.CacheError as error:
            raise UserError(f"--teacher-cache: {error}") from None
        return found.reshape(inputs.numel()).to(self.cfg.device)
