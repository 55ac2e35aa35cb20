"""A checkpoint or a teacher cache with a bit flipped, with its end cut off, another file in its place: an error that
names it, and of one kind. `EVERY=1 pytest tests/test_damage.py` flips every bit of the headers."""

import os
import pickle
import random
import shutil

import pytest
import test_cache
import torch
from safetensors.torch import save_file

from kdkernels.cache import CacheError, Reader
from kdkernels.trainer.checkpoint import load_tensors, save_tensors
from kdkernels.trainer.config import UserError

TENSORS = {"net/weight": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(7), "half": torch.ones(3).half()}


def harmed(raw: bytes):
    """-> some bits flipped, most in the first bytes, which have the sizes and names; and some lengths."""
    dice, head = random.Random(0), 8 * min(len(raw), 800)
    first = range(head) if os.environ.get("EVERY") else [*range(64), *(dice.randrange(head) for _ in range(250))]
    places = [*first, *(dice.randrange(8 * len(raw)) for _ in range(50))]
    for at in places:
        other = bytearray(raw)
        other[at // 8] ^= 1 << at % 8
        yield bytes(other)
    for length in [*range(12), *(dice.randrange(len(raw)) for _ in range(30)), len(raw) - 1]:
        yield raw[:length]


def foreign(folder):
    """Files of others, each at the path yielded."""
    for kind, write in {
        "pickle": lambda path: path.write_bytes(pickle.dumps({"net/weight": torch.ones(2)})),
        "torch.save": lambda path: torch.save(TENSORS, path),
        "text": lambda path: path.write_text("loss,step\n1,2\n"),
        "zeros": lambda path: path.write_bytes(bytes(4096)),
        "bare safetensors": lambda path: save_file(TENSORS, path),
        "of a library with the same key": lambda path: save_file(TENSORS, path, {"kdkernels": "[]"}),
        "no JSON under the key": lambda path: save_file(TENSORS, path, {"kdkernels": "{"}),
    }.items():
        path = folder / kind.replace(" ", "-")
        write(path)
        yield path


def test_checkpoints(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    save_tensors(path, TENSORS, step=12, owner="kd")
    assert load_tensors(path)[1]["step"] == 12
    raw = path.read_bytes()
    for other in harmed(raw):
        path.write_bytes(other)
        with pytest.raises(UserError, match=path.name):
            load_tensors(path)
    path.write_bytes(raw)
    cache = test_cache.write(tmp_path / "cache", 11)
    for other in (*foreign(tmp_path), cache / "shard-00000.safetensors", cache / "index.json"):
        with pytest.raises(UserError, match=other.name):
            load_tensors(other)


@pytest.mark.parametrize("name", ["index.json", "shard-00001.safetensors"])
def test_caches(tmp_path, name):
    cache = test_cache.write(tmp_path / "cache", 11)
    path = cache / name
    raw = path.read_bytes().rstrip()  # a line end less is no damage

    def read():
        Reader(cache).verify()

    read()
    for other in harmed(raw):
        path.write_bytes(other)
        with pytest.raises(CacheError, match=name):
            read()
    save_tensors(tmp_path / "checkpoint", TENSORS, step=1)
    for other in (*foreign(tmp_path), tmp_path / "checkpoint"):
        shutil.copy(other, path)
        with pytest.raises(CacheError, match=name):
            read()
