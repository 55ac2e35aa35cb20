"""`kdkernels probe`: how a student deviates from its teacher. [Nagarajan et al. 2023, On student-teacher deviations]

With c the teacher's first choice of a row, X = logit(p_c) and Y = logit(q_c): a slope of Y on X above 1 says that the
student exaggerates how sure the teacher is. Residuals of that line, and Y - X, are given for the fifth of the rows with
the smallest X, that with the largest, and the rest. Beside them, of both: cross-entropy, accuracy, expected calibration
error (15 bins of the largest probability), entropy, Renyi entropy, and the conditional mutual information I(X; Y^ | Y),
the mean KL of a row's distribution from the mean of those with its label, over the 100 most frequent labels.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kdkernels as kd

from .. import files
from . import probed, report
from .config import UserError
from .distill import need_extra

TAIL, BINS, LABELS = 0.2, 15, 100
OF_EACH = ("cross_entropy", "accuracy", "ece", "entropy", "renyi_entropy", "cmi")


def log_odds(x: Tensor, c: Tensor) -> Tensor:
    """log(p_c / (1 - p_c)), p = softmax(x), from x (N, V) and c (N,): the label's logit less the others' partition."""
    return (x.gather(1, c[:, None])[:, 0] - x.scatter(1, c[:, None], -math.inf).logsumexp(1)).double()


def fit(x: Tensor, y: Tensor) -> tuple[float, float]:
    """The least-squares line of y on x: slope and intercept."""
    apart = x - x.mean()
    slope = (apart * y).sum() / apart.square().sum()
    return slope.item(), (y.mean() - slope * x.mean()).item()


def calibration_error(sure: Tensor, right: Tensor) -> tuple[float, list[tuple[float, float, int]]]:
    """sum over bins of their share x |mean confidence - accuracy|; -> it and (confidence, accuracy, rows) of each."""
    place, bins, error = (sure * BINS).long().clamp(max=BINS - 1), [], 0.0
    for k in range(BINS):
        inside = place == k
        if count := int(inside.sum()):
            bins.append((sure[inside].mean().item(), right[inside].mean().item(), count))
            error += count / len(sure) * abs(bins[-1][0] - bins[-1][1])
    return error, bins


class Information:
    """I(X; Y^ | Y) from rows that come a few at a time: the entropy of the mean less the mean entropy, by label."""

    def __init__(self, labels: Tensor):
        found, counts = labels.unique(return_counts=True)
        self.labels = found[counts.argsort(descending=True, stable=True)[:LABELS]].sort().values
        self.total, self.entropy = torch.zeros(()), 0.0
        self.counts = torch.zeros(len(self.labels), dtype=torch.float64)

    def add(self, p: Tensor, labels: Tensor, entropy: Tensor):
        place = torch.searchsorted(self.labels, labels).clamp(max=len(self.labels) - 1)
        kept = self.labels[place] == labels
        if not self.total.ndim:
            self.total = p.new_zeros(len(self.labels), p.shape[1], dtype=torch.float64)
        self.total.index_add_(0, place[kept], p[kept].double())
        self.counts.index_add_(0, place[kept], torch.ones(int(kept.sum()), dtype=torch.float64))
        self.entropy += entropy[kept].sum().item()

    def value(self) -> float:
        of_means = torch.special.entr(self.total / self.counts[:, None]).sum(1)
        return max(0.0, ((of_means * self.counts).sum().item() - self.entropy) / self.counts.sum().item())


def rows_of(student: Tensor, teacher: Tensor, labels: Tensor, alpha: float) -> dict[str, Tensor]:
    """Of each row of logits, (N,)."""
    kl, seen = kd.ForwardKLLoss(reduction="none").with_metrics(student, teacher, labels)
    c = teacher.argmax(1)
    found: dict[str, Any] = {"kl": kl, "agreement": seen.top1_agreement, "acceptance": seen.acceptance,
                             "x": log_odds(teacher, c), "y": log_odds(student, c)}  # fmt: skip
    for side, z in (("student", student), ("teacher", teacher)):
        top, lse, entropy = z.max(1), getattr(seen, f"{side}_lse"), getattr(seen, f"{side}_entropy")
        found |= {f"{side} entropy": entropy, f"{side} sure": (top.values.double() - lse).exp().clamp(max=1.0),
                  f"{side} accuracy": top.indices == labels,
                  f"{side} cross_entropy": lse - z.gather(1, labels[:, None])[:, 0].double(),
                  f"{side} renyi_entropy": kd.power_sum(z, alpha).log() / (1 - alpha)}  # fmt: skip
    return {name: value.double() for name, value in found.items()}


@torch.no_grad()
def measure(batches, labels: Tensor, alpha: float) -> tuple[dict, dict[str, Tensor]]:
    """-> the figures, and the rows they are of.

    batches: (student logits (N, V), teacher logits, labels (N,)), a few rows at a time; labels: all of them.
    """
    parts, means = [], {side: Information(labels) for side in ("student", "teacher")}
    for student, teacher, y in batches:
        parts.append(rows_of(student, teacher, y, alpha))
        for side, z in (("student", student), ("teacher", teacher)):
            means[side].add(z.softmax(1), y, parts[-1][f"{side} entropy"])
    rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    x, y = rows["x"], rows["y"]
    slope, intercept = fit(x, y)
    rows["residual"] = y - slope * x - intercept
    low, high = torch.quantile(x, torch.tensor([TAIL, 1 - TAIL], dtype=x.dtype))
    tails = {"low": x <= low, "middle": (x > low) & (x < high), "high": x >= high}
    figures: dict[str, Any] = {"rows": len(x), "slope": slope, "intercept": intercept}
    figures |= {name: rows[name].mean().item() for name in ("agreement", "acceptance", "kl")}
    means_of = {"residual": rows["residual"], "y_minus_x": y - x}
    figures["tails"] = {name: {"rows": int(at.sum())} | {k: v[at].mean().item() for k, v in means_of.items()}
                        for name, at in tails.items() if at.any()}  # fmt: skip
    for side in means:
        ece, bins = calibration_error(rows[f"{side} sure"], rows[f"{side} accuracy"])
        own = {name: rows[f"{side} {name}"].mean().item() for name in OF_EACH if f"{side} {name}" in rows}
        figures[side] = own | {"ece": ece, "cmi": means[side].value(), "calibration": bins}
    return figures, rows


def show(name: str, figures: dict):
    line = f"{figures['slope']:.3f} logit(p_c) {figures['intercept']:+.3f}"
    title = f"{name}: logit(q_c) = {line}, {figures['rows']} rows"
    lines = [[key, f"{figures[key]:.4f}", ""] for key in ("agreement", "acceptance", "kl")]
    lines += [[key, *(f"{figures[side][key]:.4f}" for side in ("student", "teacher"))] for key in OF_EACH]
    report.print_table(title, ["", "student", "teacher"], lines)
    tails = [[tail, str(one["rows"]), f"{one['residual']:+.4f}", f"{one['y_minus_x']:+.4f}"]
             for tail, one in figures["tails"].items()]  # fmt: skip
    report.print_table(f"{name}: by the teacher's confidence", ["tail", "rows", "residual", "Y - X"], tails)


def draw(name: str, figures: dict, rows: dict[str, Tensor], path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(18, 4))
    ends = torch.stack((rows["x"].min(), rows["x"].max()))
    axes[0].hexbin(rows["x"], rows["y"], gridsize=50, bins="log", cmap="Blues", mincnt=1)
    axes[0].plot(ends, ends, color="black", ls=":", label="the teacher")
    axes[0].plot(ends, figures["slope"] * ends + figures["intercept"], color="tab:red",
                 label=f"slope {figures['slope']:.2f}")  # fmt: skip
    axes[0].set(xlabel="logit(p_c)", ylabel="logit(q_c)", title=name)
    places = rows["x"].argsort().tensor_split(10)
    axes[1].bar(range(1, 1 + len(places)), [rows["residual"][at].mean().item() for at in places])
    axes[1].set(xlabel="tenth of the rows, by logit(p_c)", title="residual of logit(q_c)")
    for side, colour in (("student", "tab:blue"), ("teacher", "tab:green")):
        sure, right, _ = zip(*figures[side]["calibration"], strict=True)
        axes[2].plot(sure, right, marker=".", color=colour, label=f"{side}, ECE {figures[side]['ece']:.3f}")
        axes[3].hist(rows[f"{side} entropy"], bins=40, histtype="step", color=colour, label=side)
    axes[2].plot((0, 1), (0, 1), color="black", ls=":")
    axes[2].set(xlabel="largest probability", title="accuracy")
    axes[3].set(xlabel="entropy, nats", title="rows")
    for axis in axes[[0, 2, 3]]:
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)


def command(options) -> int:
    """The job of `kdkernels probe`; writes OUT/probe.json and OUT/<student>.png."""
    paths = [Path(path) for path in options.paths]
    if options.tokens < 1:
        raise UserError(f"--tokens must be at least 1, got {options.tokens}")
    if not (options.alpha > 0 and options.alpha != 1 and math.isfinite(options.alpha)):
        raise UserError(f"--alpha must be above 0 and not 1, got {options.alpha:g}")
    need_extra("sklearn")
    if len(paths) == 2:
        found = probed.of_files(paths[0], paths[1], options.tokens)
    elif len(paths) == 1:
        found = probed.of_run(paths[0], options.tokens)
    else:
        raise UserError(f"probe takes a run folder, or a student's and a teacher's file, got {len(paths)} paths")
    out = Path(options.out or (paths[0] if len(paths) == 1 else paths[0].parent) / "probe")
    saved = {}
    for name, (batches, labels) in found.items():
        figures, rows = measure(batches, labels, options.alpha)
        saved[name] = figures | {"alpha": options.alpha}
        show(name, figures)
        with files.replacing(out / f"{name}.png") as temporary:
            draw(name, figures, rows, temporary)
    files.write_json(out / "probe.json", saved)
    print(f"in {out}", flush=True)
    return 0
