"""Distillation as a Lightning module: `python -m benchmarks.examples.lightning` (pip install pytorch-lightning)."""

import pytorch_lightning as lightning
import torch
from torch.utils.data import DataLoader

import kdkernels

from .plain import Model


class Distillation(lightning.LightningModule):
    """A student learns a frozen teacher's distribution of the next token, by any loss."""

    def __init__(self, student: Model, teacher: Model, loss: kdkernels.BaseLoss, lr: float = 3e-3):
        super().__init__()
        self.student, self.lr = student, lr
        self.loss = kdkernels.LinearLoss(loss)
        self.frozen = [teacher.requires_grad_(False).eval()]  # in a list: neither trained, nor saved with the student
        self.values: list[float] = []

    def on_fit_start(self) -> None:
        self.frozen[0].to(self.device)

    def training_step(self, tokens: torch.Tensor, _: int) -> torch.Tensor:
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        student, (teacher,) = self.student, self.frozen
        with torch.no_grad():
            teacher_hidden = teacher.hidden(inputs)
        hidden = student.hidden(inputs)
        loss = self.loss(hidden, student.lm_head.weight, teacher_hidden, teacher.lm_head.weight, labels)
        self.log("loss", loss, prog_bar=True)
        self.values.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.student.parameters(), self.lr)


def example(epochs: int = 20, vocab: int = 1000) -> list[float]:
    """-> the loss of each step."""
    torch.manual_seed(0)
    module = Distillation(Model(vocab, 32), Model(vocab, 64), kdkernels.ForwardKLLoss(temperature=2.0, t_squared=True))
    batches = DataLoader(torch.randint(vocab, (16, 33)), batch_size=8)
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", devices=1, logger=False, gradient_clip_val=1.0,
                                enable_checkpointing=False, enable_progress_bar=False)  # fmt: skip
    trainer.fit(module, batches)
    return module.values


if __name__ == "__main__":
    losses = example()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps")
