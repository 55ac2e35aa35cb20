"""Backends against the reference on rows made to break them: every loss, one of them and one pair of rows an example.

`pytest tests/test_fuzz.py --hypothesis-profile long` runs 20,000 of them and more.
"""

import pytest
import textbook
import textbook_ranks
import torch
from accuracy import BF16, F16, F32, F64, has_kernels
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

import kdkernels as kd

ULPS = 256  # as in test_properties.py: these are identities between two runs
WIDE = 2**18 + 1
EXAMPLES = settings.default.max_examples


def of_groups(V):
    return kd.GroupedKLLoss(torch.arange(V) % 3, between=0.5, within=2.0)


def losses() -> dict:
    """Name -> V -> the loss."""
    made = {str(case): (case.name, case.options) for case in (*textbook.CASES, *textbook_ranks.CASES)}
    made |= {f"{n} {o}": (n, o) for n, o in [
        ("DISTLoss", dict(temperature=2.0)), ("PearsonLoss", dict(ce_weight=0.5)),
        ("ULDLoss", {}), ("ULDLoss", dict(temperature=0.5, ce_weight=1.0))]}  # fmt: skip
    found = {key: lambda V, n=name, o=options: getattr(kd, n)(**o) for key, (name, options) in made.items()}
    found = {key: make for key, make in found.items() if not key.startswith("GroupedKLLoss-between")}
    mixed = lambda V: 0.5 * kd.ForwardKLLoss(temperature=2.0) + kd.SpearmanLoss(top_k=5)  # noqa: E731
    summed = lambda V: 0.7 * kd.ForwardKLLoss() + 0.3 * kd.JSDLoss() + kd.CrossEntropyLoss()  # noqa: E731
    return found | {"GroupedKLLoss": of_groups, "MixedSumLoss": mixed, "SumLoss": summed}


LOSSES = losses()
ON_CUDA = [str(case) for case in textbook.CASES if has_kernels(case, "cuda") and str(case) in LOSSES]
OF_BATCHES = "DISTLoss"
SCALE_FREE = ("PearsonLoss", "SpearmanLoss", "KendallLoss", "CMKDLoss", "DISTLoss", "MixedSumLoss")
SCALES = {"huge": 3e3, "giant": 1e30, "tiny": 1e-20, "subnormal": 1e-40, "constant": 0.0, "zeros": 0.0}
KINDS = ["plain", "plain", "huge", "giant", "tiny", "subnormal", "tied", "constant", "peak", "zeros"]


def row_pair(kind, n, v, g):
    x = torch.randn(2, n, v, generator=g, dtype=F64)
    if kind == "peak":
        at, by = torch.randint(v, (2, n, 1), generator=g), torch.full((2, n, 1), 900.0, dtype=F64)
        return x.scatter_add(-1, at, by)
    x = SCALES.get(kind, 2.0) * x + (7.0 if kind == "constant" else 0.0)
    return x.round() if kind == "tied" else x


def laid_out(x, how):
    """The same numbers in other strides."""
    if how == "transposed":
        return x.T.contiguous().T
    if how == "every other":
        return torch.stack((x, x.new_full(x.shape, torch.nan)), -1).flatten(-2)[:, ::2]
    if how == "a slice":
        return torch.cat((x.new_full((len(x), 3), torch.nan), x, x), -1)[:, 3 : 3 + x.shape[-1]]
    return x


@st.composite
def examples(draw, widths, dtypes, most_rows, names=sorted(LOSSES)):  # noqa: B008
    """-> name, student, teacher, labels."""
    n, v = draw(st.integers(0, most_rows)), draw(st.sampled_from(widths))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kinds = [draw(st.sampled_from(KINDS)) for _ in "st"]
    damage = draw(st.sampled_from(["none", "none", "none", "holes", "holes apart", "nan", "inf", "dead row"]))
    pair = [row_pair(kind, n, v, g)[side] for side, kind in enumerate(kinds)]
    if n and damage.startswith("holes"):
        hole = torch.rand(2, n, v, generator=g) < 0.3
        pair = [x.masked_fill(hole[side if "apart" in damage else 0], -torch.inf) for side, x in enumerate(pair)]
    elif n and damage != "none":
        side, row, at = draw(st.integers(0, 1)), draw(st.integers(0, n - 1)), draw(st.integers(0, v - 1))
        if damage == "dead row":
            pair[0][row] = pair[1][row] = -torch.inf
        else:
            pair[side][row, at] = torch.nan if damage == "nan" else torch.inf
    pair = [laid_out(x.to(draw(st.sampled_from(dtypes))), draw(st.sampled_from(LAYOUTS))) for x in pair]
    if n and draw(st.integers(0, 4)) == 0:
        pair[1] = pair[1][:1].expand(n, v)
    labels = torch.randint(v, (n,), generator=g)
    labels[torch.rand(n, generator=g) < 0.2] = -100
    return draw(st.sampled_from(names)), *pair, labels


LAYOUTS = ["contiguous", "contiguous", "transposed", "every other", "a slice"]


def run(name, backend, s, t, y):
    """-> value (per row where the loss has one), gradient."""
    loss = LOSSES[name](s.shape[-1])
    if not name.startswith(OF_BATCHES):
        loss.reduction = "none"
    s = s.detach().requires_grad_()
    with kd.use_backend(backend):
        value = loss(s, None if loss_without_teacher(loss) else t, y)
        value.sum().backward()
    return value.detach(), s.grad


def loss_without_teacher(loss):
    return isinstance(loss, (kd.CrossEntropyLoss, kd.BrierLoss, kd.LogitMSELoss))


def spread(x):
    """The largest finite number of x, as a size."""
    x = x[x.isfinite()]
    return x.abs().max().item() if x.numel() else 0.0


def slope(name, s, t):
    """How much a loss that knows no scale makes of a rounding of logits: one over their least deviation."""
    if "standardize" not in name and not name.startswith(SCALE_FREE):
        return 0.0
    rows = [x.double() for x in (s, t)]
    least = [(x - x.mean(-1, keepdim=True)).norm(dim=-1) for x in (r.masked_fill(~r.isfinite(), 0.0) for r in rows)]
    return 1 / max(min((x[x > 0].min().item() for x in least if (x > 0).any()), default=1.0), 1e-300)


def terms(name, V):
    """What the terms that the loss is a difference of add up to: powers of V equal probabilities."""
    loss = LOSSES[name](V)
    return V ** max(0, 1 - loss.alpha - loss.beta) if isinstance(loss, kd.AlphaBetaLoss) else 1


def at_a_kink(name, s, t):
    """Whether a sum of |q - p| has classes, or sorted neighbours, equal but for rounding: its slope jumps there."""
    if not name.startswith(("ULDLoss", "TVDLoss")):
        return False
    T = LOSSES[name](s.shape[-1]).temperature
    q, p = ((x.double() / T).log_softmax(-1) for x in (s, t))
    if name.startswith("TVDLoss"):
        return ((q - p).abs() < 1e-5).any().item()
    q, p, s, t = (x.sort().values for x in (q, p, s.double(), t.double()))
    tied = [(log.diff() < 1e-5) & (x.diff() != 0) for log, x in ((q, s), (p, t))]
    return ((q - p).abs() < 1e-5).any().item() or any(x.any().item() for x in tied)


def check(backend, name, s, t, y):
    """The same rows NaN and infinite; elsewhere equal but for the rounding of logits of this size and of results."""
    got, want = run(name, backend, s, t, y), run(name, "reference", s, t, y)
    where = (name, tuple(s.shape), s.dtype, t.dtype)
    dtype = F64 if backend == "cpu" and s.dtype == F64 else F32
    logits = 1 + max(spread(s), spread(t))
    reached = logits < (150 if dtype == F64 else 20)  # no probability underflows that meets an infinity
    size = max(1.0, spread(want[0]), spread(want[1])) * (logits + slope(name, s, t)) * terms(name, s.shape[-1])
    if want[0].dim():  # NaN and +inf make a row NaN, unless its label leaves it out
        seen = [s] if loss_without_teacher(LOSSES[name](s.shape[-1])) else [s, t]
        spoilt = sum((~(x < torch.inf)).any(-1) for x in seen) > 0
        assert not (spoilt & (y != -100) & ~want[0].isnan()).any(), (where, want[0])
    for what, a, b in zip(("value", "gradient"), got, want, strict=True):
        defined = torch.ones_like(b, dtype=torch.bool)
        if what == "gradient" and at_a_kink(name, s, t):
            continue
        if what == "gradient":  # of a loss that is infinite there is none
            defined &= want[0].isfinite().view(-1, 1) if want[0].dim() else want[0].isfinite()
        assert torch.equal(a.isnan() & defined, b.isnan() & defined), (where, what, a, b)
        one = 2 * torch.finfo(a.dtype).eps * max(spread(b), torch.finfo(a.dtype).smallest_normal)
        bound = ULPS * torch.finfo(dtype).eps * size + one
        if (reached or what == "gradient") and bound < torch.finfo(a.dtype).max:  # else a rounding may overflow
            assert torch.equal(a.isinf() & defined, b.isinf() & defined), (where, what, a, b)
        both = defined & a.isfinite() & b.isfinite()
        off = (a.double() - b.double())[both].abs().max().item() if both.any() else 0.0
        assert off <= bound, (where, what, off, bound, a, b)


# Of the only class that counts the gradient is 0; of terms of 1e30 the reference leaves 1e14, and float16 overflows.
GIANTS = ("AlphaBetaLoss-alpha=0.0-beta=0.8", torch.tensor([[-0.4868, 899.5, -0.5581]], dtype=F16),
          torch.tensor([[6.675e29, -1.974e29, 1.943e30]], dtype=F64), torch.tensor([0]))  # fmt: skip
# A difference of sums that are 257 each.
FLAT = ("AlphaBetaLoss-alpha=0.5-beta=-0.5", torch.full((1, 257), 1e-20, dtype=F64),
        torch.full((1, 257), 7.0, dtype=F64), torch.tensor([0]))  # fmt: skip


@settings(max_examples=40 * EXAMPLES)
@example(GIANTS)
@example(FLAT)
@given(examples([1, 2, 3, 5, 17, 33, 64, 257, 1030], [F64, F32, BF16, F16], 4))
def test_cpu_against_reference(example):
    check("cpu", *example)


@settings(max_examples=EXAMPLES // 2, phases=[Phase.generate])
@given(examples([WIDE], [F32, BF16, F16], 2))
def test_cpu_against_reference_on_wide_rows(example):
    check("cpu", *example)


@settings(max_examples=EXAMPLES // 2, phases=[Phase.generate])
@given(examples([1, 2, 5, 33], [F32, BF16], 2))
def test_triton_against_reference(example):
    check("triton", *example)


@settings(max_examples=4 * EXAMPLES, phases=[Phase.generate])
@given(examples([1, 2, 5, 33, 257, 1030], [F32, BF16, F16], 2, ON_CUDA))
def test_cuda_against_reference(example):
    check("cuda", *example)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name, kinds", [
    ("PearsonLoss", ("giant", "giant")), ("PearsonLoss", ("subnormal", "plain")),
    ("KendallLoss-mode=shifts-shifts=5-tau=0.5-seed=3", ("subnormal", "plain")),
    ("SpearmanLoss-tau=0.01-exact=True", ("subnormal", "plain")),
    ("ForwardKLLoss-standardize=True-temperature=2.0-t_squared=True", ("giant", "tiny"))])  # fmt: skip
def test_squares_and_inverses_that_leave_float32(backend, dtype, name, kinds):
    g = torch.Generator().manual_seed(1)
    s, t = (row_pair(kind, 2, 33, g)[0].to(dtype) for kind in kinds)
    check(backend, name, s, t, torch.tensor([3, 5]))
