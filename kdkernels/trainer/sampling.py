"""Text from language models: token by token with kept keys and values, many rows at a time, a teacher judging."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Taste(NamedTuple):
    """How tokens are drawn: the temperature, then the nucleus of mass top_p."""

    temperature: float = 1.0
    top_p: float = 1.0


AS_IS = Taste()


class Judge(NamedTuple):
    """A teacher that takes a drafted token if it is among its top_k, and otherwise draws one itself."""

    teacher: Any
    top_k: int
    taste: Taste = AS_IS
    draft: int = 5  # tokens between its looks: what comes out does not depend on it

    def takes(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """logits (..., V) as they are, neither tempered nor cut; tokens (...)."""
        return (logits > logits.gather(-1, tokens[..., None])).sum(-1) < self.top_k


def draw(logits: Tensor, u: Tensor, taste: Taste) -> Tensor:
    """Tokens (N,) where the distribution function of the rows (N, V) reaches u (N,), uniform in [0, 1)."""
    p = (logits / taste.temperature).softmax(-1)
    reached = (nucleus(p, taste.top_p) if taste.top_p < 1 else p).cumsum(-1)
    total = reached[:, -1:]
    place = (reached <= u[:, None].to(p) * total).sum(-1)
    return place.minimum((reached < total).sum(-1))  # u * total may round to the total


def nucleus(p: Tensor, mass: float, guess: int = 64) -> Tensor:
    """p (N, V), 0 for all but the fewest most likely tokens that have the mass."""
    top = p.topk(min(guess, p.shape[1])).values
    inside = top.cumsum(-1) - top < mass
    if inside[:, -1].any() and guess < p.shape[1]:
        return nucleus(p, mass, 4 * guess)
    return p.masked_fill(p < top.masked_fill(~inside, torch.inf).amin(-1, keepdim=True), 0.0)


class Reading:
    """A model, and keys and values of what it has read.

    Rows advance by different numbers of tokens: what is taken back stays in the cache, masked out.
    """

    def __init__(self, model, prompts):
        from transformers import DynamicCache

        self.model, self.cache, self.mask = model, DynamicCache(), prompts.new_empty(len(prompts), 0)
        self.read(prompts, torch.arange(prompts.shape[1]).expand_as(prompts))

    def read(self, tokens, positions):
        """tokens (B, n) at these positions (B, n) -> the logits after each (B, n, V)."""
        self.mask = torch.cat((self.mask, torch.ones_like(tokens)), 1)
        return self.model(input_ids=tokens, position_ids=positions, attention_mask=self.mask,
                          past_key_values=self.cache, use_cache=True).logits  # fmt: skip

    def keep(self, valid):
        """valid (B, n): which of the last n tokens each row has in its text."""
        self.mask[:, -valid.shape[1] :] = valid


@torch.no_grad()
def respond(student, prompts: Tensor, u: Tensor, taste: Taste, judge: Judge | None = None) -> Tensor:
    """The prompts (B, P) with L more tokens (B, P + L), the student's own or, where it refuses those, the judge's.

    u (B, L, 2), uniform, decides: [..., 0] the student's token of each place, [..., 1] the teacher's. So the text is
    that of drawing token by token, however many are drafted between two looks of the teacher.
    """
    (rows, start), length = prompts.shape, u.shape[1]
    text = torch.cat((prompts, prompts.new_zeros(rows, length)), 1)
    models, draft = ([student, judge.teacher], judge.draft) if judge else ([student], length)
    writer, *reader = readings = [Reading(model, prompts[:, :-1]) for model in models]
    row, at, ahead = torch.arange(rows), torch.full((rows,), start), torch.arange(draft)
    while (at < start + length).any():
        places = at[:, None] + ahead  # of the drafts, some behind the end: these are drawn and dropped
        uniform = u[row[:, None], (places - start).clamp(max=length - 1)]
        pending = text[row, at - 1]  # the last token of a row is what neither model has read
        drafts = places.new_empty(rows, draft)
        for j in range(draft):
            logits = writer.read((drafts[:, j - 1] if j else pending)[:, None], places[:, j : j + 1] - 1)
            drafts[:, j] = draw(logits[:, 0], uniform[:, j, 0], taste)
        advance = torch.full_like(at, draft)
        if judge:
            logits = reader[0].read(torch.cat((pending[:, None], drafts[:, :-1]), 1), places - 1)
            taken = judge.takes(logits, drafts).long().cumprod(1).sum(1)
            first = taken.clamp(max=draft - 1)
            own = draw(logits[row, first], uniform[row, first, 1], judge.taste)
            drafts[row, first] = torch.where(taken < draft, own, drafts[row, first])
            advance = first + 1
        valid = ahead < advance[:, None]
        for reading in readings:
            reading.keep(valid)
        written = valid & (places < start + length)
        text[row[:, None].expand_as(places)[written], places[written]] = drafts[written]
        at = (at + advance).clamp(max=start + length)
    return text
