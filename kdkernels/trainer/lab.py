"""Where a recipe works: data, teachers, training that goes on where it was killed, figures.

Everything a recipe trains is a file of the run folder, written atomically every so many steps and found again when the
recipe is run again: a recipe reads top to bottom, and a killed one does not repeat what was done. Batches and noise are
functions of seed, name and step alone, so that a resumed run ends at the same weights to the last bit.
"""

import functools
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

from . import checkpoint, models, parallel, report
from .config import Config, UserError
from .images import STUDENT, TEACHER, ConvNet, Pairs

HELD = 500  # test pictures that a bar's agreement is of


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
    """A loss(batch) and what it changes, each step. It is the mean over the labels that count or, with `rows`, over all
    rows: of parts of a batch it makes that of the whole. prepare(batch) -> batch comes first, of all of it."""

    loss: Any
    parameters: list[nn.Parameter]
    lr: float = 0.05
    rows: bool = False
    prepare: Any = None


class Runs:
    """Args: folder of the run, folder of what runs share (teachers), seed, show(title, unit) like `report.progress`,
    share of all steps to make, settings of which `accumulate` and `dtype` count."""

    CLIP = 5.0  # largest norm of a gradient
    UNIT = 1, "pictures"  # of an example

    def __init__(self, folder, cache, seed=0, show=report.progress, share=1.0, cfg: Config | None = None):
        self.folder, self.cache, self.seed, self.show, self.share = Path(folder), Path(cache), seed, show, share
        self.cfg = cfg or Config()
        self.curves: dict[str, list[float]] = {}
        self.log: Any = None  # log(name, losses so far, [(step, agreement)]), whenever a file is written
        self._data: dict[Any, Any] = {}

    def shared(self, seed: int):
        """The lab of what runs share, whatever their settings."""
        one = type(self)(self.cache, self.cache, seed, self.show, self.share)
        one._data = self._data
        return one

    def teacher_seeds(self, count: int = 1) -> list[int]:
        """Seeds of as many teachers. The first is this seed's own; others are those of seeds 0 to 2, so that few are
        trained."""
        return [1000 + self.seed, *(1000 + (self.seed + k) % 3 for k in range(1, count))]

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

    def answers(self, net, data) -> Tensor:
        """The most likely class of each of a few held-out examples."""
        raise NotImplementedError

    def train(self, name: str, net: Any, updates: list[Update], *, steps=800, size=64, data=None, every=200,
              teacher=None):  # fmt: skip
        """`net` after `steps` steps, each of all updates in turn; from its file, as far as that has come. How far it
        agrees with a teacher is looked at every so often."""
        job = functools.partial(self._train, name, net, updates, math.ceil(steps * self.share), size,
                                data or self.data(), every, teacher)  # fmt: skip
        if self.folder != self.cache or parallel.size() == 1:
            return job()
        # What runs share is the same with any number of ranks: one makes it, and the others read it.
        return parallel.first(lambda: parallel.alone(job)) or parallel.alone(job)

    def _train(self, name, net, updates, steps, size, data, every, teacher):
        of = f"-{self.share:g}" if self.folder == self.cache and self.share != 1 else ""  # another share is another net
        path, how = self.folder / f"{name}{of}.safetensors", settings(self.cfg)
        owner = json.dumps([name, data.key, steps, size, self.seed, [u.lr for u in updates], *([how] if how else [])])
        optimizers = [self.optimizer(update) for update in updates]
        done, self.curves[name], held = self._restore(path, owner, net, optimizers)
        log = lambda: self.log and parallel.first(lambda: self.log(name, self.curves[name], held))  # noqa: E731
        log()
        if done == steps:
            return net.eval()
        if parallel.size() > size:
            raise UserError(f"{parallel.size()} ranks are more than the batches of {name} have rows: {size}")

        with torch.no_grad():
            told = None if teacher is None else self.answers(teacher.eval(), data)

        def look(step):
            if told is not None:
                with torch.no_grad():
                    held.append((step, (self.answers(net.eval(), data) == told).double().mean().item()))
            net.train()

        with self.show(name, f"{self.UNIT[1]}/s") as bar:
            look(0) if not done else net.train()
            start, value = time.perf_counter(), math.nan
            for step in range(done, steps):
                batch = self.batch(data, step, size)
                for update, optimizer in zip(updates, optimizers, strict=True):
                    for group in optimizer.param_groups:
                        group["lr"] = update.lr * (0.5 + 0.5 * math.cos(math.pi * step / steps))
                    optimizer.zero_grad()
                    value = self._gradient(update, batch, size)
                    nn.utils.clip_grad_norm_(update.parameters, self.CLIP)
                    optimizer.step()
                parallel.same_statistics(net)
                self.curves[name].append(value)
                if not math.isfinite(value):
                    raise UserError(f"the loss of {name} became {value} at step {step + 1}")
                if due := (step + 1) % every == 0 or step + 1 == steps:
                    look(step + 1)
                speed = round(self.UNIT[0] * size * (step + 1 - done) / (time.perf_counter() - start))
                bar(step + 1, steps, speed=speed, loss=value, **({"agreement": held[-1][1]} if held else {}))
                if due:
                    self._save(path, owner, net, optimizers, step + 1, self.curves[name], held)
                    log()
        return net.eval()

    def _gradient(self, update, batch, size) -> float:
        """Of the update's parameters, of all parts and ranks; -> the loss of the whole batch."""
        if update.prepare:
            with models.autocast("cpu", self.cfg.dtype):
                batch = update.prepare(batch)
        count = lambda x: len(x.inputs) if update.rows else int((x.labels != -100).sum())  # noqa: E731
        total = torch.zeros(())
        for rows in parallel.rows(size, self.cfg.accumulate):
            part = cut(batch, rows, size)
            with models.autocast("cpu", self.cfg.dtype):
                loss = update.loss(part) * (count(part) / count(batch))
            loss.backward()
            total = total + loss.detach()
        parallel.add([p.grad for p in update.parameters if p.grad is not None])
        return parallel.total(total)

    def _save(self, path, owner, net, optimizers, step, curve, held):
        tensors = {f"net/{k}": v for k, v in state(net).items()} | {"curve": torch.tensor(curve)}
        tensors |= {"held": torch.tensor(held, dtype=torch.float64)} if held else {}
        for i, optimizer in enumerate(optimizers):
            for j, p in enumerate(optimizer.param_groups[0]["params"]):
                tensors |= {f"{i}/{j}/{name}": value for name, value in optimizer.state[p].items()}
        parallel.first(lambda: checkpoint.save_tensors(path, tensors, step=step, owner=owner))

    def _restore(self, path, owner, net, optimizers) -> tuple[int, list[float], list]:
        """-> the steps done, the loss of each, and (step, agreement) where it was looked at."""
        if not path.exists():
            return 0, [], []
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
        held = tensors["held"].tolist() if "held" in tensors else []
        return header["step"], tensors["curve"].tolist(), held


def settings(cfg) -> dict:
    """What else decides the weights of a run, where it is not as usual."""
    found = {"accumulate": (cfg.accumulate, 1), "dtype": (cfg.dtype, "float32"), "ranks": (parallel.size(), 1)}
    return {name: value for name, (value, usual) in found.items() if value != usual}


def cut(batch, rows: range, size: int):
    """These of the `size` rows of a batch."""
    part = lambda x: x[len(x) * rows.start // size : len(x) * rows.stop // size]  # noqa: E731
    return batch._replace(**{k: part(v) for k, v in batch._asdict().items() if isinstance(v, Tensor)})


def state(net) -> dict[str, Tensor]:
    """{name: tensor} of a net, once what its parts share."""
    return dict({v.data_ptr(): (k, v) for k, v in reversed(net.state_dict().items())}.values())


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

    def answers(self, net, data):
        """Those of the main head on test pictures."""
        return (y[0] if isinstance(y := net(data.test[0][:HELD]), tuple) else y).argmax(-1)

    def student(self, widths=STUDENT, classes=100) -> ConvNet:
        """Every student of a seed starts from the same weights."""
        torch.manual_seed(self.seed)
        return ConvNet(widths, classes)

    def teacher(self, loss=None, name="ce", data=None, widths=TEACHER, steps=1200, seed: int | None = None, lr=0.05,
                start: ConvNet | None = None) -> ConvNet:  # fmt: skip
        """Trained once for all recipes: loss(logits, labels), cross-entropy if none; from the weights of `start`."""
        seed = self.teacher_seeds()[0] if seed is None else seed
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
        told = None if isinstance(teacher, Tensor) else teacher
        return self.train(name, net, [update], data=data, teacher=told, **options)

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
