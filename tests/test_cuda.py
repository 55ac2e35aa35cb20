"""A training step on a GPU: the CUDA kernels in the forms they have, two sweeps and clusters of every size, emulated
where there is no GPU; and Triton's."""

import contextlib

import emulated
import pytest
import torch
from accuracy import BF16, F16, F32, Bar, batch, excess, faults, make, only, run, textbook
from textbook import CASES

import kdkernels as kd

NO_GPU = not torch.cuda.is_available()
# Blocks with little shared memory make large clusters for small rows.
FORMS = {
    "two sweeps": dict(major=8),
    "17 KB a block": dict(shared=17_000, processors=32),
    "13 KB a block": dict(shared=13_000, processors=32),
    "10 KB a block": dict(shared=10_000, processors=32),
}
# of them WTTM and KD have points that are twice another
SAMPLE = [c for c in CASES if str(c) in ("KDLoss-alpha=0.3-temperature=3.0", "ForwardKLLoss", "WTTMLoss-gamma=0.5",
          "AlphaBetaLoss-alpha=0.2-beta=0.7", "AlphaBetaLoss-alpha=0.0-beta=0.0", "DKDLoss-alpha=1.0-beta=8.0",
          "BrierLoss", "TAIDLoss-tau=0.4")]  # fmt: skip
in_forms = pytest.mark.parametrize("form", FORMS)
in_every_step = pytest.mark.parametrize("form", [*FORMS, "triton"])


def device(form, **more):
    return emulated.machine(**FORMS[form], **more) if NO_GPU else contextlib.nullcontext()


@contextlib.contextmanager
def stepping(form, **more):
    triton = form == "triton"
    with contextlib.nullcontext() if triton else device(form, **more), only("triton" if triton else "cuda"):
        yield


@pytest.mark.skipif(not NO_GPU, reason="sizes of the emulated device")
def test_clusters_grow_with_the_row():
    rows = batch(N=2, V=1001, s_dtype=F32)
    widest = {}
    for name, settings in {**FORMS, "enough": {}}.items():
        for loss in (kd.ForwardKLLoss(), kd.AlphaBetaLoss(0.2, 0.7)):
            with emulated.machine(**settings) as ranks, kd.use_backend("cuda"):
                loss.value_and_grad(rows.s, rows.t)
                widest.setdefault(name, []).append(ranks())
    assert widest == {  # 1 also where there is too little for a cluster, and two sweeps are made
        "two sweeps": [1, 1], "enough": [1, 1], "17 KB a block": [16, 4], "13 KB a block": [4, 16],
        "10 KB a block": [8, 1],
    }  # fmt: skip


@in_forms
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_forms_agree_with_the_textbook(case, dtype, form):
    regimes = [dict(V=1001, scale=3.0), dict(V=333, scale=50.0), dict(V=1200, saturated=60.0), dict(V=40, offset=300.0)]
    with device(form):
        for regime in regimes:
            rows = batch(N=7, **regime, s_dtype=dtype)
            found = faults(case, rows, run(case, "cuda", rows))
            assert not found, (regime, found)


@in_forms
def test_every_order_of_threads_gives_the_same_bits(form):
    rows = batch(N=9, V=1001, scale=3.0, s_dtype=BF16)
    results = set()
    for seed in range(6):
        with device(form, seed=seed), kd.use_backend("cuda"):
            value, gradient = kd.KDLoss().value_and_grad(rows.s, rows.t, rows.y)
        results.add((value.item(), gradient.float().sum().item(), gradient.view(torch.int16).long().sum().item()))
    assert len(results) == 1


@in_every_step
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_gradient_may_take_the_logits_place(form, seed):
    rows = batch(N=9, V=1001, scale=3.0, s_dtype=F32)
    loss = kd.DKDLoss()
    with stepping(form, seed=seed):
        value, gradient = loss.value_and_grad(rows.s, rows.t, rows.y)
        buffer = rows.s.clone()
        again, out = loss.value_and_grad(buffer, rows.t, rows.y, out=buffer)
    assert out is buffer and torch.equal(value, again) and torch.equal(buffer, gradient)


@in_every_step
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F16, F32), (BF16, F16)], ids=str)
def test_any_alignment_of_the_rows(form, dtypes):
    """Views that begin at odd elements, with gaps between the rows, of tensors of three dimensions."""
    case = next(c for c in CASES if c.name == "KDLoss")
    wide = batch(N=12, V=420, scale=3.0, s_dtype=dtypes[0], t_dtype=dtypes[1])
    for first, length in ((0, 331), (1, 331), (3, 417), (5, 64)):
        s = wide.s.view(3, 4, 420)[:, 1:, first : first + length]
        t = wide.t.view(3, 4, 420)[:, 1:, 2 : 2 + length]
        y = torch.arange(9).view(3, 3) % length
        with stepping(form):
            leaf = s.detach().clone().requires_grad_()
            make(case)(leaf, t, y).backward()
            strided = s.detach().requires_grad_()
            value = make(case)(strided, t, y)
            value.backward()
        truth = textbook(case, type(wide)(s.reshape(9, -1), t.reshape(9, -1), y.reshape(-1)), teacher_grad=False)
        assert abs(value.item() - truth.value.mean().item()) < 1e-6 * truth.value.mean().item()
        error = (strided.grad.double() - leaf.grad.double()).norm() / leaf.grad.double().norm()
        assert error <= 2 * torch.finfo(dtypes[0]).eps  # another alignment, another order of sums


@in_every_step
def test_rows_left_out_masks_and_padding(form):
    rows = batch(N=11, V=700, scale=3.0, s_dtype=F32)
    y, mask = rows.y % 600, torch.ones(700, dtype=torch.bool)
    y[::3], mask[601:650] = -100, False
    s, t = rows.s.clone(), rows.t.clone()
    s[::3], s[:, 650:], t[:, 601:650] = float("nan"), float("nan"), float("inf")
    call = dict(vocab_size=650, vocab_mask=mask, row_weight=torch.linspace(0, 2, 11))
    loss = kd.KDLoss()
    with stepping(form):
        value, gradient = loss.value_and_grad(s, t, y, **call)
    with kd.use_backend("reference"):
        leaf = s.double().requires_grad_()
        expected = loss(leaf, t.double(), y, **call)
        expected.backward()
    assert abs(value.item() - expected.item()) < 1e-6
    assert (gradient - leaf.grad).abs().max() < 1e-7
    assert not gradient[::3].any() and not gradient[:, 601:].any()


@in_every_step
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_gradient_may_be_added_to_a_buffer(form, dtype):
    rows = batch(N=9, V=1001, scale=3.0, saturated=20.0, s_dtype=dtype)
    rows.y[4] = -100
    loss = kd.DKDLoss(reduction="sum")
    before = torch.randn(rows.s.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    with stepping(form):
        value, gradient = loss.value_and_grad(rows.s.float(), rows.t, rows.y)
        again, total = loss.value_and_grad(rows.s, rows.t, rows.y, out=before.clone(), accumulate=True)
    assert abs(again - value) <= 1e-6 * abs(value)
    exact = before.double() + gradient.double()
    assert ((total.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs().clamp(min=1e-3)).all()


@in_every_step
def test_a_label_outside_the_vocabulary_spoils_its_row_alone(form):
    rows = batch(N=6, V=300, s_dtype=F32)
    y = rows.y.clone()
    y[2], y[4] = 300, -7
    good = [0, 1, 3, 5]
    with stepping(form):
        value = kd.KDLoss(reduction="none")(rows.s, rows.t, y)
        _, gradient = kd.KDLoss(reduction="sum").value_and_grad(rows.s, rows.t, y)
        right = kd.KDLoss(reduction="none")(rows.s[good], rows.t[good], y[good])
    assert value[[2, 4]].isnan().all() and torch.equal(value[good], right)
    assert not gradient[[2, 4]].any() and gradient[good].isfinite().all()
    named = r"labels must be in \[0, 300\) or ignore_index=-100, got 300"
    with kd.use_backend("cuda"), pytest.raises(ValueError, match=named):
        kd.KDLoss(validate=True)(rows.s, rows.t, y)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_backward_scales_by_what_it_is_given(dtype, backend):
    rows = batch(N=8, V=77, s_dtype=dtype)
    case = next(c for c in CASES if c.name == "ForwardKLLoss")
    exact = textbook(case, rows, teacher_grad=False)
    for factor in (1.0, 0.5, 0.3):
        leaf = rows.s.clone().requires_grad_()
        with only(backend):
            loss = kd.ForwardKLLoss(reduction="sum")(leaf, rows.t)
            (loss * factor).backward(retain_graph=True)
            first, leaf.grad = leaf.grad, None
            (loss * factor).backward()
        rounded = (exact.ds * factor).to(dtype)
        bar = Bar(exact.ds * factor, (exact.ds.to(dtype) * factor).to(dtype), rounded, 0.0)
        assert not excess(first, bar, dtype)
        # by other kernels, which sum up in another order
        assert (first.double() - leaf.grad.double()).norm() <= 2 * torch.finfo(dtype).eps * first.double().norm()


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_training_step_is_three_launches_at_most(dtype, backend):
    rows = batch(N=8, V=77, s_dtype=dtype)
    before, leaf = kd.backends.calls.copy(), rows.s.requires_grad_()
    with only(backend):
        kd.KDLoss()(leaf, rows.t, rows.y).backward()
    made = kd.backends.calls - before
    inside = [] if backend == "cuda" else ["begin", "rescale"]  # counted where Python launches them
    assert made == {(backend, name): 1 for name in ["step", *inside]}
