"""Separable losses of one's own, underflow on both sides, and the losses that sort, group and relate rows."""

import pytest
import torch
from accuracy import BACKENDS, F32, F64, Bar, batch, excess, only
from allocations import allocations
from textbook import as_large, grouped_kl, sinkhorn, uld
from torch.autograd import gradcheck, gradgradcheck

import kdkernels as kd
from kdkernels import distributions, elements, rowwise, tape, transport

WITH_KERNELS = [b for b in BACKENDS if b != "cuda"]
on_every_backend = pytest.mark.parametrize("backend", WITH_KERNELS)
GROUPS = torch.tensor([0, 2, 1, 1, 0, 2, 2, 2, 1])

PHI = {  # every function of the tape
    "pearson": lambda u, v: (tape.exp(u) - tape.exp(v)) ** 2,
    "log": lambda u, v: tape.times(tape.exp(v), v - tape.log((tape.exp(u) + tape.exp(v)) / 2)),
    "log1p": lambda u, v: tape.exp(u) * tape.log1p(tape.exp(v - u)),
    "expm1": lambda u, v: tape.exp(v) * tape.expm1((u - v) / 10) * (u - v),
    "softplus": lambda u, v: tape.exp(v) * tape.softplus(u - v),
    "logaddexp": lambda u, v: tape.exp(u) * (tape.logaddexp(u, v) - v),
    "sqrt": lambda u, v: tape.sqrt(tape.exp(u) * tape.exp(v)),
    "where": lambda u, v: tape.where(u < v, tape.exp(u), 3 * tape.exp(v)),
    "divide": lambda u, v: tape.exp(2 * v) / (tape.exp(u) + tape.exp(v)),
    "sigmoid": lambda u, v: tape.exp(v) * tape.sigmoid(u - v) - 0.5,
    "slopes": lambda u, v: tape.with_slopes(tape.exp(u + v), (u, tape.exp(u + v)), (v, tape.exp(v) * tape.exp(u))),
}


def declared(phi, h=None):
    class Declared(kd.SeparableLoss):
        def phi(self, log_q, log_p):
            return phi(log_q, log_p)

        def value(self, total):
            return total if h is None else h(total)

    return Declared


def by_torch(phi, h, s, t, T, dtype):
    s, t = (x.detach().to(dtype).requires_grad_() for x in (s, t))
    total = phi((s / T).log_softmax(-1), (t / T).log_softmax(-1)).sum(-1)
    value = total if h is None else h(total)
    return value.detach(), *torch.autograd.grad(value.sum(), (s, t))


@on_every_backend
@pytest.mark.parametrize("name", PHI)
def test_a_loss_of_ones_own(name, backend):
    s, t, _ = batch(6, 33 if backend == "triton" else 700, scale=1.5).to(F32 if backend == "triton" else F64)
    h = (lambda x: 2 * x * x + x) if name in ("pearson", "where") else None
    leaves = [x.clone().requires_grad_() for x in (s, t)]
    with only(backend):
        value = declared(PHI[name], h)(temperature=1.5, reduction="none")(*leaves)
        grads = torch.autograd.grad(value.sum(), leaves)
    want, own = (by_torch(PHI[name], h, s, t, 1.5, dtype) for dtype in (F64, F32))
    for what, a, e, o in zip(("value", "ds", "dt"), (value.detach(), *grads), want, own, strict=True):
        assert not (why := excess(a, Bar(e, o, e, 9 * torch.finfo(F64).eps), s.dtype)), f"{what}: {why}"


def test_heads_of_many_classes():
    """A head is the largest probabilities that sum to mu or less, equal ones together; however many they are."""
    g = torch.Generator().manual_seed(0)
    rows = torch.stack([5 * torch.randn(9000, generator=g), 0.1 * torch.randn(9000, generator=g), torch.zeros(9000)])
    rows[0, 1] = rows[0, 0] = rows[0].max() + 1
    p = rows.double().softmax(-1)
    p = torch.cat((p, torch.tensor([[0.25, 0.5, 0.25] + [0.0] * 8997])))
    reached = torch.stack([as_large(row) for row in p])
    for mu in (0.3, 0.5, 0.95):
        assert torch.equal(distributions._head(p, mu), (reached <= mu) | (p == p.amax(-1, keepdim=True)))


def test_what_a_tape_cannot_record_is_named():
    with pytest.raises(TypeError, match=r"Declared.phi is traced"):
        declared(lambda u, v: torch.exp(u))()
    with pytest.raises(NotImplementedError, match="phi"):
        kd.SeparableLoss()
    constant = declared(lambda u, v: 2.0)(reduction="none")
    assert constant(*torch.randn(2, 3, 5)).tolist() == [10.0] * 3


def test_registers_are_shared():
    """A long chain takes as many registers as are alive at a time, not one for each instruction."""
    def chain(u, v):
        for _ in range(30):
            u = tape.exp(u - v)
        return u

    length, early, registers, *_ = elements.lowered(chain)
    assert length >= early >= 60 and registers < 40
    forward = elements.lowered(lambda u, v: tape.detach(tape.exp(u)) + tape.exp(v))
    assert forward[0] == 3 and forward[1] == 3


@on_every_backend
@pytest.mark.parametrize("name", ["JSDLoss", "SkewKLLoss", "SkewReverseKLLoss", "TVDLoss"])
def test_underflow_on_both_sides(name, backend):
    """Classes whose probabilities are 0 in float32 on both sides, where the log of their mixture is -inf."""
    s, t, _ = batch(5, 40, scale=2.0).to(F32)
    s, t = s.clone(), t.clone()
    s[:, 10:], t[:, 10:] = s[:, 10:] - 300, t[:, 10:] - 400
    s[0, 3], t[1, 4], s[2, 20], t[2, 20] = -torch.inf, -torch.inf, -torch.inf, -torch.inf
    results = []
    for a, b in ((s, t), (s[:, :10], t[:, :10])):
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        with only(backend):
            value = getattr(kd, name)(reduction="none")(a, b)
            results.append([value.detach(), *torch.autograd.grad(value.sum(), (a, b))])
    (value, *grads), (few, *few_grads) = results
    torch.testing.assert_close(value, few, rtol=1e-6, atol=1e-7)
    for grad, want in zip(grads, few_grads, strict=True):
        assert grad.isfinite().all() and (grad[:, 10:].abs() < 1e-30).all()
        torch.testing.assert_close(grad[:, :10], want, rtol=1e-5, atol=1e-7)


def test_a_share_out_of_range_raises():
    for make in (lambda: kd.JSDLoss(1.5), lambda: kd.JSDLoss(-0.1), lambda: kd.SkewKLLoss(1.0),
                 lambda: kd.SkewReverseKLLoss(-0.1), lambda: kd.SinkhornLoss(epsilon=0.0), lambda: kd.AKLLoss(0.0),
                 lambda: kd.AKLLoss(1.0)):  # fmt: skip
        with pytest.raises(ValueError, match=r"(beta|alpha|mu|epsilon) must be [<>]"):
            make()
    with pytest.raises(TypeError, match="detach_mixture"):
        kd.SkewReverseKLLoss(detach_mixture=1)


@pytest.mark.parametrize("widths", [(30, 30), (20, 37), (37, 20)], ids=str)
def test_uld_of_two_vocabularies(widths):
    s, t = batch(4, widths[0], scale=2.0).s, batch(4, widths[1], scale=2.0, seed=1).t
    pad = [torch.nn.functional.pad(x, (0, max(widths) - x.shape[-1]), value=-torch.inf) for x in (s, t)]
    s, t = s.clone().requires_grad_(), t.clone().requires_grad_()
    torch.testing.assert_close(kd.ULDLoss(reduction="none")(s, t), uld(*pad, None), rtol=1e-14, atol=1e-15)
    for backend in ("reference", "cpu"):
        with kd.use_backend(backend):
            assert gradcheck(kd.ULDLoss(ce_weight=0.5), (s, t, torch.tensor([0, 3, -100, 7])))
    _, gradient = kd.ULDLoss().value_and_grad(s.detach(), t.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(kd.ULDLoss()(s, t), s)[0])
    _, total = kd.ULDLoss().value_and_grad(s.detach(), t.detach(), out=torch.ones_like(s).detach(), accumulate=True)
    torch.testing.assert_close(total, gradient + 1)
    low = kd.ULDLoss(reduction="none")(s.bfloat16(), t.float())
    torch.testing.assert_close(low.double(), uld(*(x.bfloat16().double() if i == 0 else x.float().double()
                                                   for i, x in enumerate(pad)), None), rtol=1e-6, atol=0)  # fmt: skip


@pytest.mark.parametrize("equal", [False, True])
def test_kernels_of_uld(equal):
    """The definition's numbers, of which many logits are equal or none, and none from the order of the classes."""
    s, t, y = batch(6, 300, scale=2.0)
    s, t = ((x * 2).round() / 2 if equal else x.clone() for x in (s, t))
    s[1], s[2, 5], t[3, 7], s[4, 9], t[4, 9] = torch.nan, -torch.inf, -torch.inf, -torch.inf, -torch.inf
    call = dict(temperature=torch.linspace(0.5, 2.0, 6), row_weight=torch.arange(6.0), vocab_size=290,
                vocab_mask=torch.arange(300) % 7 != 3)  # fmt: skip
    y = torch.where(call["vocab_mask"][y] & (y < 290), y, 0).index_fill(0, torch.tensor([1]), -100)
    order = torch.cat((torch.randperm(290, generator=torch.Generator().manual_seed(0)), torch.arange(290, 300)))
    results = []
    for backend, at in (("reference", torch.arange(300)), ("cpu", torch.arange(300)), ("cpu", order)):
        for options in ({}, dict(t_squared=True, ce_weight=0.5, kd_weight=0.3), dict(reduction="none")):
            leaves = [x[:, at].clone().requires_grad_() for x in (s, t)]
            moved = torch.where(y < 0, y, at.argsort()[y.clamp(min=0)])
            with only(backend):
                value = kd.ULDLoss(**options)(*leaves, moved, **(call | dict(vocab_mask=call["vocab_mask"][at])))
            grads = torch.autograd.grad(value.sum(), leaves)
            results.append([value.detach(), *(x[:, at.argsort()] for x in grads)])
    for k in range(3):
        for want, got, moved in zip(*results[k::3], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)
            torch.testing.assert_close(moved, want, rtol=1e-11, atol=1e-13)


def test_kernels_of_uld_in_single():
    s, t, _ = batch(8, 5000, scale=2.0, s_dtype=torch.bfloat16, t_dtype=F32)
    with only("cpu"):
        value, grad = kd.ULDLoss().value_and_grad(s, t)
    with kd.use_backend("reference"):
        exact, want = kd.ULDLoss().value_and_grad(s.double(), t.double())
    assert abs(value - exact) < 1e-6
    assert (grad.double() - want).norm() < 0.01 * want.norm()


@pytest.mark.parametrize("loss", [
    kd.ULDLoss(reduction="none"), kd.GroupedKLLoss(torch.arange(3000) % 4, reduction="none"),
    kd.GroupedKLLoss("label", balanced=True, reduction="none"), kd.GroupedKLLoss(reduction="none"),
], ids=["ULD", "groups", "label", "one group"])  # fmt: skip
@pytest.mark.parametrize("V", [30, 3000])
def test_triton_of_sorted_and_grouped_rows(loss, V):
    """The C++ kernels' numbers in float64, and what they do with NaN, holes, equal logits and rows left out."""
    s, t, y = batch(6, V, scale=2.0, s_dtype=torch.bfloat16, t_dtype=F32)
    s, t = (2 * s).round() / 2, t.clone()
    s[1, 3], s[2, 5], t[3, 7], s[4, 9], t[4, 9], t[5] = torch.nan, -torch.inf, -torch.inf, -torch.inf, -torch.inf, 1.0
    mask = torch.arange(V) % 7 != 3
    y = torch.where(mask[y] & (y < V - 5), y, 0).index_fill(0, torch.tensor([0]), -100)
    calls = [{}, dict(temperature=torch.linspace(0.5, 2.0, 6), row_weight=torch.arange(6.0)[[0, 1, 2, 3, 0, 5]],
                      vocab_size=V - 5, vocab_mask=mask)]  # fmt: skip
    for call in calls:
        results = []
        for backend, dtypes in (("cpu", (F64, F64)), ("triton", (torch.bfloat16, F32))):
            leaves = [x.to(dtype).requires_grad_() for x, dtype in zip((s, t), dtypes, strict=True)]
            with only(backend):
                value = loss(*leaves, y, **call)
            results.append([value.detach(), *torch.autograd.grad(value.sum(), leaves)])
        for want, got, bar in zip(*results, (1e-6, 5e-3, 1e-5), strict=True):
            size = want.nan_to_num(0, 0, 0).abs().amax(-1, keepdim=True).clamp(min=1e-3)
            torch.testing.assert_close(got.double() / size, want / size, rtol=bar, atol=bar, equal_nan=True)


def test_uld_refuses():
    s, t = torch.randn(2, 5), torch.randn(2, 7)
    with pytest.raises(ValueError, match="vocab_mask"):
        kd.ULDLoss()(s, t, vocab_mask=torch.ones(5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"labels.*5"):
        kd.ULDLoss(ce_weight=1.0)(s, t, torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="teacher_logits"):
        kd.ULDLoss()(s, t[:1])


@pytest.mark.parametrize("options", [{}, dict(between=2.0, within=0.3), dict(balanced=True)], ids=str)
def test_groups(options):
    s, t, _ = batch(5, 9, scale=2.0)
    s, t = s.clone().requires_grad_(), t.clone().requires_grad_()
    loss = kd.GroupedKLLoss(GROUPS, reduction="none", **options)
    want = grouped_kl(s, t, None, GROUPS, **options)
    torch.testing.assert_close(loss(s, t), want, rtol=1e-13, atol=1e-15)
    assert gradcheck(loss, (s, t))
    with kd.use_backend("reference"):
        assert gradcheck(loss, (s, t)) and gradgradcheck(kd.GroupedKLLoss(GROUPS, **options), (s, t))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    moved = kd.GroupedKLLoss(GROUPS[order], reduction="none", **options)(s[:, order], t[:, order])
    torch.testing.assert_close(moved, want, rtol=1e-13, atol=1e-15)


def test_groups_split_kl_exactly():
    """KL(p || q) = KL(P || Q) + sum_g P_g KL(p_g || q_g)."""
    s, t, _ = batch(50, 9, scale=3.0)
    for given in (GROUPS, torch.arange(9), torch.zeros(9, dtype=torch.int32), GROUPS.tolist()):
        parts = [kd.GroupedKLLoss(given, between=a, within=b, reduction="none")(s, t) for a, b in ((1, 0), (0, 1))]
        whole = kd.GroupedKLLoss(given, reduction="none")(s, t)
        torch.testing.assert_close(sum(parts), kd.ForwardKLLoss(reduction="none")(s, t), rtol=1e-13, atol=1e-15)
        torch.testing.assert_close(sum(parts), whole, rtol=1e-14, atol=1e-16)
    s[:, GROUPS == 1] = t[:, GROUPS == 1] = -torch.inf  # a group without classes
    got = kd.GroupedKLLoss(GROUPS, reduction="none")(s, t)
    torch.testing.assert_close(got, kd.ForwardKLLoss(reduction="none")(s, t), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("options", [dict(alpha=0.7, beta=2.0), dict(temperature=3.0, ce_weight=0.5)], ids=str)
def test_dkd_is_the_kl_of_two_groups(options):
    """Of the label and of all other classes, each with weight 1."""
    s, t, y = batch(6, 9, scale=2.0)
    y, weights = y.index_fill(0, torch.tensor([2]), -100), (options.pop("alpha", 1.0), options.pop("beta", 8.0))
    results = []
    grouped = kd.GroupedKLLoss("label", *weights, balanced=True, t_squared=True, **options)
    for loss in (kd.DKDLoss(*weights, **options), grouped):
        leaves = [x.clone().requires_grad_() for x in (s, t)]
        value = loss(*leaves, y)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("chunk", [1 << 20, 20])
def test_groups_of_each_row(chunk, monkeypatch):
    """The student's two largest classes and the rest, row by row."""
    monkeypatch.setattr(rowwise, "CLASSES", chunk)
    s, t, _ = batch(5, 9, scale=2.0)

    def largest(log_q, log_p):
        assert not log_q.requires_grad and log_p.exp().sum(-1).allclose(log_p.new_ones(len(log_p)))
        return torch.zeros_like(log_q, dtype=torch.int32).scatter_(-1, log_q.topk(2).indices, 1)

    s = s.clone().requires_grad_()
    value = kd.GroupedKLLoss(largest, within=0.3, reduction="none")(s, t)
    (grad,) = torch.autograd.grad(value.sum(), s)
    for i in range(5):
        row = s[i : i + 1].detach().requires_grad_()
        want = grouped_kl(row, t[i : i + 1], None, largest(row.detach(), t[i : i + 1].log_softmax(-1))[0], within=0.3)
        torch.testing.assert_close(value[i : i + 1], want, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(grad[i : i + 1], torch.autograd.grad(want, row)[0], rtol=1e-11, atol=1e-14)


def test_groups_are_checked():
    s, t = torch.randn(2, 3, 12)
    for groups, error in (([0.5, 1.0], TypeError), ([[0, 1]], ValueError), ([0, -1], ValueError), ([], TypeError),
                          ("labels", ValueError), (torch.zeros(0, dtype=torch.int64), ValueError)):  # fmt: skip
        with pytest.raises(error, match="groups"):
            kd.GroupedKLLoss(groups)
    with pytest.raises(ValueError, match=r"groups.*12.*9"):
        kd.GroupedKLLoss(GROUPS)(s, t)
    with pytest.raises(ValueError, match="GroupedKLLoss needs labels"):
        kd.GroupedKLLoss("label")(s, t)
    for returned, error in ((GROUPS, ValueError), (s, TypeError), (s.long() - 100, ValueError)):
        with pytest.raises(error, match="groups"):
            kd.GroupedKLLoss(lambda log_q, log_p, it=returned: it)(s, t)


def test_sinkhorn():
    s, t, _ = batch(6, 9, scale=2.0)
    y = torch.tensor([1, -100, 2, 3, -100, 0])
    kept, (s, t) = y != -100, (x.clone() for x in (s, t))
    want = sinkhorn((s / 2).softmax(-1), (t / 2).softmax(-1))
    torch.testing.assert_close(kd.SinkhornLoss()(s, t), want, rtol=1e-13, atol=0)
    part = sinkhorn((s[kept] / 3).softmax(-1), (t[kept] / 3).softmax(-1), 0.5, 3)
    s[1], t[4] = torch.nan, torch.inf
    loss = kd.SinkhornLoss(temperature=3.0, epsilon=0.5, iterations=3, t_squared=True, kd_weight=2.0)
    s.requires_grad_(), t.requires_grad_()
    value = loss(s, t, y)
    torch.testing.assert_close(value, 18 * part, rtol=1e-13, atol=0)
    for grad in torch.autograd.grad(value, (s, t)):
        assert (grad[~kept] == 0).all() and grad[kept].abs().amax(-1).gt(0).all()
    s, t = (x.detach()[kept].clone().requires_grad_() for x in (s, t))
    assert gradcheck(kd.SinkhornLoss(iterations=3, ce_weight=1.0), (s, t, y[kept]))
    with kd.use_backend("reference"):
        assert gradcheck(kd.SinkhornLoss(iterations=3, ce_weight=1.0), (s, t, y[kept]))


def test_sinkhorn_at_a_small_epsilon_and_without_rows():
    s, t, _ = batch(6, 9, scale=3.0)
    q, p = (s / 2).softmax(-1), (t / 2).softmax(-1)
    for epsilon in (0.02, 1e-3, 1e-5):  # where exp(-C / epsilon) is 0 throughout
        cost = (q[:, None] - p).abs().sum(-1)
        log_plan = -cost / epsilon
        for _ in range(20):
            log_plan = log_plan - log_plan.logsumexp(1, keepdim=True)
            log_plan = log_plan - log_plan.logsumexp(0)
        leaf = s.clone().requires_grad_()
        value = kd.SinkhornLoss(epsilon=epsilon)(leaf, t)
        torch.testing.assert_close(value, (log_plan.exp() * cost).sum() / 6, rtol=1e-9, atol=0)
        assert torch.autograd.grad(value, leaf)[0].isfinite().all() and value > 0.1
    none = s[:0].clone().requires_grad_()
    value = kd.SinkhornLoss()(none, t[:0])
    value.backward()
    assert value == 0 and none.grad.shape == (0, 9)


def test_sinkhorn_some_classes_at_a_time(monkeypatch):
    s, t, y = batch(6, 90, scale=2.0)
    y = y.index_fill(0, torch.tensor([1]), -100)
    s, t = s.clone(), t.clone()
    s[2, :30] = t[3, 60:] = -torch.inf
    call = dict(vocab_size=80, vocab_mask=torch.arange(90) % 5 != 2, temperature=torch.linspace(1.0, 3.0, 6))
    y = torch.where(y < 0, y, 0)
    for dtype, bar in ((F64, 1e-12), (F32, 1e-5), (torch.bfloat16, 1e-2)):
        results = []
        for classes in (1 << 20, 20):  # 13 at a time
            monkeypatch.setattr(transport, "CLASSES", classes)
            leaves = [x.to(dtype).requires_grad_() for x in (s, t)]
            value = kd.SinkhornLoss()(*leaves, y, **call)
            results.append([value.detach(), *torch.autograd.grad(value, leaves)])
        for whole, pieces in zip(*results, strict=True):
            torch.testing.assert_close(pieces, whole, rtol=bar, atol=bar * whole.abs().max().item())
    exact = kd.SinkhornLoss()(s, t, y, **call)
    torch.testing.assert_close(kd.SinkhornLoss()(s.float(), t.float(), y, **call).double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("loss", "room"), [
    (kd.JSDLoss(), 0.01), (kd.AKLLoss(), 0.4), (kd.ULDLoss(), 0.01), (kd.SinkhornLoss(), 2.0),
    (kd.GroupedKLLoss(torch.arange(20000) % 5), 0.01), (kd.GroupedKLLoss("label"), 0.01)])  # fmt: skip
def test_memory_of_a_step(loss, room, monkeypatch):
    """Beside the gradient, in units of the logits; Sinkhorn's gradient is put together from pieces."""
    monkeypatch.setattr(transport, "CLASSES", 1 << 16)
    monkeypatch.setattr(distributions, "CLASSES", 1 << 16)
    rows = batch(100, 20000, s_dtype=F32)
    s = rows.s.clone().requires_grad_()
    seen = allocations(lambda: torch.autograd.grad(loss(s, rows.t, rows.y), s))
    assert s.nbytes <= seen.peak <= (1 + room) * s.nbytes, seen.peak / s.nbytes


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("V", [1, 15, 100, 5000])
def test_distances_of_rows(V, dtype):
    """The kernels beside float64: no further off than torch and a few ulp; equal entries have no slope."""
    g = torch.Generator().manual_seed(V)
    x, y = torch.rand(3, V, generator=g).to(dtype), torch.rand(5, V, generator=g).to(dtype)
    y[1, ::2], by = x[2, ::2], torch.randn(3, 5, generator=g, dtype=F64)
    given = [[a.clone().to(kind).requires_grad_() for a in (x, y)] for kind in (dtype, F64, dtype)]
    before = kd.backends.calls["cpu", "row_distances"], kd.backends.calls["cpu", "row_distances_slopes"]
    found = [transport._Distances.apply(*given[0], kd.backends.cpu.DISTANCES),
             *(torch.cdist(*pair, p=1.0) for pair in given[1:])]  # fmt: skip
    slopes = [torch.autograd.grad((value * by).sum(), pair) for value, pair in zip(found, given, strict=True)]
    assert kd.backends.calls["cpu", "row_distances"] == before[0] + 1
    assert kd.backends.calls["cpu", "row_distances_slopes"] == before[1] + 2
    for own, exact, torchs in zip(*([a, *b] for a, b in zip(found, slopes, strict=True)), strict=True):
        error, allowed = ((z.double() - exact).norm() for z in (own, torchs))
        assert error <= allowed + 2 * torch.finfo(dtype).eps * exact.norm()


def test_sinkhorn_refuses():
    s, t = torch.randn(2, 3, 5)
    with pytest.raises(ValueError, match="row_weight"):
        kd.SinkhornLoss()(s, t, row_weight=torch.ones(3))
    with pytest.raises(ValueError, match="temperature must be one number for t_squared"):
        kd.SinkhornLoss(t_squared=True)(s, t, temperature=torch.ones(3))
    with pytest.raises(ValueError, match="reduction"):
        kd.SinkhornLoss(reduction="none")
    with pytest.raises(ValueError, match="row-wise"):
        kd.LinearLoss(kd.SinkhornLoss())(torch.randn(3, 2), torch.randn(5, 2), teacher_logits=t)
    with kd.use_backend("cpu"), pytest.raises(kd.BackendUnavailable, match="SinkhornLoss"):
        kd.SinkhornLoss()(s, t)


@pytest.mark.parametrize("make", [kd.AKLLoss, kd.ULDLoss, lambda **o: kd.GroupedKLLoss(GROUPS, **o)])
def test_a_few_rows_at_a_time(make, monkeypatch):
    """In chunks of two rows: the same value and gradients, and nothing from a row that is left out."""
    s, t, y = batch(5, 9, scale=2.0, s_dtype=torch.bfloat16, t_dtype=F32)
    s, t, y = s.clone(), t.clone(), y.index_fill(0, torch.tensor([1]), -100)
    s[1] = torch.nan
    T, weight, results = torch.tensor([1.0, 2.0, 0.5, 1.5, 1.0]), torch.arange(5.0), []
    for classes in (1 << 20, 20):
        monkeypatch.setattr(rowwise, "CLASSES", classes)
        a, b = s.clone().requires_grad_(), t.clone().requires_grad_()
        value = make(ce_weight=0.5)(a, b, y, temperature=T, row_weight=weight)
        value.backward()
        results.append((value.detach(), a.grad, b.grad))
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=1e-9)
    a = s[2:].double().requires_grad_()
    with kd.use_backend("reference"):
        (ds,) = torch.autograd.grad(make()(a, t[2:].double()), a, create_graph=True)
    assert torch.autograd.grad(ds.pow(2).sum(), a)[0].abs().max() > 0


def test_weights_of_each_group_and_groups_that_look_at_the_label():
    s, t, y = batch(6, 9, scale=2.0)
    y = y.index_fill(0, torch.tensor([2]), -100)
    kept = y >= 0
    split = [kd.GroupedKLLoss(GROUPS, between=0.0, within=within, reduction="none")(s, t)
             for within in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))]  # fmt: skip
    torch.testing.assert_close(sum(split), kd.GroupedKLLoss(GROUPS, between=0.0, reduction="none")(s, t))
    assert min(x.abs().min() for x in split) > 1e-6
    with pytest.raises(ValueError, match=r"within.*3 groups, got 2"):
        kd.GroupedKLLoss(GROUPS, within=(1.0, 2.0))(s, t)
    with pytest.raises(TypeError, match="within"):
        kd.GroupedKLLoss(GROUPS, within=(1.0, "2"))
    hurt = s.clone()
    hurt[:, 0] = -torch.inf  # in the group that is left out, of which there is nothing to learn within
    one = kd.GroupedKLLoss(GROUPS, between=0.0, within=(0.0, 1.0, 1.0), balanced=True)
    leaf = hurt.requires_grad_()
    value = one(leaf, t)
    assert value.isfinite() and torch.autograd.grad(value, leaf)[0].isfinite().all()

    def own(log_q, log_p, labels):
        return (torch.arange(9) == labels[:, None]).long()

    for options in (dict(within=0.3), dict(within=(0.0, 0.3), balanced=True)):
        looking, label = (kd.GroupedKLLoss(groups, between=2.0, **options) for groups in (own, "label"))
        torch.testing.assert_close(looking(s, t, y), label(s, t, y), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(label(s[kept], t[kept], y[kept]), label(s, t, y))
    with pytest.raises(ValueError, match="needs labels"):
        kd.GroupedKLLoss(own)(s, t)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("widths", [(20, 37), (37, 20)], ids=str)
def test_uld_from_heads_of_two_vocabularies(widths, reduction):
    g = torch.Generator().manual_seed(1)
    hidden, others = torch.randn(7, 4, generator=g, dtype=F64), torch.randn(7, 5, generator=g, dtype=F64)
    heads = [torch.randn(v, h, generator=g, dtype=F64) for v, h in zip(widths, (4, 5), strict=True)]
    bias = torch.randn(widths[1], generator=g, dtype=F64)
    y, loss = torch.tensor([0, 3, -100, 7, 1, 2, 5]), kd.ULDLoss(ce_weight=0.5, reduction=reduction)
    t, found = others @ heads[1].T + bias, []
    ways = (lambda s, w: loss(s @ w.T, t, y),
            lambda s, w: kd.LinearLoss(loss, chunk=3)(s, w, teacher_logits=t, labels=y),
            lambda s, w: kd.LinearLoss(loss)(s, w, others, heads[1], y, teacher_bias=bias))  # fmt: skip
    for way in ways:
        leaves = hidden.clone().requires_grad_(), heads[0].clone().requires_grad_()
        value = way(*leaves)
        found.append((value.detach(), *torch.autograd.grad(value.square().sum(), leaves)))
    for one in found[1:]:
        torch.testing.assert_close(one, found[0])
    cut, y = dict(vocab_size=18, labels=y), y.clamp(max=17)
    got = kd.LinearLoss(loss, chunk=3)(hidden, heads[0], others, heads[1], teacher_bias=bias, **cut)
    torch.testing.assert_close(got, loss((hidden @ heads[0].T)[:, :18], t[:, :18], y))
    for wrong, message in ((dict(vocab_mask=torch.ones(widths[0], dtype=torch.bool)), "student's shape"),
                           (dict(labels=torch.full((7,), widths[0])), "labels must be in")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            kd.LinearLoss(loss)(hidden, heads[0], others, heads[1], **(dict(labels=y) | wrong))
    with pytest.raises(ValueError, match="student's shape"):
        kd.LinearLoss(loss + kd.ForwardKLLoss(reduction=reduction))(hidden, heads[0], others, heads[1], y)
