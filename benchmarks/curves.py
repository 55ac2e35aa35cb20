"""Training curves of five recipes' losses by their fused kernels and by their textbook formulas, on the same batches.

    python -m benchmarks.curves

In float64 and in float32: where a rounding turns a ReLU or a maximum, the nets drift apart at once. In float32 that may
take less than a hundred steps; the curves in float64 say how near the losses themselves are.
"""

import argparse
from pathlib import Path

import torch

import kdkernels as kd
from kdkernels import files
from kdkernels.trainer import report
from kdkernels.trainer.config import Config
from kdkernels.trainer.lab import Lab, Update, logits_of
from kdkernels.trainer.recipes import abkd, mse_teacher, ttm, wttm

from .eager import textbook

STEPS = 200


def pairs():
    """{recipe: (fused, textbook)}, both loss(student_logits, teacher_logits, labels)."""
    labels_too = dict(ce_weight=1.0)
    hinton = textbook.Case("KDLoss", textbook.forward_kl, dict(alpha=0.9, temperature=4.0), textbook.kd_shared(0.9))
    own = textbook.Case("TTMLoss", textbook.ttm, dict(gamma=ttm.GAMMA, kd_weight=ttm.BETA) | labels_too)
    weighted = textbook.Case("WTTMLoss", textbook.wttm, dict(gamma=wttm.GAMMA, kd_weight=wttm.BETA) | labels_too)
    options = dict(alpha=0.8, beta=0.3, temperature=4.0, kd_weight=abkd.LAMBDA)
    divergence = textbook.Case("AlphaBetaLoss", textbook.alpha_beta, options | labels_too)
    squares, fused = textbook.Case("BrierLoss", textbook.brier, dict(kd_weight=mse_teacher.SCALE)), mse_teacher.error()
    return {
        "kd": (kd.KDLoss(alpha=0.9, temperature=4.0), hinton.loss), "ttm": (ttm.loss(), own.loss),
        "wttm": (wttm.loss(), weighted.loss), "abkd": (abkd.loss(0.8, 0.3), divergence.loss),
        "mse_teacher": (lambda s, t, y: fused(s, y), squares.loss),
    }  # fmt: skip


def train(lab, name, loss, teacher, dtype):
    """-> the curve of a student."""
    net, logits = lab.student().to(dtype), logits_of(teacher, lab.data()).to(dtype)
    update = Update(lambda b: loss(net(b.images.to(dtype)), logits[b.at], b.labels), list(net.parameters()))
    lab.train(name, net, [update], steps=STEPS)
    return lab.curves[name]


def measure(folder, cache, share=1.0):
    """{recipe: {dtype: {"fused": [loss of each step], "textbook": [...], "apart": the largest difference, "relative":
    the largest of the differences divided by the loss}}}."""
    torch.use_deterministic_algorithms(True)
    lab, found = Lab(folder, cache, 0, report.silent, share), {}
    teacher = lab.teacher()
    for name, both in pairs().items():
        found[name] = {}
        for dtype in ("float64", "float32"):
            one = {side: train(lab, f"{name}-{side}-{dtype}", loss, teacher, getattr(torch, dtype))
                   for side, loss in zip(("fused", "textbook"), both, strict=True)}  # fmt: skip
            apart = [abs(a - b) for a, b in zip(one["fused"], one["textbook"], strict=True)]
            relative = max(d / abs(b) for d, b in zip(apart, one["textbook"], strict=True))
            found[name][dtype] = one | {"apart": max(apart), "relative": relative}
            print(f"{name}, {dtype}: at most {max(apart):.2g} apart, {relative:.2g} of the loss", flush=True)
    return found


def draw(found, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(found), figsize=(4 * len(found), 6), sharex=True)
    for (name, kinds), (above, below) in zip(found.items(), axes.T, strict=True):
        above.plot(kinds["float32"]["textbook"], color="tab:gray", lw=2.5, label="textbook")
        above.plot(kinds["float32"]["fused"], color="tab:blue", lw=0.8, label="fused")
        above.set_title(f"{name} (float32)")
        for dtype, one in kinds.items():
            apart = [abs(a - b) for a, b in zip(one["fused"], one["textbook"], strict=True)]
            below.semilogy(apart, lw=0.8, label=f"{dtype}: at most {one['apart']:.1e}")
        below.legend(fontsize=8)
        below.set_xlabel("step")
    axes[0, 0].set_ylabel("training loss")
    axes[1, 0].set_ylabel("difference")
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)


def write(folder, cache, results, about, share=1.0):
    found = measure(folder, cache, share)
    files.write_json(results / "validation-curves.json", about | {"recipes": found})
    draw(found, results / "validation-curves.png")


def main():
    from .harness import about

    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/validation/curves"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="where the report goes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    write(options.out, Config().cache, options.results, about())


if __name__ == "__main__":
    main()
