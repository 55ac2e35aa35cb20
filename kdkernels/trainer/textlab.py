"""Where a recipe of language models works: short texts, a small teacher, a smaller student that has read a little.

The text is Python's standard library in tokens of its own. What distillation draws from is a thousand pieces of it: a
prompt and a response each, and only tokens of the response count.
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

import kdkernels as kd

from ..files import replacing
from . import models
from .config import Config
from .data import END_OF_TEXT, Corpus, find_text, split
from .evaluate import evaluate
from .lab import Runs, Update, frozen
from .sampling import AS_IS, Judge, respond

PROMPT, RESPONSE = 32, 32
VOCAB = 2048
TEACHER = dict(hidden=128, ffn=384, heads=4, layers=4)
STUDENT = dict(hidden=64, ffn=192, heads=4, layers=2)
STEPS, SIZE, LR = 100, 16, 1e-3  # of distillation
FIGURE = "acceptance 1 - TVD on the student's own continuations of held-out prompts (given: on the text's), %"


class Pieces:
    """Those of `tokens` that begin at `starts`, PROMPT + RESPONSE of them."""

    def __init__(self, key: str, tokens: Tensor, starts):
        self.key, self.tokens, self.starts = key, tokens, torch.as_tensor(starts)

    def __getitem__(self, at) -> Tensor:
        return self.tokens[self.starts[at][:, None] + torch.arange(PROMPT + RESPONSE)].long()

    def draw(self, rng, size):
        return torch.from_numpy(rng.integers(0, len(self.starts), size))


class Text:
    """`whole` to learn language from and `few` to distil on; held out: `watched` for schedules, `held` for figures.

    Args:
        cache: folder of its tokens and tokenizer.
        paths: files or folders; none: the standard library.
    """

    def __init__(self, cache, paths=(), vocab=VOCAB, few=1000, held=128):
        cfg = Config(text=list(paths), cache=str(cache), seq_len=PROMPT + RESPONSE)
        cfg.tokenizer = byte_pairs(cache, split(find_text(cfg.text), cfg.val_fraction)["train"], vocab)
        corpus = Corpus(cfg).load(lambda done, total: None)
        self.vocab, self.end = corpus.vocab_size, corpus.separator
        places = numpy.arange(len(corpus.train) - PROMPT - RESPONSE + 1)
        self.whole = Pieces(corpus.key, corpus.train, places)
        chosen = numpy.random.default_rng(0).choice(places, min(few, len(places)), replace=False)
        self.few = Pieces(f"{corpus.key}, {few}", corpus.train, chosen)
        last = len(corpus.val) - PROMPT - RESPONSE
        pieces = Pieces(corpus.key, corpus.val, numpy.linspace(0, last, held * 5 // 4).astype(int))
        number = torch.arange(held * 5 // 4)
        self.watched, self.held = pieces[number[::5]], pieces[number[number % 5 > 0]]


def byte_pairs(cache, texts, vocab) -> str:
    """The path of a tokenizer trained on the texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    digest = hashlib.sha256("".join(texts).encode()).hexdigest()[:12]
    path = Path(cache) / f"byte-pairs-{vocab}-{digest}.json"
    if not path.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=[END_OF_TEXT[1]], show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
        tokenizer.train_from_iterator(texts, trainer)
        with replacing(path) as temporary:
            tokenizer.save(str(temporary))
    return str(path)


class Batch(NamedTuple):
    """One of a training run's: tokens (B, PROMPT + RESPONSE), those of the responses again (B * RESPONSE) with -100
    behind the end of a text, and a generator that is this step's own."""

    step: int
    inputs: Tensor
    labels: Tensor
    noise: torch.Generator


def responses(logits: Tensor) -> Tensor:
    """The rows (B, T, V) that foretell the response, (B * RESPONSE, V): each stands one place before its token."""
    return logits[:, PROMPT - 1 : -1].flatten(0, 1)


def untrained(size, vocab, seed=0):
    return models.build(Config(seq_len=PROMPT + RESPONSE, seed=seed, **size), vocab, size["layers"])


class TextLab(Runs):
    """Runs of small language models, with AdamW."""

    CLIP = 1.0
    UNIT = PROMPT + RESPONSE, "tokens"

    def data(self) -> Text:
        self._data["text"] = self._data.get("text") or Text(self.cache)
        return self._data["text"]

    def batch(self, data, step, size):
        tokens = data[data.draw(self.rng("batches", step), size)]
        return Batch(step, tokens, self.labels(tokens).flatten(), self.noise(step))

    def optimizer(self, update):
        return torch.optim.AdamW(update.parameters, lr=update.lr, betas=(0.9, 0.95), weight_decay=0.01)

    def train(self, name, net, updates, *, steps=STEPS, size=SIZE, data=None, every=50, teacher=None):
        data = data or self.data().few
        return super().train(name, net, updates, steps=steps, size=size, data=data, every=every, teacher=teacher)

    def answers(self, net, data):
        """Those of the responses' tokens."""
        x = self.data().watched
        logits = responses(y.logits) if hasattr(y := net(x), "logits") else y
        return logits.argmax(-1)[self.labels(x).flatten() != -100]

    def teacher(self, seed: int | None = None, steps=1200):
        """Trained once for all recipes."""
        return frozen(self._reader("teacher", TEACHER, self.teacher_seeds()[0] if seed is None else seed, steps))

    def student(self):
        """Every student of a seed starts from the same weights: those of one that has read the text for a while."""
        return self._reader("student", STUDENT, self.seed, 400)

    def _reader(self, name, size, seed, steps, lr=3e-3):
        text = self.data()
        net = untrained(size, text.vocab, seed)
        key = hashlib.sha256(json.dumps([text.whole.key, size, seed, steps, lr]).encode()).hexdigest()[:12]

        def loss(batch):
            logits = net(input_ids=batch.inputs[:, :-1]).logits
            return kd.CrossEntropyLoss()(logits.flatten(0, 1), labels=batch.inputs[:, 1:].flatten())

        updates = [Update(loss, list(net.parameters()), lr)]
        return self.shared(seed).train(f"text-{name}-{key}", net, updates, steps=steps, data=text.whole)

    def labels(self, tokens) -> Tensor:
        """The responses (B, RESPONSE) as far as they count."""
        found = tokens[:, PROMPT:]
        end = (found == self.data().end).long()
        return found.masked_fill(end.cumsum(1) > end, -100)

    def distil(self, name, loss, tokens=None, *, net=None, steps=STEPS):
        """A student trained with loss(student_logits, teacher_logits, labels) on the rows of the responses; of
        tokens(net, batch), which both models read, or of the text's own."""
        net, teacher = net or self.student(), self.teacher()

        def write(batch):
            assert tokens is not None
            x = tokens(net, batch)
            return batch._replace(inputs=x, labels=self.labels(x).flatten())

        def compare(batch):
            with torch.no_grad():
                t = responses(teacher(input_ids=batch.inputs).logits)
            return loss(responses(net(input_ids=batch.inputs).logits), t, batch.labels)

        update = Update(compare, list(net.parameters()), LR, prepare=write if tokens else None)
        return self.train(name, net, [update], steps=steps, teacher=teacher)

    def written(self, net, tokens, noise, taste=AS_IS, judge: Judge | None = None):
        """The prompts with responses by the net, judged or not."""
        u = torch.rand(len(tokens), RESPONSE, 2, generator=noise)
        return respond(net, tokens[:, :PROMPT], u, taste, judge)

    @torch.no_grad()
    def cross_entropy(self, net, tokens) -> float:
        logits = responses(net(input_ids=tokens).logits)
        return kd.CrossEntropyLoss()(logits, labels=self.labels(tokens).flatten()).item()

    def figures(self, arm: str, net, taste=AS_IS) -> dict[str, float]:
        """{arm: ..., arm, given: ...} as FIGURE says; the continuations are drawn by `taste`."""
        held = self.data().held
        own = self.written(net.eval(), held, torch.Generator().manual_seed(0), taste)
        return {arm: self._acceptance(net, own), f"{arm}, given": self._acceptance(net, held)}

    def _acceptance(self, net, tokens):
        labels = torch.cat((tokens.new_full((len(tokens), PROMPT - 1), -100), self.labels(tokens)), 1)
        return 100 * evaluate({"": net}, self.teacher(), tokens[:, :-1], labels)[""]["acceptance"]
