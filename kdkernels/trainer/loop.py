"""Training steps: every learner of a stage sees the same batches; a checkpoint holds all that the next step needs."""

import math
import time

import torch

from . import parallel
from .checkpoint import load_tensors, save_tensors
from .config import UserError
from .models import logits_of, weights_of

KEPT = ("weight", "step", "exp_avg", "exp_avg_sq")


class Learner:
    """A model, its AdamW, and its loss(student_logits, teacher_logits, labels, items, share): what some rows of a batch
    add to its loss, `items` of all its labels count and `share` of its rows are these."""

    def __init__(self, model, loss, cfg):
        self.model, self.loss, self.cfg = model, loss, cfg
        self.net = parallel.wrap(model, cfg)
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)

    def add(self, inputs, labels, teacher_logits, items, share, last):
        """The gradient of a part of the batch, after the `last` the ranks' sum; -> what the part adds to the loss."""
        with parallel.exchanging(self.net, last):
            logits = logits_of(self.net, inputs, self.cfg.dtype)
            loss = self.loss(logits, teacher_logits, labels.flatten(), items, share)
            (loss * parallel.size()).backward()  # of which the ranks' mean is the sum
        return loss.detach()

    def update(self, lr):
        if self.cfg.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()

    def tensors(self):
        """{name: tensor}: weights and both moments of every parameter."""
        found = {}
        for name, parameter in weights_of(self.model).items():
            found[f"{name}/weight"] = parallel.whole(parameter)
            for key, value in self.optimizer.state[parameter].items():
                found[f"{name}/{key}"] = parallel.whole(value)
        return found

    def restore(self, tensors):
        with torch.no_grad():
            for name, parameter in weights_of(self.model).items():
                own = {key: parallel.shard_like(tensors[f"{name}/{key}"], parameter) for key in KEPT}
                parameter.copy_(own.pop("weight"))
                self.optimizer.state[parameter] = own


class Stage:
    """A stretch of training: its name, its stream of batches, their size and number, its checkpoint."""

    def __init__(self, name, number, batch, steps, lr, path, owner):
        self.name, self.number, self.batch, self.steps, self.lr = name, number, batch, steps, lr
        self.path, self.owner = path, owner

    def rate(self, step, warmup):
        """Linear rise, then a cosine down to a tenth of the peak."""
        rise = max(1, round(warmup * self.steps))
        if step < rise:
            return self.lr * (step + 1) / rise
        return self.lr * (0.55 + 0.45 * math.cos(math.pi * (step - rise) / max(1, self.steps - rise)))

    def save(self, done, learners):
        tensors = {f"{who}/{name}": t for who, one in learners.items() for name, t in one.tensors().items()}
        parallel.first(lambda: save_tensors(self.path, tensors, step=done, owner=self.owner))

    def restore(self, learners):
        """-> the number of steps done."""
        if not self.path.exists():
            return 0
        tensors, header = load_tensors(self.path)
        if header.get("owner") != self.owner:
            raise UserError(f"{self.path} belongs to another run: {header.get('owner')}, not {self.owner}")
        for who, learner in learners.items():
            mine = {name.removeprefix(f"{who}/"): t for name, t in tensors.items() if name.startswith(f"{who}/")}
            learner.restore(mine)
        return header["step"]


def fit(stage, learners, corpus, cfg, journal, bar, teach=None, measure=None):
    """Train {name: Learner} to the end of the stage, from its checkpoint if there is one.

    teach(step, row, inputs) -> what the losses get of a teacher for inputs that are the batch's from `row` on.
    measure() -> a record of held-out figures, taken every cfg.eval_every steps. bar(done, total, ...) shows progress.
    """
    first = stage.restore(learners)
    held = journal.rewind(stage.name, first)
    if measure and first == 0:
        held = measure()
        journal.write(stage=stage.name, step=0, held_out=held)
    for step in range(first, stage.steps):
        start = time.perf_counter()
        losses, lr = train(stage, step, learners, corpus, cfg, teach), stage.rate(step, cfg.warmup)
        for learner in learners.values():
            learner.update(lr)
        done, speed = step + 1, round(stage.batch * cfg.seq_len / (time.perf_counter() - start))
        journal.write(stage=stage.name, step=done, loss=losses, lr=lr, tokens_per_second=speed)
        agreement = {f"{name} agreement": figures["agreement"] for name, figures in held.items()}
        bar(done, stage.steps, speed=speed, **losses, **agreement)
        for name, value in losses.items():
            if not math.isfinite(value):
                raise UserError(f"the loss of {name} became {value} at step {done}; try a smaller --lr")
        if measure and (done % cfg.eval_every == 0 or done == stage.steps):
            held = measure()
            journal.write(stage=stage.name, step=done, held_out=held)
        if done % cfg.checkpoint_every == 0 or done == stage.steps:
            journal.sync()
            stage.save(done, learners)


def train(stage, step, learners, corpus, cfg, teach):
    """The learners' gradients of a step, part by part; -> {name: loss of the whole batch}."""
    inputs, labels = corpus.batch(stage.number, step, stage.batch)
    items, found = max(1, int((labels != -100).sum())), dict[str, torch.Tensor]()
    parts = parallel.rows(len(inputs), cfg.accumulate)
    for part in parts:
        x, y = (z[part.start : part.stop].to(cfg.device) for z in (inputs, labels))
        with torch.no_grad():
            teacher_logits = teach(step, part.start, x) if teach else None
        for name, learner in learners.items():
            added = learner.add(x, y, teacher_logits, items, len(x) / len(inputs), part is parts[-1])
            found[name] = found[name] + added if name in found else added
    return {name: parallel.total(value) for name, value in found.items()}
