"""Backends against float64 on rows made to break them: every loss, one of them and one pair of rows an example.

`python -m pytest tests/test_fuzz.py --hypothesis-profile long` runs 20,000 of them and more, and writes their number to
benchmarks/results/fuzz.json.
"""

from collections import Counter
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import pytest
import textbook
import textbook_ranks
import torch
from accuracy import BF16, F16, F32, F64, has_kernels
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

import kdkernels as kd
from benchmarks.harness import about, save

ROUNDINGS = 32  # of logits and of results, each by a unit in the last place, that a kernel may be away from float64
GIANT = 1e15  # beside logits of this size float64 has no digits after the point
WIDE = 2**18 + 1
EXAMPLES = settings.default.max_examples
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "fuzz.json"
counted: Counter = Counter()


@pytest.fixture(scope="module", autouse=True)
def record(request):
    start = about()
    yield
    if request.config.getoption("--hypothesis-profile") == "long":
        save(start | dict(examples=dict(counted), failed=request.session.testsfailed), RESULTS)


def of_groups(V):
    return kd.GroupedKLLoss(torch.arange(V) % 3, between=0.5, within=2.0)


def losses() -> dict:
    """Name -> V -> the loss."""
    made = {str(case): (case.name, case.options) for case in (*textbook.CASES, *textbook_ranks.CASES)}
    made |= {f"{n} {o}": (n, o) for n, o in [
        ("DISTLoss", dict(temperature=2.0)), ("PearsonLoss", dict(ce_weight=0.5)),
        ("ULDLoss", {}), ("ULDLoss", dict(temperature=0.5, ce_weight=1.0)), ("SinkhornLoss", {})]}  # fmt: skip
    found = {key: lambda V, n=name, o=options: getattr(kd, n)(**o) for key, (name, options) in made.items()}
    found = {key: make for key, make in found.items() if not key.startswith("GroupedKLLoss-between")}
    mixed = lambda V: 0.5 * kd.ForwardKLLoss(temperature=2.0) + kd.SpearmanLoss(top_k=5)  # noqa: E731
    summed = lambda V: 0.7 * kd.ForwardKLLoss() + 0.3 * kd.JSDLoss() + kd.CrossEntropyLoss()  # noqa: E731
    batches = lambda V: kd.LTKDLoss(torch.arange(V) % 3)  # noqa: E731
    return found | {"GroupedKLLoss": of_groups, "LTKDLoss": batches, "MixedSumLoss": mixed, "SumLoss": summed}


LOSSES = losses()
ON_CUDA = [str(case) for case in textbook.CASES if has_kernels(case, "cuda") and str(case) in LOSSES]
ON_TRITON = sorted(LOSSES.keys() - {"SinkhornLoss {}"})
OF_BATCHES = ("DISTLoss", "LTKDLoss", "SinkhornLoss")
# Each term has a gradient that is rounded.
OF_TERMS = ("DISTLoss", "PearsonLoss {", "ULDLoss {'t", "CMKDLoss", "MixedSumLoss")
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
        side = draw(st.integers(0, 1))
        pair[side] = pair[side][:1].expand(n, v)
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
    anyone = name.startswith("SinkhornLoss") and backend != "reference"  # torch's, with some kernels
    with nullcontext() if anyone else kd.use_backend(backend):
        value = loss(s, None if loss_without_teacher(loss) else t, y)
        value.sum().backward()
    return value.detach(), s.grad


def loss_without_teacher(loss):
    return isinstance(loss, (kd.CrossEntropyLoss, kd.BrierLoss, kd.LogitMSELoss))


def scale_free(name):
    return "standardize" in name or name.startswith(SCALE_FREE)


def terms(name, V):
    """What the terms that the loss is a difference of add up to: powers of V equal probabilities; or how much more a
    running log-sum over V classes rounds, one by one, in the reference."""
    loss = LOSSES[name](V)
    if isinstance(loss, kd.PlackettLuceLoss):
        return max(1, V**0.5 / ROUNDINGS)
    return V ** max(0, 1 - loss.alpha - loss.beta) if isinstance(loss, kd.AlphaBetaLoss) else 1


def largest(x, per_row=False):
    """The largest finite size, of all or of each row (N,); 0 where there is none."""
    x = x.where(x.isfinite(), 0.0).abs()
    return x.amax(-1) if per_row and x.dim() == 2 else x if per_row else x.max() if x.numel() else x.sum()


def moved(x, by, least):
    """Logits moved up and down by that part of their distance to the row's largest (and 1); equal ones stay equal."""
    far = (x - x.where(x.isfinite(), -torch.inf).amax(-1, keepdim=True)).abs()
    numbers, at = x.unique(return_inverse=True)
    part = 2 * torch.rand(numbers.shape, generator=torch.Generator().manual_seed(len(numbers)), dtype=F64) - 1
    return x + torch.where(x.isfinite(), by * part[at] * (far + least), 0.0)


def oracle(name, s, t, y, eps):
    """((value, gradient), how far each moves, in all or (N,), where logits are moved) in float64."""
    s, t, least = s.double(), t.double(), 0.0 if scale_free(name) else 1.0
    want = run(name, "reference", s, t, y)
    if name.startswith("ULD"):
        want = want[0], run(name, "reference", told_apart(s), t, y)[1]
    moves = [run(name, "reference", moved(s, by, least), moved(t, by_t, least), y)
             for by, by_t in ((eps, 0), (-eps, 0), (0, eps))]  # fmt: skip
    return want, [sum(largest(m[k] - want[k], want[0].dim() > 0) for m in moves) for k in (0, 1)]


def steepest(name, s):
    """(N,): 1, or how much of a change of a logit a loss that knows no scale sees: one over the row's deviation, or
    over the part of it that soft ranks are wide."""
    if not scale_free(name):
        return s.new_ones(len(s), dtype=F64)
    wide = LOSSES[name](s.shape[-1]).tau if name.startswith(("Spearman", "Kendall")) else 1.0
    return 1 / (min(wide, 1.0) * spread_of(s.double().where(s.isfinite(), 0.0))).clamp(max=1.0)


def steepest_class(name, s, y):
    """0, or how much of a rounding of a class's probability the mean over V classes of what knows no scale sees: of two
    rows the gradient is 0, and this is what is left of terms that cancel."""
    if not name.startswith("DIST"):
        return 0.0
    q = (s.double()[y != -100] / LOSSES[name](s.shape[-1]).temperature).log_softmax(-1).T
    shares = q.softmax(-1).nan_to_num(0.0) * q.shape[-1]  # 1 where the rows agree
    return largest(1 / (len(q) * spread_of(shares))).item()


def spread_of(x):
    """(N,): the norms of deviations from the mean; 1 where there are none."""
    deviation = (x - x.mean(-1, keepdim=True)).norm(dim=-1)
    return deviation.where(deviation > 0, 1.0)


def lost(name, V):
    """Whether the gradient beside giant logits is not known. A mixture's exponents, sums of both rows' logits, and the
    two divergences of AKLLoss, one as large as the logits, lose the smaller part in float64, the log-sum of a group how
    many classes are at its maximum. The reference loses the counts of classes in a running log-sum:
    test_orders_of_giant_logits has the kernels against the definition."""
    loss = LOSSES[name](V)
    points = loss.all_points() if isinstance(loss, kd.Loss) and not loss.standardize else ()
    return any(p.student and p.teacher for p in points) or name.startswith(
        ("AKL", "Grouped", "LTKD", "PlackettLuce"))  # fmt: skip


def squares(name):
    """Whether the value is what is left of squares of logits: with alpha = beta = 0 a variance of log-ratios."""
    return name == "AlphaBetaLoss-alpha=0.0-beta=0.0"


@cache
def grows(name):
    """Whether the student's gradient has the teacher's logits in it, and not only their probabilities."""
    s, t = SHORT[:1], LINE[:1].masked_fill(LINE[:1] < LINE[:1].max(), -50.0)
    least, most = (largest(run(name, "reference", s, k * t, torch.tensor([0]))[1]).item() for k in (10, 1000))
    return most > 10 * least


def all_on_one(name, s):
    """(N,): whether a class has nearly all of the student's probability. What it gets is a difference of logits and of
    their mean."""
    q = (s.double() / getattr(LOSSES[name](s.shape[-1]), "temperature", 1.0)).softmax(-1)
    return largest(q, per_row=True) > 1 - 1e-10


def told_apart(s):
    """Classes of different logits so far apart that in float64 their probabilities differ: ULDLoss orders classes, and
    its kernels know them by their logits, the reference by the probabilities."""
    return torch.stack([row + 1e-14 * row.unique(return_inverse=True)[1] for row in s]) if len(s) else s


def undecided(name, s, t, eps):
    """(N,): whether roundings decide which of two probabilities is the larger: of a class, or of the sorted ones where
    classes have to be told apart."""
    if not name.startswith(("TVD", "ULD")):
        return torch.zeros(len(s), dtype=torch.bool)
    q, p = ((x.double() / LOSSES[name](s.shape[-1]).temperature).log_softmax(-1) for x in (s, t))
    if name.startswith("TVD"):
        return ((q - p).abs() < eps).any(-1)
    q, p = q.exp().sort(-1).values, p.exp().sort(-1).values
    count = lambda x: torch.tensor([len(row.unique()) for row in x])  # noqa: E731
    return (count(q) < count(s)) & ((q - p).abs().amin(-1) < 1e-8)


def check(backend, name, s, t, y):
    """The same rows NaN and infinite; elsewhere float64's numbers, but for roundings: of a row's largest number, or of
    1, which weights add up to, and what those of logits make of it in float64. Not of the logits themselves."""
    got, dtype = run(name, backend, s, t, y), F64 if backend == "cpu" and s.dtype == F64 else F32
    eps, V = ROUNDINGS * torch.finfo(dtype).eps, s.shape[-1]
    want, moves = oracle(name, s, t, y, eps)
    where, per_row = (name, tuple(s.shape), s.dtype, t.dtype), want[0].dim() > 0
    sizes = 1 + largest(s).item(), 1 + largest(t).item()
    size, near = max(sizes), max([x for x in sizes if x < GIANT], default=0.0)
    reached = size < (150 if dtype == F64 else 20)  # no probability underflows that meets an infinity
    if per_row:  # NaN and +inf make a row NaN, unless its label leaves it out
        seen = [s] if loss_without_teacher(LOSSES[name](V)) else [s, t]
        spoilt = sum((~(x < torch.inf)).any(-1) for x in seen) > 0
        assert not (spoilt & (y != -100) & ~want[0].isnan()).any(), (where, want[0])
    steep = steepest(name, s)
    steep = steep if per_row else largest(steep)
    # Log-partitions and means, as large as logits, are in float64; of giant ones all or nothing is left of a class.
    statistics = [ROUNDINGS * torch.finfo(F64).eps * x
                  for x in (size * (near if squares(name) else 1), near if dtype == F64 else 0.0)]  # fmt: skip
    for what, a, b, move, absolute in zip(("value", "gradient"), got, want, moves, statistics, strict=True):
        limit, own = torch.finfo(a.dtype), largest(b, per_row)
        relative = eps * terms(name, V) + absolute
        bound = relative * own.clamp(min=1).maximum(steep if what == "gradient" else own) + move
        if what == "gradient":
            bound = bound + eps * steepest_class(name, s, y)
            if sizes[1] > GIANT and grows(name):
                alone = all_on_one(name, s)
                bound = bound + ROUNDINGS * torch.finfo(F64).eps * sizes[1] * (alone if per_row else alone.any())
        bound, own = (x[:, None] if b.dim() == 2 and per_row else x for x in (bound, own))
        bound = bound + limit.eps * (2 * own if name.startswith(OF_TERMS) else b.abs()) + limit.smallest_normal
        defined = b.isnan() | b.isinf() | ((own < limit.max / 2) & (bound < limit.max))  # else a rounding may overflow
        if what == "gradient":  # of a loss that is infinite there is none
            finite = want[0].isfinite() & (size < GIANT or not lost(name, V))
            finite = finite & ~undecided(name, s, t, eps) if per_row else finite
            defined &= finite[:, None] if per_row else finite
        assert torch.equal(a.isnan() & defined, b.isnan() & defined), (where, what, a, b)
        infinite = a.isinf() & defined
        assert torch.equal(a[infinite].double(), b[infinite]), (where, what, a, b)
        if reached or what == "gradient":
            assert torch.equal(infinite, b.isinf() & defined), (where, what, a, b)
        both = defined & a.isfinite() & b.isfinite()
        off = (a.double() - b).abs()
        assert (off <= bound)[both].all(), (where, what, off, bound, a, b)


def fuzz(test, backend, example):
    counted[test] += 1
    check(backend, *example)


# Of the only class that counts the gradient is 0; of terms of 1e30 the reference leaves 1e14, and float16 overflows.
GIANTS = ("AlphaBetaLoss-alpha=0.0-beta=0.8", torch.tensor([[-0.4868, 899.5, -0.5581]], dtype=F16),
          torch.tensor([[6.675e29, -1.974e29, 1.943e30]], dtype=F64), torch.tensor([0]))  # fmt: skip
# A difference of sums that are 257 each.
FLAT = ("AlphaBetaLoss-alpha=0.5-beta=-0.5", torch.full((1, 257), 1e-20, dtype=F64),
        torch.full((1, 257), 7.0, dtype=F64), torch.tensor([0]))  # fmt: skip


# A teacher of 16 bits beside a student of float64; gradients that cancel; a student's row without a distribution; many
# probabilities that are equal, or equal but for 1e-40; +inf where no other class of the teacher lives; logits of 1e30
# beside a slope that grows with them; a teacher that float32 cannot tell from the student; a class that hardly differs
# between two rows, beside logits that round to 1e-13; z-scores of logits as far apart as what stands for -inf;
# a label far above the classes that a point without it sees.
ONLY = torch.tensor([[1.0, 1, 1, 0], [1, 1, 0, 0]], dtype=F64)
LINE, SHORT = torch.arange(12, dtype=F64).view(2, 6).sin() * 4, torch.arange(12, dtype=F64).view(2, 6).cos() * 3
FOUND = [("SkewKLLoss-alpha=0.5-standardize=True", LINE, SHORT.to(F16)), ("LTKDLoss", LINE, SHORT.to(BF16)),
         ("SinkhornLoss {}", torch.tensor([[3.0, -1, -4], [1, -2, -3]], dtype=BF16), SHORT[:, :3].round()),
         ("DISTLoss {'temperature': 2.0}", LINE.masked_fill(LINE[:1] == LINE, -torch.inf), SHORT),
         ("ULDLoss {}", torch.zeros(2, WIDE, dtype=F64), torch.arange(2 * WIDE).view(2, -1).to(F64) % 11 - 5),
         ("ULDLoss {}", 1e-40 * LINE.round(), 1e3 * SHORT),
         ("AlphaBetaLoss-alpha=0.0-beta=0.0", ONLY.log(), torch.where(ONLY > 0, -torch.inf, torch.inf)),
         ("AKLLoss-mu=0.8-temperature=2.0-ce_weight=0.5", torch.eye(3)[:2].log(), 900 * torch.eye(3)[:2]),
         ("DISTLoss {'temperature': 2.0}", torch.tensor([[900.3, 2, 1], [900, 1, 0.701]], dtype=F64),
          torch.tensor([[900, 2, 1], [1, 900, 1.5]], dtype=F64)),
         ("LogitMSELoss", (1e30 * torch.arange(128).sin().view(2, 64)).to(BF16), ONLY),
         ("TAIDLoss-tau=0.8-temperature=2.0-standardize=True", torch.full((2, 64), 7.0),
          2e30 * torch.arange(128).sin().view(2, 64).masked_fill(torch.arange(64) == 1, -torch.inf)),
         ("DKDLoss-alpha=1.0-beta=8.0", torch.tensor([7172.7, 4889.8, *[-3000.0] * 31]).expand(2, 33),
          torch.arange(66).sin().view(2, 33)),
         ("DKDLoss-alpha=0.5-beta=2.0-temperature=4.0", torch.tensor([7172.7, 4889.8, *[-3000.0] * 31]).expand(2, 33),
          torch.arange(66).sin().view(2, 33))]  # fmt: skip


ON = {"cpu": sorted(LOSSES), "triton": ON_TRITON, "cuda": ON_CUDA}
FOUND_ON = [(on, *one) for on in ON for one in FOUND if one[0] in ON[on] and (on == "cpu" or one[1].shape[1] < WIDE)]


@pytest.mark.parametrize("backend, name, s, t", FOUND_ON, ids=lambda x: x if isinstance(x, str) else "")
def test_what_was_found(backend, name, s, t):
    s, t = (x if x.dtype != F64 or backend == "cpu" else x.float() for x in (s, t))
    check(backend, name, s, t, torch.tensor([0, 1]))


@pytest.mark.parametrize("case", [c for c in textbook_ranks.CASES if c.name == "PlackettLuceLoss"], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_orders_of_giant_logits(backend, case):
    s, t = (row_pair(kind, 2, 33, torch.Generator().manual_seed(1))[0].float() for kind in ("giant", "peak"))
    for got, want in zip(run(str(case), backend, s, t, torch.zeros(2, dtype=torch.long)), case.rows(s, t), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-7)


@settings(max_examples=40 * EXAMPLES)
@example(GIANTS)
@example(FLAT)
@given(examples([1, 2, 3, 5, 17, 33, 64, 257, 1030], [F64, F32, BF16, F16], 4))
def test_cpu_against_reference(example):
    fuzz("cpu", "cpu", example)


@settings(max_examples=EXAMPLES // 2, phases=[Phase.generate])
@given(examples([WIDE], [F64, F32, BF16, F16], 2))
def test_cpu_against_reference_on_wide_rows(example):
    fuzz("cpu on wide rows", "cpu", example)


@settings(max_examples=EXAMPLES // 2, phases=[Phase.generate])
@given(examples([1, 2, 5, 33], [F32, BF16], 2, ON_TRITON))
def test_triton_against_reference(example):
    fuzz("triton", "triton", example)


@settings(max_examples=4 * EXAMPLES, phases=[Phase.generate])
@given(examples([1, 2, 5, 33, 257, 1030], [F32, BF16, F16], 2, ON_CUDA))
def test_cuda_against_reference(example):
    fuzz("cuda", "cuda", example)


# The one rank loss with CUDA kernels, of wide rows of 16 bits; separable losses have none.
@settings(max_examples=EXAMPLES // 2, phases=[Phase.generate])
@given(examples([4096, 5001], [BF16, F16], 2, ["SpearmanLoss"]))
def test_cuda_ranks_against_reference(example):
    fuzz("cuda, ranks", "cuda", example)


@pytest.mark.parametrize("kind", sorted(set(KINDS)))
@pytest.mark.parametrize("wrong", [lambda g: 0.9 - g, torch.zeros_like], ids=["0.9 - g", "0"])
def test_wrong_gradients_are_found(kind, wrong, monkeypatch):
    """By `check`, of nearly all losses that have a gradient there, on rows of every kind."""
    right, missed, tried = run, [], 0

    def mutated(name, backend, *rows):
        value, gradient = right(name, backend, *rows)
        return value, wrong(gradient) if backend == "cpu" else gradient

    monkeypatch.setitem(globals(), "run", mutated)
    g = torch.Generator().manual_seed(1)
    s, t, y = row_pair(kind, 3, 17, g)[0].float(), row_pair("plain", 3, 17, g)[1].float(), torch.tensor([3, 5, 0])
    for name in LOSSES:
        gradient = right(name, "reference", s.double(), t.double(), y)[1]
        if not 1e-3 < largest(gradient - wrong(gradient)) < 1e37 or (kind == "giant" and lost(name, 17)):
            continue
        tried += 1
        try:
            check("cpu", name, s, t, y)
            missed.append(name)
        except AssertionError:
            pass
    assert tried and len(missed) <= tried / 10, (tried, missed)


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
