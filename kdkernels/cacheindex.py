"""What a cache of teachers says about itself, and how its parts are told from damaged and foreign ones."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path

import torch
from torch import Tensor

from .files import write_json

FORMAT = "kdkernels-teacher-cache-1"


class CacheError(ValueError):
    """A cache, or a shard of it, is not there, is damaged, or is not the one asked for."""


def fingerprint(tokens: Tensor) -> int:
    """63 bits that tell one example's tokens from others."""
    raw = tokens.detach().reshape(-1).to("cpu", torch.int64).contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.sha256(raw).digest()[:8], "little") >> 1


def read_index(folder: Path) -> dict:
    path = folder / "index.json"
    if not path.is_file():
        raise CacheError(f"{folder} has no teacher cache (no index.json)")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        known = index.pop("crc32")
        kind = index["format"]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise CacheError(f"{path} is damaged, or no index of a teacher cache: {problem}") from None
    if kind != FORMAT:
        raise CacheError(f"{path} is of the format {kind!r}, this version reads {FORMAT!r}")
    if known != crc32(index):
        raise CacheError(f"{path} is damaged: its checksum differs")
    return index


def write_index(folder: Path, index: dict) -> None:
    write_json(folder / "index.json", {**index, "crc32": crc32(index)})


def expect(folder: Path, about: dict, wanted: dict) -> None:
    """Raises if the cache is not the one wanted, naming what differs."""
    for name, value in wanted.items():
        if name not in about:
            raise TypeError(f"a teacher cache has no {name!r}; it has {', '.join(about)}")
        if about[name] != value:
            raise CacheError(f"{folder} is another cache: its {name} is {about[name]!r}, not {value!r}")


def crc32(index: dict) -> int:
    return zlib.crc32(json.dumps(index, sort_keys=True).encode())


def mark_of(about: dict) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
