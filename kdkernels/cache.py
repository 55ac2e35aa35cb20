"""Teachers on disk: the top-k log-probabilities of every row, written once and read by many runs.

    with kdkernels.cache.Writer("cache", vocab_size=V, k=64, teacher="big-7b", data="corpus-3") as writer:
        for tokens in examples[len(writer):]:                     # goes on where a killed run was
            writer.add(SparseTeacher.from_logits(teacher(tokens), 64), tokens)

    reader = kdkernels.cache.Reader("cache", teacher="big-7b", data="corpus-3")
    loss(student(tokens), reader.example(i, tokens), labels)

A cache is a folder: index.json and shards, safetensors files of some thousand rows each, which are mapped into memory
and read where a row is wanted. Of E examples, R rows in all, a shard has

    indices (R, k) uint16 below 65536 classes, else int32; the largest uint16, or -1: no class
    log_probs (R, k) float16 or bfloat16,  log_tail (R,) float32 if there is one
    ends (E,) int64: the row behind an example's last,  tokens (E,) int64: fingerprints of the examples' tokens

A shard takes its place when it is whole and on disk, the index after it: a kill at any moment loses the rows since the
last shard and nothing else. The index has a checksum, and one of each shard, which is verified when the shard is first
opened. Nothing is unpickled.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cacheindex import FORMAT, CacheError, expect, fingerprint, mark_of, read_index, sha256, write_index
from .files import replacing, sweep
from .options import check_count, check_number
from .sparse import SparseTeacher

NO_CLASS = 65535  # in uint16
VALUES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class Writer:
    """Writes a cache, or goes on with one; see the module.

    Args:
        folder: made if it is not there.
        vocab_size: classes of the teacher, those that may be among the k.
        k: classes of a row.
        temperature: of the log-probabilities, and of the tail.
        log_tail: whether rows have a tail.
        teacher, data: names, or hashes, of what the cache was made from; a reader may ask for them.
        dtype: of the log-probabilities: torch.float16 or torch.bfloat16.
        shard_rows: rows of a shard, to which whole examples are rounded up.

    Raises:
        CacheError: a ValueError: the folder has a cache of other settings, or a damaged index.
    """

    def __init__(self, folder: str | PathLike, *, vocab_size: int, k: int, temperature: float = 1.0,
                 log_tail: bool = True, teacher: str = "", data: str = "", dtype: torch.dtype = torch.float16,
                 shard_rows: int = 1 << 16) -> None:  # fmt: skip
        names = {v: n for n, v in VALUES.items()}
        if dtype not in names:
            raise ValueError(f"dtype must be torch.float16 or torch.bfloat16, got {dtype}")
        for name, count in (("vocab_size", vocab_size), ("shard_rows", shard_rows)):
            check_count(name, count)
        check_count("k", k, most=vocab_size)
        check_number("temperature", temperature, above=0)
        self.folder, self.shard_rows = Path(folder), shard_rows
        kinds = dict(log_probs=names[dtype], indices="uint16" if vocab_size <= NO_CLASS else "int32")
        about = dict(vocab_size=vocab_size, k=k, temperature=float(temperature), log_tail=log_tail, teacher=teacher,
                     data=data, **kinds)  # fmt: skip
        self.index: dict[str, Any] = {"format": FORMAT, "about": about, "complete": False, "shards": []}
        if (self.folder / "index.json").exists():
            self.index = read_index(self.folder)
            expect(self.folder, self.index["about"], about)
        self.folder.mkdir(parents=True, exist_ok=True)
        sweep(self.folder)
        self._pending: list[tuple[SparseTeacher, int]] = []
        self._rows = 0

    def __len__(self) -> int:
        """Examples so far, those of an earlier run too."""
        return sum(shard["examples"] for shard in self.index["shards"]) + len(self._pending)

    def add(self, teacher: SparseTeacher, tokens: Tensor) -> None:
        """One example: the rows (R, k) of its positions, and the tokens by which it will be known."""
        about = self.index["about"]
        if self.index["complete"]:
            raise CacheError(f"{self.folder} is complete; nothing can be added")
        if len(teacher.shape) != 2 or teacher.shape[1] != about["k"] or not len(teacher):
            raise ValueError(f"an example must have shape (R, {about['k']}), got {tuple(teacher.shape)}")
        if teacher.temperature != about["temperature"]:
            raise ValueError(f"an example must be of temperature {about['temperature']:g}, got {teacher.temperature:g}")
        if (teacher.log_tail is not None) != about["log_tail"]:
            raise ValueError(f"an example must have {'a' if about['log_tail'] else 'no'} log_tail, as the others")
        if int(teacher.indices.max()) >= about["vocab_size"]:
            raise ValueError(f"indices must be in [0, {about['vocab_size']}), got {int(teacher.indices.max())}")
        self._pending.append((teacher.to("cpu"), fingerprint(tokens)))
        self._rows += len(teacher)
        if self._rows >= self.shard_rows:
            self.flush()

    def flush(self) -> None:
        """Writes the examples since the last shard, as one more."""
        if self._pending:
            self.index["shards"].append(self._write_shard())
            write_index(self.folder, self.index)
            self._pending, self._rows = [], 0

    def close(self) -> None:
        """Writes what is left and marks the cache as complete."""
        self.flush()
        self.index["complete"] = True
        write_index(self.folder, self.index)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.close()

    def _write_shard(self) -> dict:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        number = len(self.index["shards"])
        path, tensors = self.folder / f"shard-{number:05d}.safetensors", self._tensors()
        mark = json.dumps({"cache": mark_of(self.index["about"]), "shard": number}, sort_keys=True)
        with replacing(path) as temporary:
            try:
                save_file(tensors, temporary, metadata={"kdkernels": mark})
            except SafetensorError as error:  # a full disk arrives as this type
                raise OSError(f"cannot write {path}: {error}") from error
            found = {"sha256": sha256(temporary), "bytes": temporary.stat().st_size}
        tokens = hashlib.sha256(tensors["tokens"].numpy().tobytes()).hexdigest()
        return {"file": path.name, "examples": len(self._pending), "rows": self._rows, **found, "tokens": tokens}

    def _tensors(self) -> dict[str, Tensor]:
        about, teachers = self.index["about"], [teacher for teacher, _ in self._pending]
        ends = list(itertools.accumulate(map(len, teachers)))
        log_p = torch.cat([t.log_outcomes() for t in teachers]).log_softmax(-1)
        indices = torch.cat([t.indices for t in teachers])
        if about["indices"] == "uint16":
            indices = torch.where(indices < 0, NO_CLASS, indices)
        tensors = {
            "indices": indices.to(getattr(torch, about["indices"])),
            "log_probs": log_p[:, : about["k"]].to(VALUES[about["log_probs"]]).contiguous(),
            "ends": torch.tensor(ends),
            "tokens": torch.tensor([tokens for _, tokens in self._pending]),
        }
        return tensors | ({"log_tail": log_p[:, about["k"]].float()} if about["log_tail"] else {})


class Reader:
    """Reads a cache; see the module. len(reader) examples, `rows` rows; `about` has what it was written with.

    Args:
        folder: where it is.
        partial: take one that is not complete as well.
        tail: of the teachers, as in `SparseTeacher`.
        about: what the cache is to be: vocab_size, k, temperature, log_tail, teacher, data, log_probs, indices.

    Raises:
        CacheError: a ValueError: it is missing, damaged or another; from methods too, which name the shard.
    """

    def __init__(self, folder: str | PathLike, *, partial: bool = False, tail: str | None = None,
                 **about: Any) -> None:  # fmt: skip
        self.folder, self.tail = Path(folder), tail
        index = read_index(self.folder)
        self.about, self.shards = index["about"], index["shards"]
        expect(self.folder, self.about, about)
        if not index["complete"] and not partial:
            raise CacheError(f"{self.folder} is not complete: whoever writes it was stopped after {len(self)} examples")
        self._files: dict[int, Any] = {}
        self._examples = [0, *itertools.accumulate(shard["examples"] for shard in self.shards)]
        self._rows = [0, *itertools.accumulate(shard["rows"] for shard in self.shards)]

    def __len__(self) -> int:
        return sum(shard["examples"] for shard in self.shards)

    @property
    def rows(self) -> int:
        return self._rows[-1]

    def __getstate__(self) -> dict:
        return vars(self) | {"_files": {}}  # a worker process opens them for itself

    def __getitem__(self, example: int) -> SparseTeacher:
        return self.example(example)

    def example(self, number: int, tokens: Tensor | None = None) -> SparseTeacher:
        """The rows (R, k) of an example. With its tokens it is an error if the cache was made from others."""
        if not hasattr(number, "__index__"):
            raise TypeError(f"example must be an int, got {number!r}; examples(numbers) reads several, row_range rows")
        if not 0 <= number < len(self):
            raise IndexError(f"example must be in [0, {len(self)}), got {number}")
        shard = bisect.bisect_right(self._examples, number) - 1
        file, at = self._open(shard), number - self._examples[shard]
        if tokens is not None and file.get_slice("tokens")[at : at + 1].item() != fingerprint(tokens):
            raise CacheError(f"{self._path(shard)}: example {number} was made from other tokens than these")
        ends = [0, *file.get_slice("ends")[max(at - 1, 0) : at + 1].tolist()][-2:]
        return self._read(shard, *ends)

    def examples(self, numbers: Iterable[int], tokens: Tensor | None = None) -> SparseTeacher:
        """The rows (B, R, k) of examples of equal length; tokens (B, ...) as above."""
        found = [self.example(n, None if tokens is None else tokens[i]) for i, n in enumerate(numbers)]
        if len({x.shape for x in found}) != 1:
            raise ValueError(f"examples must have equal numbers of rows, got {sorted({len(x) for x in found})}")
        return _joined(found).reshape(len(found), len(found[0]))

    def row_range(self, first: int, end: int) -> SparseTeacher:
        """Rows (end - first, k), counted through all examples."""
        if not 0 <= first < end <= self.rows:
            raise IndexError(f"rows must be in [0, {self.rows}), at least one, got {first} to {end}")
        parts = []
        for shard in range(bisect.bisect_right(self._rows, first) - 1, bisect.bisect_left(self._rows, end)):
            start, stop = self._rows[shard], self._rows[shard + 1]
            parts.append(self._read(shard, max(first, start) - start, min(end, stop) - start))
        return _joined(parts)

    def verify(self) -> None:
        """Opens, and so verifies, every shard."""
        for shard in range(len(self.shards)):
            self._open(shard)

    def _path(self, shard: int) -> Path:
        return self.folder / self.shards[shard]["file"]

    def _read(self, shard: int, first: int, end: int) -> SparseTeacher:
        file = self._open(shard)
        indices, values = (file.get_slice(name)[first:end] for name in ("indices", "log_probs"))
        indices = indices.to(torch.int64)
        if self.about["indices"] == "uint16":
            indices = torch.where(indices == NO_CLASS, -1, indices)
        tail = file.get_slice("log_tail")[first:end] if self.about["log_tail"] else None
        return SparseTeacher(indices, values, tail, temperature=self.about["temperature"], tail=self.tail)

    def _open(self, shard: int):
        if shard not in self._files:
            self._files[shard] = self._verified(shard)
        return self._files[shard]

    def _verified(self, shard: int):
        """The shard's file, if it is what the index says."""
        from safetensors import SafetensorError, safe_open

        path, entry = self._path(shard), self.shards[shard]
        if not path.is_file():
            raise CacheError(f"{path} is missing, a shard of the cache")
        try:
            file = safe_open(path, "pt")
            mark = json.loads((file.metadata() or {}).get("kdkernels", "{}"))
        except (SafetensorError, ValueError) as error:
            raise CacheError(f"{path} is damaged: {error}") from None
        if mark != {"cache": mark_of(self.about), "shard": shard}:
            raise CacheError(f"{path} belongs to another cache, or to another place of this one")
        if (size := path.stat().st_size) != entry["bytes"]:
            raise CacheError(f"{path} is damaged: it has {size} bytes of {entry['bytes']}")
        if sha256(path) != entry["sha256"]:
            raise CacheError(f"{path} is damaged, or from another run: its checksum is not the index's")
        return file


def _joined(parts: list[SparseTeacher]) -> SparseTeacher:
    if len(parts) == 1:
        return parts[0]
    tails = [p.log_tail for p in parts if p.log_tail is not None]
    indices, values = (torch.cat([getattr(p, name) for p in parts]) for name in ("indices", "values"))
    return parts[0]._with(indices, values, torch.cat(tails) if tails else None)
