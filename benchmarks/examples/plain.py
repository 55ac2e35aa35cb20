"""Distillation in a plain PyTorch loop, logits a chunk of rows at a time: `python -m benchmarks.examples.plain`."""

import torch
from torch import Tensor, nn

import kdkernels


class Model(nn.Module):
    """A stand-in for a language model: hidden states of each token, and a head."""

    def __init__(self, vocab: int, width: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.mixer = nn.GRU(width, width, batch_first=True)
        self.lm_head = nn.Linear(width, vocab, bias=False)

    def hidden(self, tokens: Tensor) -> Tensor:
        return self.mixer(self.embedding(tokens))[0]


def train(student: Model, teacher: Model, batches: list[Tensor], lr: float = 3e-3) -> list[float]:
    """-> the loss of each step."""
    loss_fn = kdkernels.LinearLoss(kdkernels.ForwardKLLoss(temperature=2.0, t_squared=True, ce_weight=0.1))
    optimizer = torch.optim.AdamW(student.parameters(), lr)
    teacher.requires_grad_(False).eval()
    losses = []
    for tokens in batches:
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        with torch.no_grad():
            teacher_hidden = teacher.hidden(inputs)
        loss = loss_fn(student.hidden(inputs), student.lm_head.weight, teacher_hidden, teacher.lm_head.weight, labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def example(steps: int = 60, vocab: int = 1000) -> list[float]:
    torch.manual_seed(0)
    teacher, student = Model(vocab, 64), Model(vocab, 32)
    tokens = torch.randint(vocab, (8, 33))
    return train(student, teacher, [tokens] * steps)


if __name__ == "__main__":
    losses = example()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps")
