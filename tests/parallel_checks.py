"""What every rank of a group does in tests/test_parallel.py: each check compares shards with whole rows.

Inputs come from seeds, so that each rank knows all of them.
"""

import datetime
import itertools
import json
import os
import time
import traceback
from unittest.mock import patch

import emulated
import torch
import torch.distributed as dist
from accuracy import F32, F64, SAMPLE, Batch, can_shard, make, of_points, only
from textbook import CASES
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode

import kdkernels as kd

WIDTHS = {2: [9, 14], 4: [3, 11, 1, 8]}
TIMEOUT, SHORT = 60, 5


def start(rank, world, where, seconds=TIMEOUT):
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        emulated.install()  # as in conftest.py
    dist.init_process_group("gloo", init_method=f"file://{where}/store", rank=rank, world_size=world,
                            timeout=datetime.timedelta(seconds=seconds))  # fmt: skip


def run(rank, world, where):
    """All checks; writes {name: what is wrong, or ""}."""
    start(rank, world, where)
    found = {}
    for name, check in CHECKS.items():
        try:
            check(rank, world)
            found[name] = ""
        except Exception:  # whatever it is, the parent reports it
            found[name] = traceback.format_exc()
    with open(f"{where}/{rank}.json", "w") as file:
        json.dump(found, file)
    dist.barrier()
    dist.destroy_process_group()


def die(rank, world, where, hangs=False):
    """The last rank is gone, or hangs, before the statistics are exchanged: what the others get, after how long."""
    start(rank, world, where, seconds=SHORT)
    s, t, _ = rows(4, 8)
    loss, group = kd.ForwardKLLoss(), dist.group.WORLD
    loss(s, t, group=group)
    if rank == world - 1:
        while hangs and len(os.listdir(where)) < world:  # the store's file, and those of the others
            time.sleep(0.1)
        os._exit(0)
    begin = time.monotonic()
    try:
        loss(s, t, group=group)
    except RuntimeError as error:
        with open(f"{where}/{rank}", "w") as file:
            json.dump([f"{type(error).__name__}: {error}", time.monotonic() - begin], file)
        os.rename(f"{where}/{rank}", f"{where}/{rank}.json")
    os._exit(0)  # not waiting for the dead


def rows(n, v, dtype=F64, seed=0, ignore=-100) -> Batch:
    g = torch.Generator().manual_seed(seed)
    s, t = (2 * torch.randn(2, n, v, generator=g, dtype=F64)).to(F32).to(dtype)
    y = torch.randint(v, (n,), generator=g)
    y[2] = ignore
    return Batch(s, t, y)


def own(x, rank, widths):
    return x.split(widths, -1)[rank]


def largest(*tensors):
    return max([0.0, *(x[x.isfinite()].abs().max().item() for x in tensors if x.isfinite().any())])


def near(a, b, tolerance=1e-12, what="", size=0.0):
    """a = b to 1e-12 of the largest entry of b, or of size: infinite and NaN entries are in the same places."""
    assert a.shape == b.shape and a.dtype == b.dtype, (what, a.shape, b.shape, a.dtype, b.dtype)
    size = max(size, largest(b))
    bars = dict(rtol=0, atol=tolerance * (size or 1.0))
    torch.testing.assert_close(a, b, **bars, equal_nan=True, msg=lambda m: f"{what}: {m}")


def both(loss, backend, batch, rank, widths, tolerance=1e-12, what="", call=None, local=None, labels=True, size=0.0):
    """The loss and both gradients: of whole rows, and of shards; `local` overrides `call` on this rank."""
    results, y = [], batch.y if labels else None
    weight = torch.linspace(0.5, 1.5, len(batch.s) if loss.reduction == "none" else 1, dtype=F64)
    for sharded in (False, True):
        cut = (lambda x: own(x, rank, widths)) if sharded else (lambda x: x)
        s, t = (cut(x).clone().requires_grad_() for x in batch[:2])
        keywords = {**(call or {}), **({"group": dist.group.WORLD, **(local or {})} if sharded else {})}
        with only(backend):
            value = loss(s, t if loss._uses.teacher else None, y, **keywords)
            (value * weight.to(value.dtype)).sum().backward()
        results.append((value.detach(), s.grad, t.grad))
    (value, *grads), (got, *parts) = results
    near(got, value, tolerance, f"{what}: value")
    for side, grad, part in zip(("student", "teacher"), grads, parts, strict=True):
        assert (grad is None) == (part is None), (what, side)
        if grad is not None:
            near(part, own(grad, rank, widths), tolerance, f"{what}: {side} gradient", max(size, largest(grad)))


def every_loss(rank, world):
    for backend in ("cpu", "reference"):
        for case in filter(can_shard, CASES):
            loss = make(case)
            both(loss, backend, rows(5, 23), rank, WIDTHS[world], what=f"{backend} {case}")


class Pearson(kd.SeparableLoss):
    """1 - e^(-sum (q - p)^2): of one's own, with a function of the sum."""

    def phi(self, log_q, log_p):
        return (kd.tape.exp(log_q) - kd.tape.exp(log_p)) ** 2

    def value(self, total):
        return -kd.tape.expm1(-total)


def a_loss_of_ones_own(rank, world):
    for backend in ("cpu", "reference"):
        for options in ({}, dict(standardize=True, temperature=2.0, ce_weight=0.2), dict(reduction="none")):
            for call in ({}, dict(temperature=torch.linspace(0.5, 2.0, 5))):
                what = f"{backend} {options} {call}"
                both(Pearson(**options), backend, rows(5, 23), rank, WIDTHS[world], what=what, call=call)


def correlated_probabilities(rank, world):
    """Of a kernel of whole rows on one side, of log-partitions on the other; equal logits and holes included."""
    batch = rows(6, 23)
    batch.s[1] = batch.t[3] = 2.0
    batch.s[4, [0, 12]] = batch.t[4, [3, 12]] = batch.t[5, 1:] = -torch.inf
    for backend in ("cpu", "reference"):
        for options in ({}, dict(temperature=3.0, t_squared=True, kd_weight=0.7), dict(reduction="none")):
            loss = kd.PearsonLoss("probs", ce_weight=0.1, **options)
            both(loss, backend, batch, rank, WIDTHS[world], what=f"{backend} {options}")
    with raises(ValueError, "PearsonLoss cannot be computed on vocabulary shards: it looks at whole rows"):
        kd.PearsonLoss()(*batch, group=dist.group.WORLD)


def sums_of_several_families(rank, world):
    """Term by term; in a buffer, and from hidden states, too."""
    batch, widths = rows(5, 23), WIDTHS[world]
    for reduction in ("mean", "none"):
        one = kd.JSDLoss(temperature=2.0, reduction=reduction)
        terms = one, kd.TVDLoss(reduction=reduction), kd.PearsonLoss("probs", ce_weight=0.1, reduction=reduction)
        loss = one + 0.5 * terms[1] + 2.0 * terms[2]
        assert type(loss) is kd.MixedSumLoss
        for backend in ("cpu", "reference"):
            both(loss, backend, batch, rank, widths, what=f"{backend} {reduction}")
    loss = kd.ForwardKLLoss() + kd.PearsonLoss("probs")
    s, t = (own(x, rank, widths) for x in batch[:2])
    value, gradient = loss.value_and_grad(*batch)
    out = torch.ones_like(s)
    near(loss.value_and_grad(s, t, batch.y, out=out, accumulate=True, group=dist.group.WORLD)[0], value)
    near(out - 1, own(gradient, rank, widths))
    hidden, eye = batch.s.clone().requires_grad_(), torch.eye(23, dtype=F64)
    part = eye.split(widths)[rank]
    linear = kd.LinearLoss(loss, chunk=2)
    near(linear(hidden, part, batch.t, part, batch.y, group=dist.group.WORLD).detach(), value)
    linear(hidden, part, batch.t, part, batch.y, group=dist.group.WORLD).backward()
    near(hidden.grad, gradient)


def wide_rows(rank, world):
    """Wider than a tile and than a segment of the CPU's kernels."""
    widths = [40000, *[700] * (world - 2), 3000]
    for case in filter(can_shard, SAMPLE):
        both(make(case), "cpu", rows(3, sum(widths)), rank, widths, what=str(case))


def kernels_in_single(rank, world):
    """Triton and CUDA C++ in float32: the merge adds no error to that of the kernels."""
    names = ("KDLoss", "DKDLoss", "WTTMLoss", "JSDLoss")
    interpreted = [case for case in SAMPLE if case.name in names] if world == 2 else []
    for backend, cases in (("triton", interpreted), ("cuda", [case for case in SAMPLE if of_points(case)])):
        for case in cases:
            both(make(case), backend, rows(3, 23, F32), rank, WIDTHS[world], 2e-5, f"{backend} {case}")


def call_options(rank, world):
    widths = WIDTHS[world]
    g = torch.Generator().manual_seed(1)
    weight, temperature = torch.rand(2, 5, generator=g, dtype=F64) + 0.5
    calls = [
        dict(row_weight=weight),
        dict(num_items=7),
        dict(num_items=torch.tensor(3.0)),
        dict(temperature=2.5),
        dict(temperature=temperature, row_weight=weight),
    ]
    dkd = dict(ce_weight=0.3, label_smoothing=0.1, z_loss=0.01)
    for loss in (kd.DKDLoss(**dkd), kd.ForwardKLLoss(standardize=True, teacher_temperature=0.8, ce_weight=0.5)):
        for call, backend in itertools.product(calls, ("cpu", "reference")):
            both(loss, backend, rows(5, 23), rank, widths, what=f"{backend} {loss} {call}", call=call)
    for backend in ("cpu", "reference"):
        for reduction in ("mean", "sum", "none", "batchmean"):
            for ignore in (-100, -1, 0, widths[0] + 1):
                loss = kd.DKDLoss(reduction=reduction, ignore_index=ignore, **dkd)
                both(loss, backend, rows(5, 23, ignore=ignore), rank, widths, what=f"{reduction} {ignore}")
    for loss in (kd.DKDLoss() + 0.5 * kd.KDLoss(), kd.KDLoss() + 0.5 * kd.JSDLoss(0.2, temperature=2.0)):
        for backend in ("cpu", "reference"):
            both(loss, backend, rows(5, 23), rank, widths, what="a sum")
    both(kd.ReverseKLLoss(), "cpu", rows(5, 23), rank, widths, labels=False, what="without labels")
    cube = Batch(*(x.view(2, 3, *x.shape[1:]) for x in rows(6, 23)))
    both(kd.KDLoss(), "cpu", cube, rank, widths, what="three dimensions")


def deleted_classes(rank, world):
    """Padding, -inf in both rows, and shards of nothing else, in front of and behind the maximum of 0."""
    widths = WIDTHS[world]
    batch = rows(5, 23)
    mask = torch.ones(23, dtype=torch.bool)
    mask[: widths[0]] = False
    mask[-2:] = False
    y = torch.where(batch.y >= 0, batch.y % (21 - widths[0]) + widths[0], batch.y)
    for backend in ("cpu", "reference"):
        for case in filter(can_shard, SAMPLE):
            for shift in (0.0, -1000.0):
                x = Batch(*(z + shift for z in batch[:2]), y)
                own_mask, size = dict(vocab_mask=own(mask, rank, widths)), float(shift != 0)
                # Logits of 1000 are known to 1e-13, which shows in the small gradient of a z-score.
                both(make(case), backend, x, rank, widths, what=f"{backend} {case} mask {shift}",
                     call=dict(vocab_mask=mask), local=own_mask, size=size)  # fmt: skip
                dead = Batch(*(z.masked_fill(~mask, -torch.inf) for z in x[:2]), y)
                both(make(case), backend, dead, rank, widths, what=f"{backend} {case} -inf {shift}", size=size)
    far, wide = rows(5, 230), [10 * width for width in widths]
    far = Batch(*((z - 30000).float() for z in far[:2]), y + 10 * widths[0])
    keep = mask.repeat_interleave(10)
    for loss in (kd.ForwardKLLoss(), kd.HellingerLoss()):  # in float32 a maximum of 0 would cost all digits
        both(loss, "cpu", far, rank, wide, 1e-6, f"{loss}, float32", dict(vocab_mask=keep),
             dict(vocab_mask=own(keep, rank, wide)), labels=False)  # fmt: skip
    last = dict(vocab_size=21) if rank < world - 1 else dict(vocab_size=widths[-1] - 2)
    both(kd.DKDLoss(), "cpu", Batch(*batch[:2], y), rank, widths, what="vocab_size", call=dict(vocab_size=21),
         local=last if rank == world - 1 else dict(vocab_size=None))  # fmt: skip
    one_hot = Batch(batch.s, batch.t.log_softmax(-1).masked_fill(torch.arange(23) != 20, -torch.inf), y)
    both(kd.ForwardKLLoss(), "cpu", one_hot, rank, widths, what="a teacher that is certain")


def gradient_without_a_graph(rank, world):
    widths, loss = WIDTHS[world], kd.KDLoss()
    batch = rows(5, 23)
    value, gradient = loss.value_and_grad(*batch)
    s, t = (own(x, rank, widths).clone() for x in batch[:2])
    got, part = loss.value_and_grad(s, t, batch.y, out=s, group=dist.group.WORLD)
    assert part is s
    near(got, value)
    near(part, own(gradient, rank, widths))


def few_collectives(rank, world):
    """One of the statistics, and of a separable loss one of its sums; of z-scored rows one of the deviations; one ahead
    of them, unless what has to be known is known; none in the backward."""
    s, t = (own(x, rank, WIDTHS[world]).clone().requires_grad_() for x in rows(5, 23)[:2])
    group, once = dist.group.WORLD, kd.vocab_shards(dist.group.WORLD, s.shape[-1])
    z_scored = kd.DKDLoss(standardize=True), kd.BrierLoss(standardize=True), kd.JSDLoss(standardize=True)
    cases = [(kd.DKDLoss(ce_weight=0.1), 1), (kd.JSDLoss(ce_weight=0.1), 2), *zip(z_scored, (2, 2, 3), strict=True)]
    for (loss, count), backend in itertools.product(cases, ("cpu", "reference")):
        values = []
        for shards, more in ((group, 1), (once, 0)):
            with kd.use_backend(backend), CommDebugMode() as forward:
                values.append(loss(s, t, rows(5, 23).y.clamp(min=0), group=shards))
            with CommDebugMode() as backward:
                values[-1].backward()
            assert forward.get_total_counts() == count + more, forward.get_comm_counts()
            assert backward.get_total_counts() == 0
        assert torch.equal(*values)
    few_collectives_of_chunks(rank, world, once)
    loss, less = kd.ForwardKLLoss(), max(s.shape[-1] - 1, 1)
    padded = kd.vocab_shards(group, s.shape[-1], less)
    near(loss(s, t, group=padded, vocab_size=less), loss(s, t, group=group, vocab_size=less))
    if less < s.shape[-1]:
        with raises(ValueError, f"this rank has {less} classes, got logits of {s.shape[-1]}"):
            loss(s, t, group=padded)
    with raises(TypeError if rank else ValueError, "columns must be an int" if rank else "have refused"):
        kd.vocab_shards(group, 2.5 if rank else 2)


def few_collectives_of_chunks(rank, world, once):
    """From hidden states those of the loss for each of 3 chunks, and one for the gradient of the hidden states: in the
    backward where that makes the chunks again."""
    new, chunks = torch.Generator().manual_seed(0), 3
    for dtype, reduction in ((F64, "mean"), (F64, "none"), (torch.float16, "mean")):
        hidden, head, t = (torch.randn(*shape, generator=new).to(dtype) for shape in ((5, 4), (23, 4), (5, 23)))
        teacher = own(t, rank, WIDTHS[world])
        for loss, count in ((kd.ForwardKLLoss(reduction=reduction), 1), (kd.JSDLoss(reduction=reduction), 2)):
            for shards, more in ((dist.group.WORLD, 1), (once, 0)):
                leaf, part = hidden.clone().requires_grad_(), head.split(WIDTHS[world])[rank].clone().requires_grad_()
                seen = []
                with patch.multiple(dist, **{f.__name__: counted(f, seen) for f in (dist.all_gather, dist.all_reduce)}):
                    value = kd.LinearLoss(loss, chunk=2)(leaf, part, teacher_logits=teacher, group=shards)
                    first = len(seen)
                    value.sum().backward()
                again = reduction == "none" or dtype == torch.float16
                assert first == more + chunks * count + (not again), seen
                assert len(seen) - first == again * (chunks * count + 1), seen


def counted(function, seen):
    return lambda *args, **kwargs: seen.append(function.__name__) or function(*args, **kwargs)


def metrics(rank, world):
    """Those of whole rows, labels left out and equal logits on several ranks included, with one more all_gather."""
    batch, widths = rows(5, 23), WIDTHS[world]
    batch.s[3, [2, widths[0] + 1, 22]] = batch.t[3, [2, 22, 7]] = 9.0
    batch.s[4, 1] = batch.t[4, 22] = 9.0
    mask = torch.arange(23) != 5
    cut = lambda x: own(x, rank, widths)  # noqa: E731
    for backend in ("cpu", "reference"):
        for loss in (kd.DKDLoss(ce_weight=0.3), kd.ReverseKLLoss(reduction="none", standardize=True), kd.JSDLoss()):
            count = 4 if loss.standardize or isinstance(loss, kd.JSDLoss) else 3
            y = torch.where(batch.y == 5, 6, batch.y)
            with kd.use_backend(backend):
                whole = loss.with_metrics(batch.s, batch.t, y, vocab_mask=mask)
                with CommDebugMode() as seen:
                    value, got = loss.with_metrics(cut(batch.s), cut(batch.t), y, vocab_mask=cut(mask),
                                                   group=dist.group.WORLD)  # fmt: skip
            assert seen.get_total_counts() == count, seen.get_comm_counts()
            near(value, whole[0])
            for name, a, b in zip(got._fields, got, whole[1], strict=True):
                near(a, b, what=f"{backend} {name}")
    with raises(ValueError, "must call the same loss"):
        loss.with_metrics(cut(batch.s), cut(batch.t), agreement=rank == 0, group=dist.group.WORLD)


def data_parallel(rank, world):
    """DDP and FSDP2 need nothing special: the gradient of the mean over all ranks' rows."""
    g = torch.Generator().manual_seed(3)
    x, t = torch.randn(world, 4, 6, generator=g, dtype=F64), torch.randn(world, 4, 11, generator=g, dtype=F64)
    y = torch.randint(11, (world, 4), generator=g)
    loss = kd.KDLoss()

    def model():
        torch.manual_seed(4)
        return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 11)).double()

    whole = model()
    loss(whole(x), t, y).backward()
    ddp, fsdp = torch.nn.parallel.DistributedDataParallel(model()), model()
    fully_shard(fsdp[0])
    fully_shard(fsdp)
    for name, copy in (("DDP", ddp), ("FSDP2", fsdp)):
        loss(copy(x[rank]), t[rank], y[rank]).backward()
        for p, q in zip(copy.parameters(), whole.parameters(), strict=True):
            grad = p.grad.full_tensor() if name == "FSDP2" else p.grad
            near(grad, q.grad, what=name)


def dtensors(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    kl, jsd = kd.KDLoss(), kd.JSDLoss()
    for v, loss in ((8, kl), (23, jsd), (world + 1, kl), (world + 1, jsd)):  # on four ranks the last has no column
        batch = rows(5, v)
        s, t = (x.clone().requires_grad_() for x in batch[:2])
        value = loss(s, t, batch.y)
        value.backward()
        cut = [distributed(x, mesh).requires_grad_() for x in batch[:2]]
        labels = DTensor.from_local(batch.y, mesh, [Replicate()])
        got = loss(*cut, labels)
        got.backward()
        near(got.detach(), value.detach(), what=f"DTensor {v}")
        for x, grad in zip(cut, (s.grad, t.grad), strict=True):
            assert x.grad.placements == x.placements
            near(x.grad.full_tensor(), grad, what=f"DTensor {v} gradient")
    with raises(ValueError, "cut along the last dimension"):
        kd.KDLoss()(*(DTensor.from_local(x, mesh, [Replicate()]) for x in batch[:2]), batch.y)
    with raises(TypeError, "pass both in one form"):
        kd.KDLoss()(cut[0], batch.t, batch.y)
    with raises(TypeError, "pass no group"):
        kd.KDLoss()(*cut, batch.y, group=dist.group.WORLD)


def distributed(x, mesh):
    part = x.chunk(mesh.size(), -1)
    mine = part[mesh.get_rank()] if mesh.get_rank() < len(part) else x[..., :0]
    return DTensor.from_local(mine.contiguous(), mesh, [Shard(x.dim() - 1)], shape=x.shape, stride=x.stride())


class raises:
    def __init__(self, kind, text):
        self.kind, self.text = kind, text

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _trace):
        assert kind is not None, f"no {self.kind.__name__} with {self.text!r}"
        assert issubclass(kind, self.kind) and self.text in str(error), f"{kind.__name__}: {error}, not {self.text!r}"
        return True


def fused_linear(rank, world):
    """Shards of both heads: value, and gradients of hidden states (summed here), head and bias."""
    widths, g = WIDTHS[world], torch.Generator().manual_seed(2)
    new = lambda *shape: torch.randn(*shape, generator=g, dtype=F64)  # noqa: E731
    hidden, head, bias, t_hidden, t_head = new(5, 6), new(23, 6), new(23), new(5, 4), new(23, 4)
    y, weight = rows(5, 23).y, torch.rand(5, generator=g, dtype=F64)
    cases = [
        (kd.DKDLoss(ce_weight=0.3), dict(row_weight=weight)),
        (kd.KDLoss(reduction="none"), {}),
        (kd.ForwardKLLoss(standardize=True, temperature=2.0), dict(temperature=2.0)),
        (kd.ReverseKLLoss() + 0.5 * kd.CrossEntropyLoss(), dict(num_items=7)),
        (kd.SkewKLLoss(ce_weight=0.3, temperature=2.0), {}),
        (kd.TVDLoss(standardize=True, reduction="none"), {}),
    ]
    for backend in ("cpu", "reference"):
        for loss, call in cases:
            for options in (dict(chunk=2), dict(student_softcap=3.0, student_logit_scale=0.7)):
                results = []
                for sharded in (False, True):
                    cut = (lambda x: x.split(widths)[rank]) if sharded else (lambda x: x)
                    leaves = [x.clone().requires_grad_() for x in (hidden, cut(head), cut(bias))]
                    keywords = dict(student_bias=leaves[2], **call, **({"group": dist.group.WORLD} if sharded else {}))
                    with only(backend):
                        value = kd.LinearLoss(loss, **options)(*leaves[:2], t_hidden, cut(t_head), y, **keywords)
                        value.sum().backward()
                    results.append([value.detach(), *(x.grad for x in leaves)])
                whole, got = results
                for k, (a, b) in enumerate(zip(got, whole, strict=True)):
                    part = b.split(widths)[rank] if k > 1 else b
                    near(a, part, what=f"{backend} {loss} {options} {k}", size=largest(b))
    x, w, t = (z.to(torch.bfloat16) for z in (hidden, head, new(5, 23)))
    grads = []
    for keywords in ({}, dict(group=dist.group.WORLD)):
        cut = (lambda z, dim: z.split(widths, dim)[rank]) if keywords else (lambda z, dim: z)
        leaf = x.clone().requires_grad_()
        kd.LinearLoss(kd.ForwardKLLoss())(leaf, cut(w, 0), teacher_logits=cut(t, 1), **keywords).backward()
        grads.append(leaf.grad)
    near(grads[1], grads[0], 2e-2, "bfloat16")
    own_head, teacher, group = head.split(widths)[rank], (t_hidden, t_head.split(widths)[rank]), dist.group.WORLD
    with raises(ValueError, "have refused" if rank else "student_head must have shape"):
        kd.LinearLoss(kd.KDLoss())(hidden, own_head if rank else own_head[:, :3], *teacher, y, group=group)
    with raises(ValueError, "must call the same loss"):
        kd.LinearLoss(kd.KDLoss(), chunk=1 + rank)(hidden, own_head, *teacher, y, group=group)
    with raises(ValueError, "labels must be in [0, 23)"):
        kd.LinearLoss(kd.KDLoss())(hidden, own_head, *teacher, y + 23, group=group)


def refusals(rank, world):
    group, (s, t, y) = dist.group.WORLD, rows(4, 6)
    fewer = rows(3, 6)
    with raises(ValueError, "must hold the same rows"):
        kd.ForwardKLLoss()(*(fewer if rank else (s, t, y)), group=group)
    with raises(ValueError, "have refused" if rank else "must have student_logits' shape"):
        kd.ForwardKLLoss()(s, t if rank else t[:, :5], group=group)
    with raises(ValueError, "must call the same loss"):
        (kd.ForwardKLLoss() if rank else kd.HellingerLoss())(s, t, group=group)
    with raises(ValueError, "must call the same loss"):
        kd.ForwardKLLoss()(s, t, y if rank else None, group=group)
    with raises(ValueError, f"labels must be in [0, {6 * world})"):
        kd.ForwardKLLoss()(s, t, torch.full((4,), 6 * world), group=group)
    with raises(ValueError, f"labels must be in {' or '.join(f'[{6 * r}, {6 * r + 5})' for r in range(world))}"):
        kd.ForwardKLLoss()(s, t, torch.full((4,), 5), group=group, vocab_size=5)
    with raises(ValueError, "SpearmanLoss cannot be computed on vocabulary shards: it looks at whole rows"):
        kd.SpearmanLoss()(s, t, group=group)
    with raises(ValueError, "AKLLoss cannot be computed on vocabulary shards"):
        kd.AKLLoss()(s, t, group=group)
    sums = kd.ForwardKLLoss() + kd.SpearmanLoss()
    for loss, why in ((kd.ULDLoss(), "it sorts whole rows"), (kd.GroupedKLLoss(), "its groups are of classes of whole"),
                      (sums, "of its SpearmanLoss, it looks at whole rows")):  # fmt: skip
        with raises(ValueError, f"{type(loss).__name__} cannot be computed on vocabulary shards: {why}"):
            loss(s, t, group=group)
    with raises(ValueError, "must call the same loss"):
        kd.JSDLoss(0.3 + 0.1 * rank)(s, t, group=group)
    with raises(TypeError, "group must be a process group"):
        kd.ForwardKLLoss()(s, t, group="world")
    with raises(ValueError, "teacher_logits"):
        kd.ForwardKLLoss()(s, None, group=group)
    for backend in ("cpu", "reference"):
        with kd.use_backend(backend):
            leaf = s.clone().requires_grad_()
            (slope,) = torch.autograd.grad(kd.ForwardKLLoss()(leaf, t, group=group), leaf, create_graph=True)
            with raises(NotImplementedError, "not itself differentiable"):
                slope.sum().backward()


CHECKS = {f.__name__: f for f in (every_loss, a_loss_of_ones_own, correlated_probabilities, sums_of_several_families,
                                  wide_rows, kernels_in_single, call_options, deleted_classes, few_collectives,
                                  metrics, gradient_without_a_graph, data_parallel, dtensors, fused_linear, refusals)}
