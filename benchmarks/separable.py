"""Milliseconds of the separable losses, forward and backward, beside eager torch and torch.compile on the same formula.

    python -m benchmarks.separable          256 x 32000, float32 and bfloat16, one thread, medians taken in turns
"""

import torch

import kdkernels as kd

from . import eager
from .rows import interleaved

LOSSES = ("JSDLoss", "SkewKLLoss", "SkewReverseKLLoss", "TVDLoss", "ForwardKLLoss")


def measure(name: str, dtype: torch.dtype, shape=(256, 32000)) -> dict[str, float]:
    s, t = (3 * torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    s, out = s.requires_grad_(), torch.empty(shape, dtype=dtype)
    loss, (formula, _) = getattr(kd, name)(), eager.loss(name)
    torch.compiler.reset()
    compiled = torch.compile(formula)

    def step(function):
        s.grad = None
        function().backward()

    with kd.use_backend("cpu"):
        return interleaved({
            "kdkernels": lambda: step(lambda: loss(s, t)),
            "out= given": lambda: loss.value_and_grad(s.detach(), t, out=out),
            "eager": lambda: step(lambda: formula(s, t, None)),
            "compile": lambda: step(lambda: compiled(s, t, None)),
        })  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        for name in LOSSES:
            times = measure(name, dtype)
            ratios = ", ".join(f"{k} {v:.1f} ms ({v / times['kdkernels']:.1f}x)" for k, v in times.items())
            print(f"{name} {str(dtype).removeprefix('torch.')}: {ratios}", flush=True)


if __name__ == "__main__":
    main()
