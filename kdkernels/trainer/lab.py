"""Where a recipe works: data, teachers, training that goes on where it was killed, figures.

Everything a recipe trains is a file of the run folder, written atomically every so many steps and found again when the
recipe is run again: a recipe reads top to bottom, and a killed one does not repeat what was done. Batches and noise are
functions of seed, name and step alone, so that a resumed run ends at the same weights to the last bit.
"""

import hashlib
import json
import math
import time
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn

from . import checkpoint
from .config import UserError
from .images import STUDENT, TEACHER, ConvNet, Pairs


class Batch(NamedTuple):
    """One of a training run's: `at` are the pictures' numbers, `noise` a generator that is this step's own."""

    step: int
    at: Tensor
    images: Tensor
    labels: Tensor
    masks: Tensor
    noise: torch.Generator

    @property
    def inputs(self):
        return self.images


class Update(NamedTuple):
    """A loss(batch) and what it changes, each step."""

    loss: Any
    parameters: list[nn.Parameter]
    lr: float = 0.05


class Runs:
    """Args: folder of the run, folder of what runs share (teachers), seed, show(text), share of all steps to make."""

    CLIP = 5.0  # largest norm of a gradient
    UNIT = 1, "pictures"  # of an example

    def __init__(self, folder, cache, seed=0, show=print, share=1.0):
        self.folder, self.cache, self.seed, self.show, self.share = Path(folder), Path(cache), seed, show, share
        self.curves: dict[str, list[float]] = {}
        self._data: dict[Any, Any] = {}

    def shared(self, seed: int):
        """The lab of what runs share."""
        one = type(self)(self.cache, self.cache, seed, self.show, self.share)
        one._data = self._data
        return one

    def rng(self, name: str, step: int = 0) -> numpy.random.Generator:
        return numpy.random.default_rng([self.seed, zlib.crc32(name.encode()), step])

    def noise(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(int(self.rng("noise", step).integers(1 << 62)))

    def data(self) -> Any:
        """What is trained on: something with a key."""
        raise NotImplementedError

    def batch(self, data, step: int, size: int) -> Any:
        """That of a step, the same whenever it is asked for."""
        raise NotImplementedError

    def optimizer(self, update: Update) -> torch.optim.Optimizer:
        raise NotImplementedError

    def train(self, name: str, net: Any, updates: list[Update], *, steps=800, size=64, data=None, every=200):
        """`net` after `steps` steps, each of all updates in turn; from its file, as far as that has come."""
        data, path, steps = data or self.data(), self.folder / f"{name}.safetensors", math.ceil(steps * self.share)
        owner = json.dumps([name, data.key, steps, size, self.seed, [u.lr for u in updates]])
        optimizers = [self.optimizer(update) for update in updates]
        done, self.curves[name] = self._restore(path, owner, net, optimizers)
        net.train()
        start = time.perf_counter()
        for step in range(done, steps):
            batch = self.batch(data, step, size)
            for update, optimizer in zip(updates, optimizers, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = update.lr * (0.5 + 0.5 * math.cos(math.pi * step / steps))
                loss = update.loss(batch)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(update.parameters, self.CLIP)
                optimizer.step()
            self.curves[name].append(value := loss.item())
            if not math.isfinite(value):
                raise UserError(f"the loss of {name} became {value} at step {step + 1}")
            if (step + 1) % every == 0 or step + 1 == steps:
                speed = self.UNIT[0] * size * (step + 1 - done) / (time.perf_counter() - start)
                self.show(f"{name}: step {step + 1} of {steps}, loss {value:.4f}, {speed:.0f} {self.UNIT[1]}/s")
                self._save(path, owner, net, optimizers, step + 1, self.curves[name])
        return net.eval()

    def _save(self, path, owner, net, optimizers, step, curve):
        once = {v.data_ptr(): (k, v) for k, v in reversed(net.state_dict().items())}  # parts may be shared
        tensors = {f"net/{k}": v for k, v in once.values()} | {"curve": torch.tensor(curve)}
        for i, optimizer in enumerate(optimizers):
            for j, p in enumerate(optimizer.param_groups[0]["params"]):
                tensors |= {f"{i}/{j}/{name}": value for name, value in optimizer.state[p].items()}
        checkpoint.save_tensors(path, tensors, step=step, owner=owner)

    def _restore(self, path, owner, net, optimizers) -> tuple[int, list[float]]:
        if not path.exists():
            return 0, []
        tensors, header = checkpoint.load_tensors(path)
        if header.get("owner") != owner:
            raise UserError(f"{path} is of another run: {header.get('owner')}, not {owner}; take another --out")
        for k, v in net.state_dict().items():
            if f"net/{k}" in tensors:
                v.copy_(tensors[f"net/{k}"])
        for i, optimizer in enumerate(optimizers):
            for j, p in enumerate(optimizer.param_groups[0]["params"]):
                mine = f"{i}/{j}/"
                optimizer.state[p] |= {k.removeprefix(mine): v for k, v in tensors.items() if k.startswith(mine)}
        return header["step"], tensors["curve"].tolist()


class Lab(Runs):
    """Runs of convolutional networks on small images, with momentum."""

    def data(self, **options) -> Pairs:
        key = tuple(sorted(options.items()))
        self._data[key] = self._data.get(key) or Pairs(**options)
        return self._data[key]

    def batch(self, data, step: int, size: int):
        at = data.draw(self.rng("batches", step), size)
        images, labels, masks = (x[at] for x in data.train)
        return Batch(step, at, images, labels, masks, self.noise(step))

    def optimizer(self, update: Update) -> torch.optim.Optimizer:
        return torch.optim.SGD(update.parameters, lr=update.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def student(self, widths=STUDENT, classes=100) -> ConvNet:
        """Every student of a seed starts from the same weights."""
        torch.manual_seed(self.seed)
        return ConvNet(widths, classes)

    def teacher(self, loss=None, name="ce", data=None, widths=TEACHER, steps=1200, seed=1000, lr=0.05,
                start: ConvNet | None = None) -> ConvNet:  # fmt: skip
        """Trained once for all recipes: loss(logits, labels), cross-entropy if none; from the weights of `start`."""
        torch.manual_seed(seed)
        net, one = ConvNet(widths), self.shared(seed)
        if start is not None:
            net.load_state_dict(start.state_dict())
        data, loss = data or self.data(), loss or nn.functional.cross_entropy
        key = hashlib.sha256(json.dumps([name, data.key, widths, steps, seed, lr]).encode()).hexdigest()[:12]
        update = Update(lambda b: loss(net(b.images), b.labels), list(net.parameters()), lr)
        return frozen(one.train(f"image-teacher-{name}-{key}", net, [update], steps=steps, data=data))

    def distil(self, name: str, loss, teacher, *, net=None, data=None, **options) -> ConvNet:
        """A student trained with loss(student_logits, teacher_logits, labels); teacher: a net, or logits (N, C) of all
        training pictures."""
        data, net = data or self.data(), net or self.student()
        logits = teacher if isinstance(teacher, Tensor) else logits_of(teacher, data)
        update = Update(lambda b: loss(net(b.images), logits[b.at], b.labels), list(net.parameters()))
        return self.train(name, net, [update], data=data, **options)

    def plain(self, name="cross-entropy", **options) -> ConvNet:
        """A student of the labels alone."""
        net = self.student()
        return self.train(name, net, [Update(lambda b: nn.functional.cross_entropy(net(b.images), b.labels),
                                             list(net.parameters()))], **options)  # fmt: skip


def frozen(net):
    return net.eval().requires_grad_(False)


@torch.no_grad()
def logits_of(net, data) -> Tensor:
    """Of every training picture."""
    return torch.cat([net.eval()(x) for x in data.train[0].split(1000)])
