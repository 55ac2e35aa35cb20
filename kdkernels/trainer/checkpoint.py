"""Files that survive a kill, and are checked when read. Nothing is pickled."""

import json
import os
import zlib
from pathlib import Path

from ..files import replacing
from .board import Board
from .config import UserError


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def checksum(tensors):
    """CRC-32 over names and bytes: safetensors notices a short file, not a flipped bit."""
    import torch

    crc = 0
    for name in sorted(tensors):
        raw = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        crc = zlib.crc32(raw, zlib.crc32(name.encode(), crc))
    return crc


def seal(header, tensors):
    """CRC-32 over a header and the names, dtypes and shapes of the tensors beside it."""
    kinds = [(name, str(tensors[name].dtype), list(tensors[name].shape)) for name in sorted(tensors)]
    return zlib.crc32(json.dumps([header, kinds], sort_keys=True).encode())


def save_tensors(path, tensors, **header):
    """Write {name: tensor} and a JSON header to a safetensors file; returns the checksum."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    crc = checksum(tensors)
    header = json.loads(json.dumps({**header, "crc32": crc}))  # as it will be read
    # One key: safetensors writes several in any order, and the same state is to be the same bytes.
    metadata = {"kdkernels": json.dumps({**header, "seal": seal(header, tensors)}, sort_keys=True)}
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:  # a full disk arrives as this type
            raise OSError(f"cannot write {path}: {error}") from error
    return crc


def load_tensors(path):
    """-> ({name: tensor}, header). UserError naming the file when it is damaged or not ours."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(metadata["kdkernels"])
        known, sealed = header["crc32"], header.pop("seal")
    except (KeyError, TypeError):
        raise UserError(f"{path} was not written by this version of kdkernels, or is damaged; delete it to "
                        f"start over from what it was made of") from None
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}; delete it to start over from what it was made of") from None
    if seal(header, tensors) != sealed or checksum(tensors) != known:
        raise UserError(f"{path} is damaged: its checksum differs; delete it to start over from what it was made of")
    return tensors, header


class Journal:
    """metrics.jsonl: one line per record, in order, without gaps or repeats across resumes; and a `Board` of it."""

    def __init__(self, path):
        self.path = Path(path)
        self.file = None
        self.board = Board(self.path.parent / "tensorboard")

    def records(self):
        """All records; a last line cut short by a kill is left out."""
        if not self.path.exists():
            return []
        # A machine that lost power may leave any bytes in the last line: undecodable ones must not stop the reading.
        lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        found = []
        for number, line in enumerate(lines, 1):
            try:
                found += [json.loads(line)] if line else []
            except ValueError:
                if number < len(lines):
                    raise UserError(f"{self.path}, line {number}, is damaged") from None
        return found

    def rewind(self, stage, step):
        """Forget what the resumed run writes again: all of `stage` after `step`, and its step 0 if it starts there.

        The rest of `stage` goes to the end: a teacher trained anew, its cache gone, still stands before the students.
        -> the last figures on held-out data among them.
        """
        self.close()
        found = self.records()
        others = [r for r in found if r["stage"] != stage]
        kept = [r for r in found if r["stage"] == stage and r["step"] <= step] if step else []
        with replacing(self.path) as temporary:
            temporary.write_text("".join(json.dumps(r) + "\n" for r in others + kept), encoding="utf-8")
        self.board.rewrite(others + kept)
        return next((r["held_out"] for r in reversed(kept) if "held_out" in r), {})

    def write(self, **record):
        self.file = self.file or self.path.open("a", encoding="utf-8")
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        self.board.add(record)

    def sync(self):
        if self.file:
            os.fsync(self.file.fileno())
        self.board.flush()

    def close(self):
        if self.file:
            self.file.close()
        self.file = None
        self.board.close()


class Unwritten:
    """The journal of a rank that writes none."""

    def rewind(self, stage, step):
        return {}

    def records(self):
        return []

    def write(self, **record):
        pass

    sync = close = write
