"""Teachers known by k classes of each row, against the textbook on merged distributions and against whole teachers."""

import dataclasses

import pytest
import torch
from accuracy import BF16, F32, F64, Bar, Batch, batch, excess, make, rms, rounded_once
from allocations import Widest, allocations
from textbook import CASES, Case, cross_entropy, forward_kl
from textbook import logp as log_softmax
from textbook_ranks import CASES as RANK_CASES

import kdkernels as kd
from kdkernels import SparseTeacher
from kdkernels.buckets import blocks

TEACHER = [c for c in CASES if c.needs_teacher and getattr(kd, c.name).merges]
PLAIN = [c for c in TEACHER if not c.options.get("standardize")]
POWERS = [c for c in PLAIN if c.name in ("TTMLoss", "WTTMLoss", "AlphaBetaLoss")]
MERGED = [c for c in PLAIN if c not in POWERS]
F_DIVERGENCES = [c for c in MERGED if c.name not in ("DKDLoss", "TAIDLoss") and "teacher_temperature" not in c.options]
K = 6
on_both = pytest.mark.parametrize("backend", ["reference", "cpu"])
every_merged = pytest.mark.parametrize("case", MERGED, ids=str)


def temperatures(case) -> tuple[float, float]:
    own = case.setting("temperature", 1.0)
    return own, case.setting("teacher_temperature", None) or own


def without_entropy(case: Case) -> Case:
    extra = ("ce_weight", "label_smoothing", "z_loss")
    options = {k: v for k, v in case.options.items() if k not in extra}
    return dataclasses.replace(case, options=options, shared=case.shared | dict.fromkeys(extra, 0.0))


def merged(log_p, indices, tail):
    """(N, V) log-probabilities -> (N, k) or (N, k + 1), the last the log of the sum of all others."""
    kept = log_p.gather(1, indices)
    if tail == "renormalise":
        return kept
    rest = log_p.masked_fill(torch.zeros_like(log_p, dtype=torch.bool).scatter(1, indices, True), -torch.inf)
    return torch.cat((kept, rest.logsumexp(1, keepdim=True)), 1)


def rows(case, s, t, y, indices, tail="bucket"):
    """(N,): the textbook's loss of merged distributions, and the cross-entropy of the whole student."""
    import textbook  # its logp may be one that rounds

    (own, other), count = temperatures(case), indices.shape[1]
    q, p = merged(textbook.logp(s / own), indices, tail), merged(textbook.logp(t / other), indices, tail)
    found = indices == y[:, None]
    at = torch.where(found.any(1), found.int().argmax(1), count)
    value = without_entropy(case).rows(own * q, other * p, at)
    if ce := case.setting("ce_weight", 0.0):
        value = value + ce * cross_entropy(s, y, case.setting("label_smoothing", 0.0), case.setting("z_loss", 0.0))
    return value


def by_textbook(case, x: Batch, indices, tail, dtype=F64):
    s = x.s.to(dtype).detach().requires_grad_()
    value = rows(case, s, x.t.to(dtype), x.y, indices, tail)
    return value.detach(), torch.autograd.grad(value.sum(), s)[0]


def teacher(case, x: Batch, k=K, **options) -> SparseTeacher:
    return SparseTeacher.from_logits(x.t.to(F64), k, temperatures(case)[1], **options)


def run(case, s, sparse, y=None, **call):
    s = s.detach().requires_grad_()
    value = make(case, reduction="none")(s, sparse, y, **call)
    return value.detach(), torch.autograd.grad(value.sum(), s)[0]


def near(a, b, what=""):
    size = max(1.0, b[b.isfinite()].abs().max().item())
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * size, msg=lambda m: f"{what}: {m}")


def labels_among(x: Batch, sparse) -> Batch:
    """With labels that the teacher knows, of every row."""
    return x._replace(y=sparse.indices[torch.arange(len(x.y)), x.y % sparse.shape[-1]])


@on_both
@every_merged
def test_the_bucket_is_the_textbook_of_merged_distributions(case, backend):
    for x in (batch(24, 40, scale=2.0), batch(24, 40, scale=12.0, seed=1), batch(3, 700, seed=2)):
        sparse = teacher(case, x)
        with kd.use_backend(backend):
            got = run(case, x.s, sparse, x.y)
        want = by_textbook(case, x, sparse.indices, "bucket")
        near(got[0], want[0], "value")
        near(got[1], want[1], "gradient")


@on_both
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_renormalised(case, backend):
    sparse = teacher(case, batch(24, 40, scale=2.0), tail="renormalise")
    x = labels_among(batch(24, 40, scale=2.0), sparse)
    want = by_textbook(case, x, sparse.indices, "renormalise")
    with kd.use_backend(backend):
        got = run(case, x.s, sparse, x.y)
    near(got[0], want[0], "value")
    near(got[1], want[1], "gradient")


def rounded(case, x, indices, dtype):
    """The textbook's gradient in float32, rounded. A smoothed cross-entropy's is made, and rounded, for itself."""
    if not case.setting("label_smoothing", 0.0):
        return by_textbook(case, x, indices, "bucket", F32)[1].to(dtype)
    entropy = dataclasses.replace(case, options=case.options | {"kd_weight": 0.0})
    terms = [by_textbook(one, x, indices, "bucket", F32)[1] for one in (without_entropy(case), entropy)]
    return sum(term.to(dtype) for term in terms)


@pytest.mark.parametrize("dtype", [F32, BF16])
@every_merged
def test_narrow_dtypes_are_as_accurate_as_the_textbook_in_float32(case, dtype):
    x = batch(512, 48, scale=3.0, s_dtype=dtype)
    sparse = teacher(case, x)
    got = run(case, x.s, sparse.to(F32), x.y)
    exact, own = (by_textbook(case, x, sparse.indices, "bucket", d) for d in (F64, F32))
    with rounded_once():
        nudged = by_textbook(case, x, sparse.indices, "bucket")
    for name, a, *bar in zip(("value", "gradient"), got, exact, own, nudged, strict=True):
        if name == "gradient":
            bar[1] = rounded(case, x, sparse.indices, dtype)
        assert not (why := excess(a, Bar(*bar, 1e-15), F32)), f"{case} {name}: {why}"


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize("case", [*TEACHER, *RANK_CASES], ids=str)
def test_all_classes_are_the_whole_teacher(case, dtype):
    """The same numbers, but for the order in which the distillation term and the cross-entropy are rounded."""
    x = batch(20, 12, scale=2.0, s_dtype=dtype)
    options = {} if isinstance(case, Case) else getattr(case, "options", {})
    loss = getattr(kd, case.name)(**(options or case.options), reduction="none")
    s, results = x.s.detach().requires_grad_(), []
    for t in (x.t, SparseTeacher.from_logits(x.t, 12, loss.teacher_temperature or loss.temperature)):
        value = loss(s, t, x.y)
        results.append((value.detach(), torch.autograd.grad(value.sum(), s)[0]))
    (want, by_want), (got, by_got) = results
    slack = 4 * torch.finfo(F64 if dtype == F64 else F32).eps if loss.ce_weight or dtype == BF16 else 0.0
    assert (got - want).abs().max() <= slack * want.abs().max()
    step = torch.finfo(dtype).eps if loss.ce_weight or dtype == BF16 else 0.0  # two terms of a size, added up
    assert (by_got - by_want).abs().max() <= 2 * step * max(1.0, by_want.abs().max())


@every_merged
def test_all_classes_in_any_order_with_an_impossible_bucket(case):
    x = batch(20, 12, scale=2.0)
    order = torch.rand(20, 12, generator=torch.Generator().manual_seed(0)).argsort(-1)
    T = temperatures(case)[1]
    log_p, nothing = (x.t / T).log_softmax(-1).gather(1, order), torch.full((20,), -torch.inf)
    sparse = SparseTeacher(order, log_p, nothing, temperature=T)
    for got, want in zip(run(case, x.s, sparse, x.y), run(case, x.s, x.t, x.y), strict=True):
        near(got, want)


@on_both
@pytest.mark.parametrize("case", F_DIVERGENCES, ids=str)
def test_a_tail_spread_over_the_students_is_the_bucket_for_f_divergences(case, backend):
    x = batch(24, 40, scale=2.0)
    with kd.use_backend(backend):
        found = [run(case, x.s, teacher(case, x, tail=tail), x.y) for tail in ("bucket", "spread")]
    near(found[1][0], found[0][0], "value")
    near(found[1][1], found[0][1], "gradient")


@pytest.mark.parametrize("case", [c for c in PLAIN if c.name != "TVDLoss"], ids=str)  # there it has a kink
def test_a_spread_tail_is_the_loss_of_that_whole_teacher(case):
    x = batch(24, 40, scale=2.0)
    other = temperatures(case)[1]
    sparse, q = teacher(case, x, tail="spread"), log_softmax(x.s / other)
    tail = merged(q, sparse.indices, "bucket")[:, -1:]
    whole = (q - tail + sparse.log_tail[:, None]).scatter(1, sparse.indices, sparse.values) * other
    for got, want in zip(run(case, x.s, sparse, x.y), run(case, x.s, whole, x.y), strict=True):
        near(got, want)


@pytest.mark.parametrize("case", [c for c in PLAIN if c.name != "TVDLoss"], ids=str)  # which has a kink there
def test_a_spread_tail_is_the_teachers_own_where_both_agree(case):
    x = batch(24, 40, scale=2.0)
    for got, want in zip(run(case, x.t, teacher(case, x, tail="spread"), x.y), run(case, x.t, x.t, x.y), strict=True):
        near(got, want)


@pytest.mark.parametrize("case", POWERS, ids=str)
def test_powers_of_a_bucket_are_refused(case):
    with pytest.raises(ValueError, match=f"{case.name} sums powers of the probabilities"):
        make(case)(*batch(4, 40)._replace(t=teacher(case, batch(4, 40))))


def test_powers_that_add_up_to_one_are_taken():
    x = batch(24, 40, scale=2.0)
    loss, sparse = kd.AlphaBetaLoss(alpha=0.3, beta=0.7, reduction="none"), SparseTeacher.from_logits(x.t, K)
    q, p = (merged(log_softmax(z), sparse.indices, "bucket") for z in (x.s, x.t))
    near(loss(x.s, sparse), loss(q, p))
    ttm = kd.ForwardKLLoss(teacher_temperature=2.0, reduction="none")
    found = [ttm(x.s, SparseTeacher.from_logits(x.t, k, 2.0)) for k in (K, 39)]
    whole = kd.TTMLoss(gamma=0.5, reduction="none")(x.s, x.t)
    assert (found[0] <= whole + 1e-12).all()
    near(found[1], whole)


@on_both
@pytest.mark.parametrize("case", [c for c in MERGED if not (c.name == "TAIDLoss" or c.options.get("detach_mixture"))],
                         ids=str)  # constants would move there
def test_gradcheck(case, backend):
    x = batch(3, 14, seed=3)
    sparse, loss = teacher(case, x, k=4), make(case, reduction="none")
    with kd.use_backend(backend):
        assert torch.autograd.gradcheck(lambda s: loss(s, sparse, x.y), (x.s.clone().requires_grad_(),))


def test_a_nearly_empty_tail_does_not_cancel():
    """The student's tail is e^-40 of its mass: 1 minus the others would be 0 in float64, and far from it in float32."""
    s = torch.full((2, 300), -40.0)
    s[:, :2] = 0.0
    indices = torch.tensor([[0, 1], [1, 0]])
    sparse = SparseTeacher(indices, torch.full((2, 2), 0.495).log(), torch.full((2,), 0.01).log())
    value = kd.ForwardKLLoss(reduction="none")(s, sparse)
    log_tail = torch.tensor(298.0).double().log() - 40 - torch.tensor(2.0).double().log()
    want = 0.99 * torch.tensor(0.99).double().log() + 0.01 * (torch.tensor(0.01).double().log() - log_tail)
    torch.testing.assert_close(value, want.float().expand(2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "spread"])
def test_rows_that_do_not_count_hold_anything(tail):
    x = batch(8, 40)
    sparse, y = teacher(CASES[3], x, tail=tail), teacher(CASES[3], x).indices[:, 1].clone()
    y[2] = y[5] = -100
    s, weight = x.s.clone(), torch.ones(8)
    s[2], s[5], s[6], weight[6] = torch.nan, torch.inf, torch.nan, 0.0
    s.requires_grad_()
    for reduction in ("mean", "sum", "none", "batchmean"):
        loss = kd.KDLoss(temperature=0.7, reduction=reduction)
        value = loss(s, sparse, y, row_weight=weight)
        (gradient,) = torch.autograd.grad(value.sum(), s)
        assert value.isfinite().all() and gradient.isfinite().all() and not gradient[[2, 5, 6]].any(), reduction


def test_a_spread_teacher_in_many_chunks(monkeypatch):
    x = batch(12, 30, scale=2.0)
    loss, sparse = kd.TTMLoss(ce_weight=0.5), teacher(CASES[2], x, tail="spread")
    T, s = torch.linspace(0.5, 2, 12, dtype=F64), x.s.view(3, 4, 30).clone().requires_grad_()
    loss.teacher_temperature = 1.0
    found = []
    for rows in (12, 1):
        monkeypatch.setattr(kd.merged, "blocks", lambda s, rows=rows: blocks(s, memory=30 * rows))
        value = loss(s, sparse.reshape(3, 4), x.y.view(3, 4), temperature=T.view(3, 4))
        found.append((value.detach(), torch.autograd.grad(value, s)[0]))
    for one, many in zip(*found, strict=True):
        near(many, one)


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "spread"])
@on_both
def test_reductions_weights_and_temperatures_of_rows(tail, backend):
    g = torch.Generator().manual_seed(0)
    x = batch(12, 30, scale=2.0)
    sparse, T = teacher(CASES[2], x, tail=tail), torch.rand(12, generator=g, dtype=F64) + 0.5
    y, weight = sparse.indices[:, 2].clone(), torch.rand(12, generator=g, dtype=F64)
    y[3] = -100
    options = dict(teacher_temperature=1.0, ce_weight=0.3, t_squared=True)
    rows = [slice(i, i + 1) for i in range(12)]
    one = [kd.DKDLoss(**options)(x.s[i], sparse[i], y[i], temperature=T[i]) for i in rows]
    each = weight * torch.stack(one)
    want = {"mean": each.sum() / 11, "sum": each.sum(), "none": each.view(3, 4), "batchmean": each.sum() / 3}
    s = x.s.view(3, 4, 30).clone().requires_grad_()
    with kd.use_backend(backend):
        for reduction, expected in want.items():
            loss = kd.DKDLoss(**options, reduction=reduction)
            call = dict(row_weight=weight.view(3, 4), temperature=T.view(3, 4))
            got = loss(s, sparse.reshape(3, 4), y.view(3, 4), **call)
            near(got, expected, reduction)
            assert torch.autograd.grad(got.sum(), s)[0].shape == s.shape
        items = kd.DKDLoss(**options)(s, sparse.reshape(3, 4), y.view(3, 4), num_items=5, **call)
    near(items, each.sum() / 5)


def test_strided_and_sliced_logits():
    g = torch.Generator().manual_seed(0)
    s, t = torch.randn(2, 3, 5, 20, generator=g, dtype=F64)
    sparse = SparseTeacher.from_logits(t[:, :-1], 4)
    loss, whole = kd.ForwardKLLoss(ce_weight=0.5), s.clone().requires_grad_()
    y = torch.randint(20, (3, 4), generator=g)
    (sliced,) = torch.autograd.grad(loss(whole[:, :-1], sparse, y), whole)
    dense = s[:, :-1].clone().requires_grad_()
    (plain,) = torch.autograd.grad(loss(dense, sparse, y), dense)
    assert torch.equal(sliced[:, :-1], plain) and not sliced[:, -1].any()


def test_rows_with_fewer_classes():
    """-1 stands for no class, wherever it is; class 0 is not touched by it."""
    x = batch(3, 20, scale=2.0)
    lp = x.t.log_softmax(-1)
    indices = torch.tensor([[3, -1, 5], [-1, -1, 0], [-1, -1, -1]])
    known = torch.zeros(3, 21, dtype=torch.bool).scatter(1, indices % 21, True)[:, :20]
    tail = lp.masked_fill(known, -torch.inf).logsumexp(-1)
    got = run(CASES[2], x.s, SparseTeacher(indices, lp.gather(1, indices.clamp(min=0)), tail))
    for row, classes in enumerate(([3, 5], [0], [])):
        if classes:
            at = torch.tensor([classes])
            one = SparseTeacher(at, lp[row : row + 1].gather(1, at), tail[row : row + 1])
            value, gradient = run(CASES[2], x.s[row : row + 1], one)
            near(got[0][row], value[0])
            near(got[1][row], gradient[0])
        else:  # everything is in the bucket on both sides
            near(got[0][row], torch.zeros((), dtype=F64))
            near(got[1][row], torch.zeros(20, dtype=F64))


@pytest.mark.parametrize("call", [dict(vocab_size=30), dict(vocab_mask=torch.arange(40) % 7 > 0)], ids=["size", "mask"])
@every_merged
def test_padded_vocabularies(case, call):
    x = batch(16, 40, scale=2.0)
    live = torch.arange(40) < 30 if "vocab_size" in call else call["vocab_mask"]
    y = torch.arange(40)[live][x.y % int(live.sum())]
    sparse = teacher(case, x, **call)
    value, gradient = run(case, x.s, sparse, y, **call)
    place = live.long().cumsum(0) - 1  # of a class among the live ones
    small = Batch(x.s[:, live], x.t[:, live], place[y])
    want, by_want = by_textbook(case, small, place[sparse.indices], "bucket")
    near(value, want)
    near(gradient[:, live], by_want)
    assert not gradient[:, ~live].any()


def test_labels_are_kept_out_of_the_bucket():
    x = batch(30, 40)
    y = x.y.clone()
    y[4] = -100
    sparse = SparseTeacher.from_logits(x.t, K, labels=y)
    kept = y != -100
    assert (sparse.indices == y[:, None]).any(-1)[kept].all()
    top = x.t.topk(K).indices
    assert torch.equal(sparse.indices[4], top[4]) and torch.equal(sparse.indices[:, :-1], top[:, :-1])
    torch.testing.assert_close(sparse.log_tail.exp() + sparse.values.exp().sum(-1), torch.ones(30, dtype=F64))


def test_raw_logits_and_shifted_log_probabilities():
    x, T = batch(8, 40), 2.0
    loss, at = kd.ReverseKLLoss(temperature=T, reduction="none"), batch(8, 40).t.topk(K).indices
    rest = (x.t / T).scatter(1, at, -torch.inf).logsumexp(-1)
    raw = SparseTeacher(at, logits=x.t.gather(1, at), log_tail=rest, temperature=T)
    recorded = SparseTeacher.from_logits(x.t, K, T)
    moved = SparseTeacher(at, recorded.values + 3, recorded.log_tail + 3, temperature=T)
    for sparse in (raw, moved):
        near(loss(x.s, sparse), loss(x.s, recorded))


@pytest.mark.parametrize("case", [*TEACHER, *RANK_CASES], ids=str)
def test_log_probabilities_in_place_of_logits(case):
    x = batch(16, 24, scale=3.0)
    loss = getattr(kd, case.name)(**case.options, reduction="none")
    s = x.s.detach().requires_grad_()
    for t in (x.t.log_softmax(-1), x.t + 5):
        got, want = loss(s, t, x.y), loss(s, x.t, x.y)
        near(got, want, "value")
        near(torch.autograd.grad(got.sum(), s)[0], torch.autograd.grad(want.sum(), s)[0], "gradient")


@pytest.mark.parametrize("lead", [(6,), (2, 3)])
def test_a_sparse_gradient(lead):
    x = batch(6, 40)
    indices = x.t.topk(K).indices.clone()
    indices[1, 2] = -1
    kind = dict(tail="renormalise", logits=x.t.gather(1, indices.clamp(min=0)).view(*lead, K))
    s, found = x.s.view(*lead, 40).detach().requires_grad_(), []
    for sparse in (True, False):
        one = SparseTeacher(indices.view(*lead, K), **kind, sparse_gradient=sparse)
        found.append(torch.autograd.grad(kd.ForwardKLLoss(temperature=2.0)(s, one), s)[0])
    assert found[0].is_sparse and found[0]._nnz() == 6 * K - 1
    assert torch.equal(found[0].to_dense(), found[1])


def test_a_sparse_gradient_goes_back_through_a_head():
    x, g = batch(6, 40), torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 5, generator=g, dtype=F64, requires_grad=True) for n in (6, 40))
    found = []
    for sparse in (True, False):
        one = SparseTeacher.from_logits(x.t, K, tail="renormalise", sparse_gradient=sparse)
        found.append(torch.autograd.grad(kd.ForwardKLLoss()(hidden @ head.T, one), (hidden, head)))
    for a, b in zip(*found, strict=True):
        near(a.to_dense() if a.is_sparse else a, b)


def test_a_sparse_gradient_goes_into_a_buffer():
    x = batch(6, 40)
    one = SparseTeacher.from_logits(x.t, K, tail="renormalise", sparse_gradient=True)
    sparse, dense = (kd.ForwardKLLoss().value_and_grad(x.s, one, out=out)[1] for out in (None, torch.empty_like(x.s)))
    assert torch.equal(sparse.to_dense(), dense)
    hidden, head = torch.eye(6, dtype=F64).requires_grad_(), x.s.T.clone()
    value = kd.LinearLoss(kd.ForwardKLLoss(), 4)(hidden, head, teacher_logits=one)
    near(torch.autograd.grad(value, hidden)[0], dense @ x.s.T)


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "spread"])
@pytest.mark.parametrize("reduction", ["mean", "none", "sum", "batchmean"])
def test_no_rows_and_one_row(tail, reduction):
    x = batch(6, 40)
    sparse, loss = SparseTeacher.from_logits(x.t, K, tail=tail), kd.ForwardKLLoss(reduction=reduction, ce_weight=0.5)
    s = x.s.clone().requires_grad_()
    nothing = loss(s[:0], sparse[:0], x.y[:0])
    assert nothing.sum() == 0 and not torch.autograd.grad(nothing.sum(), s)[0].any()
    near(loss(s[0], sparse[0], x.y[0]).reshape(()), loss(s[:1], sparse[:1], x.y[:1]).sum())


def test_half_gradients_survive_the_scale_of_a_grad_scaler():
    x = batch(8, 4000, s_dtype=torch.float16)
    for tail in ("bucket", "spread"):
        sparse, loss = SparseTeacher.from_logits(x.t.float(), K, tail=tail), kd.ForwardKLLoss(reduction="sum")
        s, wide = x.s.clone().requires_grad_(), x.s.double().requires_grad_()
        (65536 * loss(s, sparse)).backward()
        loss(wide, sparse).backward()
        got = s.grad.double() / 65536
        assert got.isinf().sum() <= 8 and (got != 0).double().mean() > 0.99
        small = wide.grad.abs() < 0.5
        assert ((got - wide.grad)[small].abs() <= 1e-3 * wide.grad[small].abs() + 1e-12).all()


@pytest.mark.parametrize("out", [False, True])
@pytest.mark.parametrize("tail", ["bucket", "renormalise", "spread"])
def test_value_and_grad(tail, out):
    x = batch(6, 40)
    sparse, loss = SparseTeacher.from_logits(x.t, K, tail=tail), kd.ForwardKLLoss(ce_weight=1.0)
    s = x.s.clone().requires_grad_()
    value = loss(s, sparse, x.y)
    to = x.s.clone() if out else None
    got, gradient = loss.value_and_grad(to if out else x.s, sparse, x.y, out=to)
    assert torch.equal(got, value) and torch.equal(gradient, torch.autograd.grad(value, s)[0])
    assert to is None or gradient is to


GRADIENTS = pytest.mark.parametrize("tail", ["bucket", "renormalise", "spread", "sparse gradient"])
N, V = 512, 32768
SLACK = N * V * 2  # bytes: logits in 16 bits, so that a dense teacher of any dtype would be seen


def many(tail):
    """A loss, a teacher of N rows and the labels."""
    own, t = tail == "sparse gradient", torch.randn(8, V, generator=torch.Generator().manual_seed(1))
    sparse = SparseTeacher.from_logits(t, 16, 2.0, tail="renormalise" if own else tail, sparse_gradient=own)
    return kd.KDLoss(2.0, 1.0 if own else 0.5), sparse[torch.arange(N) % 8], torch.randint(V, (N,))


@GRADIENTS
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_nothing_is_as_large_as_the_logits_but_the_gradient(tail, dtype):
    s = torch.randn(N, V, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    size, (loss, sparse, y) = 0 if tail == "sparse gradient" else N * V * dtype.itemsize, many(tail)

    def forward():
        with torch.no_grad():
            loss(s, sparse, y)

    def step():
        torch.autograd.grad(loss(s, sparse, y), s)

    if tail == "bucket":  # the way of GPUs as well, in float64 here
        with kd.use_backend("reference"):
            assert allocations(forward).peak < SLACK
    step()
    assert allocations(forward).peak < SLACK
    seen, widest = allocations(step), Widest()
    assert seen.peak < size + SLACK and (seen.largest == size or not size)
    with widest:
        step()
    assert widest.numel == N * V


@GRADIENTS
def test_nothing_is_as_large_as_the_logits_from_hidden_states(tail):
    g, (loss, sparse, y), rows = torch.Generator().manual_seed(0), many(tail), 64
    hidden, head = (torch.randn(n, 8, generator=g, requires_grad=True) for n in (N, V))
    linear = kd.LinearLoss(loss, rows)

    def step():
        torch.autograd.grad(linear(hidden, head, labels=y, teacher_logits=sparse), (hidden, head))

    step()
    seen, widest = allocations(step), Widest()
    assert seen.peak < SLACK
    with widest:
        step()
    assert widest.numel == rows * V


def test_from_logits_makes_no_second_logits():
    t = torch.randn(128, 65536, generator=torch.Generator().manual_seed(0)).bfloat16()
    seen = allocations(lambda: SparseTeacher.from_logits(t, 64))
    assert seen.largest <= 4 * (1 << 20) + 256 and seen.peak < t.numel() * 2


def test_under_torch_compile():
    x = batch(6, 40)
    sparse, loss = SparseTeacher.from_logits(x.t, K), kd.ForwardKLLoss(ce_weight=0.5)
    s = x.s.clone().requires_grad_()
    compiled = torch.compile(lambda s: loss(2 * s, sparse, x.y) + 1, backend="aot_eager")
    want = loss(2 * s, sparse, x.y) + 1
    got = compiled(s)
    near(got, want)
    near(torch.autograd.grad(got, s)[0], torch.autograd.grad(want, s)[0])


def test_a_loss_without_a_teacher_does_not_look_at_it():
    x = batch(6, 40)
    sparse = SparseTeacher.from_logits(x.t, K)
    assert torch.equal(kd.BrierLoss()(x.s, sparse, x.y), kd.BrierLoss()(x.s, labels=x.y))


def test_a_loss_of_ones_own():
    class Bhattacharyya(kd.Loss):
        """-log sum_i sqrt(p_i q_i)."""

        def points(self):
            return kd.Point(student=1), kd.Point(teacher=1), kd.Point(student=0.5, teacher=0.5)

        def value(self, q, p, m):
            return (q.lse + p.lse) / 2 - m.lse

    x = batch(6, 40)
    sparse = SparseTeacher.from_logits(x.t, K)
    q, p = (merged(log_softmax(z), sparse.indices, "bucket") for z in (x.s, x.t))
    near(Bhattacharyya(reduction="none")(x.s, sparse), -((q + p) / 2).logsumexp(-1))


def test_options_set_later_are_those_of_the_term():
    x = batch(6, 40)
    loss = kd.KDLoss(temperature=2.0, alpha=0.5)
    sparse = SparseTeacher.from_logits(x.t, K, 2.0)
    loss(x.s, sparse, x.y)
    loss.alpha = 0.9
    near(loss(x.s, sparse, x.y), kd.KDLoss(temperature=2.0, alpha=0.9)(x.s, sparse, x.y))


def test_the_merged_kl_is_below_the_whole_one():
    x = batch(64, 200, scale=2.0)
    whole = make(CASES[2], reduction="none")(x.s, x.t)
    found = [kd.ForwardKLLoss(reduction="none")(x.s, SparseTeacher.from_logits(x.t, k)) for k in (4, 16, 64, 199)]
    for smaller, larger in zip(found, [*found[1:], whole], strict=True):
        assert (smaller <= larger + 1e-12).all()
    assert rms(found[-1] - whole) < 1e-12


def test_double_backward_is_refused():
    x = batch(4, 40)
    s = x.s.clone().requires_grad_()
    (g,) = torch.autograd.grad(kd.ForwardKLLoss()(s, SparseTeacher.from_logits(x.t, K)), s, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError), match="differentia"):
        torch.autograd.grad(g.sum(), s)


def test_textbook_of_one_row_by_hand():
    s = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).double()
    sparse = SparseTeacher(torch.tensor([[0]]), torch.tensor([[0.7]]).log(), torch.tensor([0.3]).log())
    e = torch.tensor(1.0).double().exp()
    want = forward_kl(torch.stack((e, e.new_tensor(3.0))).log()[None], torch.tensor([[0.7, 0.3]]).double().log(), None)
    torch.testing.assert_close(kd.ForwardKLLoss(reduction="none")(s, sparse), want, rtol=1e-6, atol=0)
