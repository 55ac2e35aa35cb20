"""The scalars of a journal for TensorBoard: `tensorboard --logdir RUN_DIR`."""

import importlib.util
import shutil
from pathlib import Path


class Board:
    """Scalars in `folder`, of the records that a journal has; nothing where the package tensorboard is missing."""

    def __init__(self, folder):
        self.folder, self.writer = Path(folder), None

    def rewrite(self, records):
        """As if these were all that had been added: what a killed run wrote after its checkpoint goes."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        for record in records:
            self.add(record)

    def add(self, record):
        if self.writer is None and importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder), flush_secs=10)
        if self.writer:
            for name, value in scalars(record):
                self.writer.add_scalar(name, value, record["step"])

    def flush(self):
        if self.writer:
            self.writer.flush()

    def close(self):
        if self.writer:
            self.writer.close()
        self.writer = None


def scalars(record):
    """'student/loss/ce', 'student/held_out/ce/kl', ... of a record, with their values."""

    def walk(name, value):
        if isinstance(value, dict):
            for key, one in value.items():
                yield from walk(f"{name}/{key}", one)
        else:
            yield name, value

    return walk(record["stage"], {k: v for k, v in record.items() if k not in ("stage", "step")})
