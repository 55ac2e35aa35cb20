"""The kernels behind merged outcomes against their definition in torch, tile by tile and dtype by dtype."""

import math

import pytest
import torch
from accuracy import BF16, F16, F32, F64

import kdkernels as kd
from kdkernels.buckets import Outcomes, Part

TILE = 2048


def rows(n, v, dtype, scale=3.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    s = (scale * torch.randn(n, v, generator=g)).to(dtype)
    classes = torch.rand(n, v, generator=g).topk(min(9, v // 2)).indices
    return s, classes, torch.randint(v, (n,), generator=g)


KERNELS = [("cpu", dtype) for dtype in (F64, F32, BF16, F16)] + [("triton", F32), ("triton", BF16), ("triton", F16)]
native = pytest.mark.parametrize("kernels, dtype", KERNELS)


def both(s, vocab, mask, *parts, kernels):
    """[(outcomes of each part, gradient of s, size of its terms)] of the kernels and of the definition, in float64."""
    found = []
    for backend in (kernels, "reference"):
        before = kd.backends.calls[kernels, "bucket"]
        with kd.use_backend(backend):
            # In the dtype's own arithmetic the definition of what is rounded, in float64 that of the rest.
            leaf = (s.double() if backend == "reference" else s).detach().requires_grad_()
            wide = F64 if backend == "reference" or s.dtype == F64 else F32
            out = Outcomes.apply(leaf, vocab, mask, wide, False, *parts)
            g = torch.Generator().manual_seed(1)
            weights = [torch.randn(o.shape, generator=g, dtype=F64) for o in out]
            for w in weights:
                w[0] = 0.0  # a row nobody asks about
            grads = []
            for ws in (weights, [w.abs() for w in weights]):  # the second: the size of the terms, which may cancel
                total = sum((o.masked_fill(o.isinf(), 0.0).double() * w).sum() for o, w in zip(out, ws, strict=True))
                grads.append(torch.autograd.grad(total, leaf, retain_graph=True)[0].double())
            found.append(([o.detach().double() for o in out], *grads))
        assert (kd.backends.calls[kernels, "bucket"] - before == 1) == (backend == kernels)
    return found


def check(s, vocab, mask, *parts, kernels="cpu"):
    (out, ds, _), (want, by_want, terms) = both(s, vocab, mask, *parts, kernels=kernels)
    step = torch.finfo(F64 if s.dtype == F64 else F32).eps
    for a, b in zip(out, want, strict=True):
        finite = b.isfinite()
        assert torch.equal(a[~finite], b[~finite])
        size = max(1.0, b[finite].abs().max().item())
        assert (a[finite] - b[finite]).abs().max() <= 4 * step * size
    # exp of the difference of a logit and a log-sum-exp, over a temperature >= 1/2 or so, then rounded
    exponent = 1 + 2 * s[s.isfinite()].abs().max().item() + math.log(vocab)
    bound = terms * (torch.finfo(s.dtype).eps + 8 * step * exponent) + 4 * torch.finfo(s.dtype).tiny
    bound = bound + (2**-24 if s.dtype == F16 else 0)  # its subnormal numbers
    assert ((ds - by_want).abs() <= bound).all(), ((ds - by_want).abs() - bound).max()


@native
@pytest.mark.parametrize("v", [3, 20, 33, 700, TILE, TILE + 1, 3 * TILE + 17])
@pytest.mark.parametrize("kind", ["tail", "entropy", "both", "neither"])
def test_dtypes_and_widths(kernels, dtype, v, kind):
    s, classes, labels = rows(5, v, dtype)
    labels[1], labels[2] = classes[1, 0], -1
    T = torch.linspace(0.5, 2.0, 5, dtype=F64)[:, None]
    for inverse in (torch.ones(1, 1, dtype=F64), 1 / T):
        first = Part(classes, None if kind in ("entropy", "neither") else inverse)
        entropy = [] if kind in ("tail", "neither") else [Part(labels[:, None], torch.ones(1, 1, dtype=F64))]
        check(s, v, None, first, *entropy, kernels=kernels)


@native
def test_masks_padding_and_impossible_classes(kernels, dtype):
    s, classes, labels = rows(6, 2 * TILE + 5, dtype)
    one = torch.ones(1, 1, dtype=F64)
    mask = torch.rand(2 * TILE, generator=torch.Generator().manual_seed(2)) < 0.7
    s[1, ::3], s[2, classes[2, :4]], s[3, :TILE] = -torch.inf, -torch.inf, -torch.inf
    s[:, 2 * TILE :] = torch.nan  # behind the vocabulary
    keep = classes.clamp(max=2 * TILE - 1)
    keep = torch.where(torch.arange(9) < torch.arange(1, 7)[:, None], keep, -1)
    for some in (None, mask):
        check(s, 2 * TILE, some, Part(keep, one), Part(labels.clamp(max=2 * TILE - 1)[:, None], one), kernels=kernels)


@native
def test_rows_of_which_nothing_is_left(kernels, dtype):
    one = torch.ones(1, 1, dtype=F64)
    s = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=F64).to(dtype)
    s[1] = -torch.inf
    s[2, 4:] = -torch.inf
    classes = torch.tensor([[0, 1, 2, 3]]).repeat(3, 1)
    check(s, 8, None, Part(classes, one), Part(torch.tensor([[0], [0], [5]]), one), kernels=kernels)


@pytest.mark.parametrize("scale", [1e-3, 30.0, 300.0])
@pytest.mark.parametrize("kernels, dtype", [("cpu", F64), ("cpu", F32), ("triton", F32)])
def test_the_classes_apart_may_have_nearly_everything(scale, kernels, dtype):
    """Their logits are the largest: nothing is left of a difference from the whole sum."""
    s, _, labels = rows(6, 3 * TILE, dtype, scale)
    check(s, 3 * TILE, None, Part(s.topk(9).indices, torch.full((1, 1), 0.5, dtype=F64)),
          Part(labels[:, None], torch.ones(1, 1, dtype=F64)), kernels=kernels)  # fmt: skip


@pytest.mark.parametrize("kernels", ["cpu", "triton"])
def test_rows_of_logits_with_gaps(kernels):
    s, classes, labels = rows(12, 701, F32)
    part, kept = s.view(4, 3, 701)[:, 1:, :690], classes.view(4, 3, 9)[:, 1:].reshape(-1, 9).clamp(max=680)
    kept = torch.where((kept[:, :, None] == kept[:, None]).tril(-1).any(-1), -1, kept)
    check(part, 681, None, Part(kept, torch.ones(1, 1, dtype=F64)),
          Part(labels.view(4, 3)[:, 1:].reshape(-1, 1).clamp(max=680), torch.ones(1, 1, dtype=F64)), kernels=kernels)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_gradient_larger_than_the_caches_and_strided_logits(dtype):
    s, classes, labels = rows(120, 40001, dtype)
    one = torch.ones(1, 1, dtype=F64)
    check(s, 40001, None, Part(classes, one), Part(labels[:, None], one))
    part = s.view(4, 30, 40001)[:, 1:, :30000]
    kept = classes.view(4, 30, 9)[:, 1:].reshape(-1, 9).remainder(30000)
    twice = kept.sort(-1).values
    assert (twice[:, 1:] != twice[:, :-1]).all()
    check(part, 29999, None, Part(kept.clamp(max=29998), one))


def test_the_same_bits_for_any_number_of_threads():
    s, classes, _ = rows(200, 5000, F32)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            leaf = s.clone().requires_grad_()
            (out,) = Outcomes.apply(leaf, 5000, None, F32, False, Part(classes, torch.ones(1, 1, dtype=F64)))
            found.append((out, torch.autograd.grad(out.pow(2).sum(), leaf)[0]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
