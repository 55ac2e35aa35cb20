"""What every loss must satisfy whatever its formula. Each example runs the whole catalogue on the same rows."""

import pytest
import torch
from accuracy import BACKENDS, DECLARED, F32, F64, ON_BACKENDS, SAMPLE, Batch, has_kernels, make, only
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from textbook import CASES as CATALOGUE
from textbook import Case, uld

import kdkernels as kd

OWN = [Case(name, lambda *rows: None) for name in DECLARED]  # no formula is looked at here
CASES = [*CATALOGUE, *OWN]
SHIFT_BLIND = [c for c in CASES if c.name != "LogitMSELoss" and not c.setting("z_loss", 0)]
DISTILLATION_ONLY = [c for c in CASES if not c.setting("ce_weight", 0)]
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
ULPS = 256  # times the largest logit: these are identities between two runs; accuracy is measured with the textbook


def examples(test):
    """One body for all backends; the Triton interpreter gets few examples and does not shrink them."""
    @on_every_backend
    def run_it(backend):
        few = dict(max_examples=1, phases=[Phase.generate]) if backend == "triton" else {}

        @settings(**few)
        @given(st.data())
        def one(data):
            test(backend, data.draw)

        one()

    run_it.__name__, run_it.__doc__ = test.__name__, test.__doc__
    return run_it


@st.composite
def logits(draw, backend, least=1, most_rows=4):
    """Rows on a grid of 2^-8, so that adding an integer is exact in float32 as well."""
    slow = backend == "triton"
    n, v = draw(st.integers(1, 2 if slow else most_rows)), draw(st.integers(5 if slow else least, 12))
    scale, seed = draw(st.sampled_from([0.25, 1.0, 8.0])), draw(st.integers(0, 2**20))
    g = torch.Generator().manual_seed(seed)
    s, t = (scale * torch.randn(2, n, v, generator=g, dtype=F64) * 256).round() / 256
    return Batch(s, t, torch.randint(v, (n,), generator=g)).to(F32 if backend in ("triton", "cuda") else F64)


def narrowest(rows) -> float:
    """The smallest standard deviation of a row; 0 for two classes, whose z-scores are always the same."""
    return min(x.std(-1).min().item() if x.shape[-1] > 2 else 0.0 for x in rows[:2])


def cases(rows, backend, among=CASES):
    """The losses that are defined on rows this narrow: one class has no deviation, two equal logits have none."""
    if backend == "triton":  # a third of them each time, in turn
        among = [c for i, c in enumerate([*SAMPLE, *OWN]) if c in among and (i + int(rows.y.sum())) % 3 == 0]
    among = [c for c in among if has_kernels(c, backend)]
    flat = narrowest(rows) < 0.1
    return [c for c in among if not (flat and c.setting("standardize", False))]


def apply(case, backend, s, t, y, reduction="none", weight=None, **call):
    """-> value, ds, dt (dt is None for a loss without a teacher)."""
    s, t = s.detach().requires_grad_(), t.detach().requires_grad_()
    teacher = t if case.needs_teacher else None
    with only(backend):
        value = make(case, reduction=reduction)(s, teacher, y, **call)
        value.backward(torch.ones_like(value) if weight is None else weight)
    return value.detach(), s.grad, t.grad if case.needs_teacher else None


def near(case, a, b, what="", size=0.0, logits=32.0):
    """a = b, but for the rounding of logits (of this size) and of the results."""
    if a is None:
        return
    finite = [x[x.isfinite()].abs().max().item() if x.isfinite().any() else 0 for x in (a, b)]
    atol = ULPS * torch.finfo(a.dtype).eps * (1 + logits) * max(1.0, size, *finite)
    torch.testing.assert_close(a, b, rtol=0, atol=atol, equal_nan=True, msg=lambda m: f"{case} {what}: {m}")


def same(case, got, want, what="", logits=32.0):
    """Value and gradients agree; the terms of a gradient are as large as the value even where they cancel."""
    size = max((x[x.isfinite()].abs().max().item() for x in want if x is not None and x.isfinite().any()), default=0.0)
    for name, a, b in zip(("value", "ds", "dt"), got, want, strict=True):
        near(case, a, b, f"{name} {what}", size, logits)


@examples
def test_zero_at_the_minimizer(backend, draw):
    rows = draw(logits(backend))
    for case in cases(rows, backend, DISTILLATION_ONLY):
        if case.name in ("TTMLoss", "WTTMLoss") and case.setting("standardize", False):
            continue
        s = make(case).minimizer(rows.t, rows.y)
        value, ds, _ = apply(case, backend, s.to(rows.s.dtype), rows.t, rows.y)
        near(case, value, torch.zeros_like(value), "value", size=rows.s.shape[-1])
        near(case, ds, torch.zeros_like(ds), "gradient")


@examples
def test_not_negative(backend, draw):
    rows = draw(logits(backend))
    for case in cases(rows, backend):
        value, *_ = apply(case, backend, *rows)
        assert (value >= -ULPS * torch.finfo(value.dtype).eps).all(), (case, value)


@examples
def test_blind_to_a_shift(backend, draw):
    rows = draw(logits(backend))
    by_s, by_t = (torch.tensor(draw(st.integers(-300, 300))) for _ in "st")
    for case in cases(rows, backend, SHIFT_BLIND):
        zoom = min(1.0, narrowest(rows)) ** 2 if case.setting("standardize", False) else 1.0  # slope of a z-score
        moved = apply(case, backend, rows.s + by_s, rows.t + by_t, rows.y)
        same(case, apply(case, backend, *rows), moved, logits=300.0 / zoom)


@examples
def test_gradient_rows_sum_to_zero(backend, draw):
    rows = draw(logits(backend))
    for case in cases(rows, backend, SHIFT_BLIND):
        value, ds, dt = apply(case, backend, *rows)
        for grad in (ds,) if dt is None else (ds, dt):
            size = max(value.abs().max().item(), grad.abs().sum(-1).max().item())
            near(case, grad.sum(-1), torch.zeros(len(grad), dtype=grad.dtype), size=size)


@examples
def test_ignored_rows_are_inert(backend, draw):
    rows = draw(logits(backend, most_rows=3))
    junk = torch.tensor([draw(st.sampled_from([torch.nan, torch.inf, -torch.inf, 1e30, 0.0])) for _ in "st"])
    n, v = rows.s.shape
    at = torch.tensor(draw(st.permutations(range(n + 2)))[:n]).sort()[0]  # where the kept rows go
    s, t = (torch.full((n + 2, v), j.item(), dtype=rows.s.dtype) for j in junk)
    s, t = s.index_copy(0, at, rows.s), t.index_copy(0, at, rows.t)
    y = torch.full((n + 2,), -100).index_copy(0, at, rows.y)
    for case in cases(rows, backend):
        for reduction in ("none", "mean"):
            value, *grads = apply(case, backend, *rows, reduction)
            padded, *padded_grads = apply(case, backend, s, t, y, reduction)
            if reduction == "none":
                value = torch.zeros(n + 2, dtype=value.dtype).index_copy(0, at, value)
            near(case, padded, value, "value")
            for side, a, b in zip(("ds", "dt"), padded_grads, grads, strict=True):
                if a is not None:
                    near(case, a, torch.zeros(n + 2, v, dtype=b.dtype).index_copy(0, at, b), side)


@examples
def test_leading_shape_and_strides_do_not_matter(backend, draw):
    rows = draw(logits(backend, most_rows=2))
    n, v = rows.s.shape
    wide = torch.zeros(n, 2 * v, dtype=rows.s.dtype)
    wide[:, ::2] = rows.t
    strided = torch.cat([rows.s, rows.s]).T.contiguous().T[:n]
    row = torch.arange(n)
    views = [  # student, teacher, labels, the row each entry is
        (strided, wide[:, ::2], rows.y, row),
        (rows.s[:, None], rows.t[None].transpose(0, 1), rows.y[:, None], row[:, None]),
        (rows.s.expand(3, n, v), rows.t.repeat(3, 1, 1), rows.y.expand(3, n), row.expand(3, n)),
        (rows.s[0], rows.t[0], rows.y[0], row[0]),
    ]
    for case in cases(rows, backend):
        want = apply(case, backend, *rows)
        for s, t, y, index in views:
            for a, b in zip(apply(case, backend, s, t, y), want, strict=True):
                if a is not None:
                    near(case, a, b[index])


@examples
def test_reductions_are_consistent(backend, draw):
    rows = draw(logits(backend))
    n = len(rows.y)
    y = rows.y.where(torch.tensor(draw(st.lists(st.booleans(), min_size=n, max_size=n))), -100)
    kept, weight = int((y != -100).sum()), torch.arange(1, n + 1, dtype=rows.s.dtype) / 2
    for case in cases(rows, backend):
        value, ds, _ = apply(case, backend, rows.s, rows.t, y, row_weight=None)
        weighed, weighed_ds, _ = apply(case, backend, rows.s, rows.t, y, row_weight=weight)
        assert (value[y == -100] == 0).all() and (ds[y == -100] == 0).all()
        near(case, weighed, weight * value, "weight")
        near(case, weighed_ds, weight[:, None] * ds, "weight, gradient")
        for options, divisor in [
            (dict(reduction="sum"), 1),
            (dict(reduction="mean"), max(kept, 1)),
            (dict(reduction="batchmean"), n),
            (dict(reduction="mean", num_items=7), 7),
            (dict(reduction="mean", num_items=torch.tensor(7)), 7),
        ]:
            got, got_ds, _ = apply(case, backend, rows.s, rows.t, y, row_weight=weight, **options)
            near(case, got, weighed.sum() / divisor, f"{options}")
            near(case, got_ds, weighed_ds / divisor, f"{options}, gradient")


def spread_out(results, at, width):
    """(value, ds, dt) with the gradients' columns at `at` among `width`, zero elsewhere."""
    value, *grads = results
    wide = lambda g: torch.zeros(len(g), width, dtype=g.dtype).index_copy(1, at, g)  # noqa: E731
    return value, *(None if g is None else wide(g) for g in grads)


@examples
def test_impossible_columns_equal_deleted_columns(backend, draw):
    rows = draw(logits(backend))
    n, v = rows.s.shape
    extra = draw(st.integers(1, 5))
    at = torch.tensor(draw(st.permutations(range(v + extra)))[:v])
    s, t = (torch.full((n, v + extra), -torch.inf, dtype=x.dtype).index_copy(1, at, x) for x in rows[:2])
    for case in cases(rows, backend):
        same(case, apply(case, backend, s, t, at[rows.y]), spread_out(apply(case, backend, *rows), at, v + extra))


@examples
def test_masked_columns_equal_deleted_columns(backend, draw):
    rows = draw(logits(backend))
    n, v = rows.s.shape
    junk = draw(st.sampled_from([0.0, 1000.0, torch.inf, -torch.inf, torch.nan]))
    extra = draw(st.integers(1, 5))
    shuffled = torch.tensor(draw(st.permutations(range(v + extra)))[:v])
    for at, call in [
        (torch.arange(v), dict(vocab_size=v)),
        (shuffled, dict(vocab_mask=torch.zeros(v + extra, dtype=torch.bool).index_fill(0, shuffled, True))),
    ]:
        s, t = (torch.full((n, v + extra), junk, dtype=x.dtype).index_copy(1, at, x) for x in rows[:2])
        for case in cases(rows, backend):
            got = apply(case, backend, s, t, at[rows.y], **call)
            same(case, got, spread_out(apply(case, backend, *rows), at, v + extra), str(list(call)))


@examples
def test_order_of_the_classes_does_not_matter(backend, draw):
    rows = draw(logits(backend))
    order = torch.tensor(draw(st.permutations(range(rows.s.shape[-1]))))
    for case in cases(rows, backend):
        moved = apply(case, backend, rows.s[:, order], rows.t[:, order], order.argsort()[rows.y])
        value, *grads = apply(case, backend, *rows)
        same(case, moved, (value, *(None if g is None else g[:, order] for g in grads)))


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean", "none"])
@pytest.mark.parametrize("backend, case", ON_BACKENDS, ids=str)
def test_nothing_to_average(case, reduction, backend):
    """N = 0, or no row kept: value 0, gradients of zeros."""
    for n, v in [(0, 4), (2, 4)]:
        s, t = (torch.full((n, v), torch.nan, requires_grad=True) for _ in "st")
        with kd.use_backend(backend):
            teacher = t if case.needs_teacher else None
            value = make(case, reduction=reduction)(s, teacher, torch.full((n,), -100))
            value.sum().backward()
        assert value.shape == ((n,) if reduction == "none" else ()) and (value == 0).all()
        assert s.grad.shape == s.shape and (s.grad == 0).all()
        if case.needs_teacher and t.grad is not None:
            assert (t.grad == 0).all()


@examples
def test_a_sparse_teacher_of_all_classes_is_the_teacher(backend, draw):
    rows = draw(logits(backend))
    order = rows.t.argsort(-1, descending=True)
    for case in cases(rows, backend, [c for c in (*CASES, Case("ULDLoss", uld)) if c.needs_teacher]):
        T = case.setting("teacher_temperature", None) or case.setting("temperature", 1.0)
        log_p = (rows.t / T).log_softmax(-1).gather(-1, order)
        want = apply(case, backend, *rows)
        for tail in (None, torch.full_like(log_p[:, 0], -torch.inf)):
            if tail is not None and kd.merged.refusal(make(case)):
                continue
            sparse, s = kd.SparseTeacher(order, log_p, tail, temperature=T), rows.s.clone().requires_grad_()
            with only(backend):
                value = make(case, reduction="none")(s, sparse, rows.y)
                value.sum().backward()
            same(case, (value.detach(), s.grad, None), (*want[:2], None), f"tail {tail}")


@examples
def test_chunks_are_the_whole(backend, draw):
    """From hidden states, with logits of any number of rows at a time."""
    rows = draw(logits(backend, most_rows=7))
    n, v = rows.s.shape
    chunk, g = draw(st.integers(1, n)), torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    hidden, head, t_hidden, t_head = (torch.randn(*shape, generator=g, dtype=F64).to(rows.s.dtype)
                                      for shape in ((n, 3), (v, 3), (n, 2), (v, 2)))  # fmt: skip
    y = rows.y.where(torch.tensor(draw(st.lists(st.booleans(), min_size=n, max_size=n))), -100)
    incoming = draw(st.sampled_from([None, torch.linspace(0.5, 1.5, n).to(rows.s.dtype)]))
    t, reduction = t_hidden @ t_head.T, "mean" if incoming is None else "none"
    for case in cases(Batch(hidden @ head.T, t, y), backend):
        loss, found = make(case, reduction=reduction), []
        with only(backend):
            for chunked in (True, False):
                leaves = hidden.clone().requires_grad_(), head.clone().requires_grad_()
                if chunked:
                    value = kd.LinearLoss(loss, chunk)(*leaves, t_hidden, t_head, y)
                else:
                    value = loss(leaves[0] @ leaves[1].T, t if case.needs_teacher else None, y)
                value.backward(incoming)
                found.append((value.detach(), *(leaf.grad for leaf in leaves)))
        same(case, *found, f"{reduction}, chunks of {chunk}")
