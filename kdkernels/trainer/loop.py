"""Training steps: every learner of a stage sees the same batches; a checkpoint holds all that the next step needs."""

import math
import time

import torch

from .checkpoint import load_tensors, save_tensors
from .config import UserError
from .models import logits_of, weights_of


class Learner:
    """A model, its loss(student_logits, teacher_logits, labels) and its AdamW."""

    def __init__(self, model, loss, cfg):
        self.model, self.loss, self.cfg = model, loss, cfg
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)

    def step(self, inputs, labels, teacher_logits, lr):
        """One update; -> the loss before it."""
        loss = self.loss(logits_of(self.model, inputs, self.cfg.dtype), teacher_logits, labels.flatten())
        loss.backward()
        if self.cfg.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def tensors(self):
        """{name: tensor}: weights and both moments of every parameter."""
        found = {}
        for name, parameter in weights_of(self.model).items():
            found[f"{name}/weight"] = parameter
            for key, value in self.optimizer.state[parameter].items():
                found[f"{name}/{key}"] = value
        return found

    def restore(self, tensors):
        with torch.no_grad():
            for name, parameter in weights_of(self.model).items():
                parameter.copy_(tensors[f"{name}/weight"])
                kept = {key: tensors[f"{name}/{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in kept.items()}


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
        save_tensors(self.path, tensors, step=done, owner=self.owner)

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

    teach(step, inputs) -> what the losses get of a teacher.
    measure() -> a record of held-out figures, taken every cfg.eval_every steps. bar(done, total, ...) shows progress.
    """
    first = stage.restore(learners)
    journal.rewind(stage.name, first)
    if measure and first == 0:
        journal.write(stage=stage.name, step=0, held_out=measure())
    for step in range(first, stage.steps):
        start = time.perf_counter()
        inputs, labels = (x.to(cfg.device) for x in corpus.batch(stage.number, step, stage.batch))
        with torch.no_grad():
            teacher_logits = teach(step, inputs) if teach else None
        lr = stage.rate(step, cfg.warmup)
        losses = {name: learner.step(inputs, labels, teacher_logits, lr) for name, learner in learners.items()}
        done, speed = step + 1, round(inputs.numel() / (time.perf_counter() - start))
        journal.write(stage=stage.name, step=done, loss=losses, lr=lr, tokens_per_second=speed)
        bar(done, stage.steps, speed=speed, **losses)
        for name, value in losses.items():
            if not math.isfinite(value):
                raise UserError(f"the loss of {name} became {value} at step {done}; try a smaller --lr")
        if measure and (done % cfg.eval_every == 0 or done == stage.steps):
            journal.write(stage=stage.name, step=done, held_out=measure())
        if done % cfg.checkpoint_every == 0 or done == stage.steps:
            journal.sync()
            stage.save(done, learners)
