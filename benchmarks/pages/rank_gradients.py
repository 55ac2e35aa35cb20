"""Figures and numbers of rank_gradients.md, from the logits of the trainer's language model.

    python -m benchmarks.pages.rank_gradients    some 5 minutes on one core, apart from training the teacher
    python -m benchmarks.pages.rank_gradients --tokens 128 --out /tmp/page     fewer rows, elsewhere

Teacher, student and text are those of `python -m benchmarks.rank_distillation`; the rows are held-out positions, the
student is looked at before training and after --steps steps with KL alone.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

import kdkernels as kd
from kdkernels.trainer.config import Config

from ..harness import commit, machine
from ..rank_distillation import language_model, models, train
from . import drawings
from .permutahedron import one_block_from, one_minus_correlation, soft_ranks, spearman_gradient

HERE = Path(__file__).parent
LOSSES = {
    "KL": kd.ForwardKLLoss(), "Spearman": kd.SpearmanLoss(), "Spearman top 1024": kd.SpearmanLoss(top_k=1024),
    "Spearman top 128": kd.SpearmanLoss(top_k=128), "Kendall top 128": kd.KendallLoss(),
    "Plackett-Luce": kd.PlackettLuceLoss(),
}  # fmt: skip
SCALES = (1, 2, 3, 4, 6, 8)
EPS = tuple(10.0 ** (k / 2) for k in range(-14, 3))
HEAD = 100


def gradient(loss, s, t):
    """(N, V): the gradient of each row's own loss."""
    return loss.value_and_grad(s, t, num_items=1)[1]


def shares(loss, s, t) -> dict:
    """Of |g|^2 of a row, what is at the teacher's first k classes: medians over rows."""
    width = s.shape[-1]
    places = np.unique([10, HEAD, *np.geomspace(1, width, 80).round().astype(int)])
    found = []
    for a, b in zip(s.split(32), t.split(32), strict=True):
        squares = gradient(loss, a, b).double().square().gather(-1, b.argsort(-1, descending=True)).cumsum(-1)
        found.append((squares / squares[:, -1:])[:, places - 1])
    return {"k": places.tolist(), "share": torch.cat(found).median(0).values.tolist()}


def norms(loss, s, t):
    parts = zip(s.split(64), t.split(64), strict=True)
    return torch.cat([gradient(loss, a, b).norm(dim=-1) for a, b in parts]).double()


def quantiles(x) -> list:
    return torch.quantile(x, torch.tensor([0.1, 0.5, 0.9], dtype=x.dtype)).tolist()


def weights(students: dict, t) -> dict:
    """||g of KL|| / ||g of the loss||, quantiles over rows: of each student, and of both logits multiplied."""
    found: dict = {}
    for name in ("Spearman", "Spearman top 128"):
        ratio = {when: norms(LOSSES["KL"], s, t) / norms(LOSSES[name], s, t) for when, s in students.items()}
        found[name] = {when: quantiles(x) for when, x in ratio.items()}
    s, few = next(iter(students.values())), slice(None, None, 4)
    for name in found:
        scaled = [(c * s[few], c * t[few]) for c in SCALES]
        found[name]["scaled"] = [quantiles(norms(LOSSES["KL"], *pair) / norms(LOSSES[name], *pair)) for pair in scaled]
    entropy = [torch.distributions.Categorical(logits=c * t[few]).entropy().median().item() for c in SCALES]
    return found | {"scales": list(SCALES), "teacher entropy": entropy}


def permutahedron(s, t) -> dict:
    """Of rows: blocks, cosine of the gradient with that of Pearson's correlation of the logits with the teacher's
    ranks, share of exact zeros at the teacher's first classes; medians over rows, for each eps."""
    found, least, same = [], [], []
    for own, other in zip(s.double().numpy(), t.double().numpy(), strict=True):
        ranks = kd.metrics.rankdata(torch.from_numpy(other)).numpy()
        pearson, head = one_minus_correlation(own, ranks)[1], np.argsort(-other)[:HEAD]
        row = []
        for eps in EPS:
            _, g, blocks = spearman_gradient(own, ranks, eps)
            size = np.linalg.norm(g)
            cosine = g @ pearson / size / np.linalg.norm(pearson) if size else 0.0
            row.append((blocks, cosine, (g[head] == 0).mean()))
        found.append(row)
        least.append(one_block_from(own))
        both = one_minus_correlation(soft_ranks(own, 1)[0], soft_ranks(other, 1)[0])[0]
        exact = kd.PearsonLoss()(torch.from_numpy(own)[None], torch.from_numpy(other)[None]).item()
        same.append(abs(both - exact))
    blocks, cosine, zeros = np.median(np.array(found), 0).T.tolist()
    return {"eps": list(EPS), "blocks": blocks, "cosine": cosine, "zeros": zeros, "one block from": np.median(least),
            "largest one block from": max(least), "both soft, against PearsonLoss": max(same)}  # fmt: skip


def lapsum(s, t) -> dict:
    """Cosine of SpearmanLoss(tau)'s gradient with Pearson's of the logits and the teacher's ranks: medians."""
    taus, pearson = tuple(10.0 ** (k / 2) for k in range(-6, 5)), []
    for own, other in zip(s.double().numpy(), t, strict=True):
        ranks = kd.metrics.rankdata(other).numpy()
        pearson.append(torch.from_numpy(one_minus_correlation(own, ranks)[1]))
    target = torch.stack(pearson)
    cosine = [torch.cosine_similarity(gradient(kd.SpearmanLoss(tau), s.double(), t), target).median() for tau in taus]
    return {"tau": list(taus), "cosine": [x.item() for x in cosine]}


def seen(cfg: Config, corpus) -> int:
    """How many different tokens the teacher's training batches have."""
    batches = (corpus.batch(0, step, cfg.teacher_batch) for step in range(cfg.teacher_steps))
    return len(torch.cat([x.flatten() for batch in batches for x in batch]).unique()) - 1  # less the ignored label


def one_position(corpus, inputs, s, t, position: int) -> dict:
    """What a figure of a single row shows."""
    sequence, place = divmod(position, inputs.shape[1])
    words = inputs[sequence, max(0, place - 15) : place + 1].tolist()
    order = t[position].argsort(descending=True)
    keep = np.unique(np.concatenate([np.arange(300), np.geomspace(300, len(order) - 1, 1500).round().astype(int)]))
    own, other = s[position][None], t[position][None]
    return {
        "text": corpus.tokenizer.decode(words), "rank": keep + 1, "s": own[0][order[keep]], "t": other[0][order[keep]],
        "first": [corpus.tokenizer.decode([i]) for i in order[:6].tolist()],
        "p": other[0].softmax(-1)[order[:6]].tolist(), "q": own[0].softmax(-1)[order[:6]].tolist(),
        "step": {name: -gradient(LOSSES[name], own, other)[0][order[keep]]
                 for name in ("KL", "Spearman", "Spearman top 128")},
    }  # fmt: skip


def measure(students: dict, t, rows: int) -> dict:
    before = next(iter(students.values()))
    some = slice(None, None, max(1, len(t) // rows))
    named = {name: {"share": shares(loss, before, t), "norm": quantiles(norms(loss, before, t))}
             for name, loss in LOSSES.items()}  # fmt: skip
    return {"losses": named, "weights": weights(students, t), "permutahedron": permutahedron(before[some], t[some]),
            "LapSum": lapsum(before[some], t[some])}  # fmt: skip


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pages.rank_gradients", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--tokens", type=int, default=512, help="held-out positions (default: 512)")
    parser.add_argument("--rows", type=int, default=16, help="of them for the permutahedron (default: 16)")
    parser.add_argument("--position", type=int, default=37, help="the one that is shown by itself (default: 37)")
    parser.add_argument("--steps", type=int, default=100, help="of the student (default: 100)")
    parser.add_argument("--threads", type=int, default=0, help="torch's threads (default: its own choice)")
    parser.add_argument("--out", type=Path, default=HERE, help="where the figures go (default: beside the page)")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args(arguments)
    found = commit()
    cfg = Config(steps=options.steps, threads=options.threads)
    corpus, teacher = language_model(cfg)
    inputs, _ = corpus.held_out(options.tokens)
    kl = kd.ForwardKLLoss()
    trained = train(cfg, corpus, teacher, {"KL": lambda s, t, labels, *_: kl(s, t, labels)}, "student")["KL"]
    with torch.no_grad():
        t, before, after = (models.logits_of(x, inputs) for x in (teacher, models.cut_student(cfg, teacher), trained))
    students = {"before training": before, f"after {cfg.steps} steps of KL": after}
    numbers = {"classes": t.shape[1], "seen": seen(cfg, corpus)} | measure(students, t, options.rows)
    options.out.mkdir(parents=True, exist_ok=True)
    drawings.draw(options.out, numbers, one_position(corpus, inputs, before, t, options.position))
    if options.json:
        about = {"machine": machine(), "commit": found, "rows": len(t)}
        options.json.write_text(json.dumps(about | numbers) + "\n")
    print(f"figures in {options.out}; {machine()}")


if __name__ == "__main__":
    main()
