"""What sanitize.py runs: every operator of the C++ library once for each thing it can be given."""

import copy
import itertools
import sys
import threading

import torch

import kdkernels as kd

KIND, QUICK = sys.argv[1], "quick" in sys.argv
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [2, 257] if QUICK else [1, 2, 7, 33, 257, 4097] if KIND == "address" else [2, 257, 4097]


def losses(V):
    made = [kd.catalogue()[name]() for name in kd.catalogue() if name not in ("GroupedKLLoss", "SinkhornLoss")]
    of_rows = [
        kd.SpearmanLoss(top_k=5), kd.SpearmanLoss(exact=True), kd.PearsonLoss("probs"),
        kd.KendallLoss("shifts", seed=0), kd.PlackettLuceLoss("uniform", top_k=3),
        kd.GroupedKLLoss(torch.arange(V) % 3), kd.GroupedKLLoss("label"),
    ]  # fmt: skip
    sums = [
        0.5 * kd.ForwardKLLoss(temperature=2.0) + kd.JSDLoss() + kd.CrossEntropyLoss(0.1, 0.01),
        kd.ForwardKLLoss() + kd.SpearmanLoss(), kd.ForwardKLLoss() + kd.SpearmanLoss(top_k=4) + kd.KendallLoss(),
    ]  # fmt: skip
    return [*made, *of_rows, *sums]


def rows(n, v, dtype, damage=True):
    g = torch.Generator().manual_seed(n + v)
    s, t = (3 * torch.randn(2, n, v, generator=g)).to(dtype)
    y = torch.randint(v, (n,), generator=g)
    if damage and n >= 4:
        s[1, ::3] = t[1, ::2] = -torch.inf
        s[2, -1], t[3, 0], y[0] = torch.nan, torch.inf, -100
    return s, t, y


def step(loss, s, t, y, **call):
    """Value, gradient with it, gradient after it, and that of the teacher."""
    bare = isinstance(loss, (kd.CrossEntropyLoss, kd.BrierLoss, kd.LogitMSELoss))
    t = None if bare else t
    with kd.use_backend("cpu"):
        loss, s = copy.deepcopy(loss), s.detach().requires_grad_()
        loss(s, t, y, **call).backward()
        loss.value_and_grad(s.detach(), t, y, out=torch.empty_like(s), **call)
        if not loss.__class__.__name__.startswith(("DIST", "Mixed", "Sum")):
            loss.reduction = "none"
            loss(s, t, y, **call).sum().backward()
        if t is not None and not isinstance(loss, (kd.RankLoss, kd.MixedSumLoss, kd.TAIDLoss)):
            loss(s, t.detach().requires_grad_(), y, **call).sum().backward()


def others(s, t, y):
    """What is not a loss of whole rows."""
    V = s.shape[-1]
    with kd.use_backend("cpu"):
        for values in (kd.metrics.rankdata(s), kd.metrics.spearman(s, t), kd.metrics.kendall_tau(s, t)):
            values.sum()
        kd.ForwardKLLoss().with_metrics(s, t, y)
        whole = [x.nan_to_num().requires_grad_() for x in (s, t)]  # a NaN would be all that there is in the batch
        kd.DISTLoss()(*whole, y).backward()
        if s.dtype in (torch.float32, torch.float64):
            distances, slopes = kd.backends.cpu.DISTANCES
            slopes(distances(*(x.detach() for x in whole)), *(x.detach() for x in whole))
        if V > 2 and t.isfinite().all():
            sparse = kd.SparseTeacher.from_logits(t, k=min(5, V - 1))
            for loss in (kd.ForwardKLLoss(), kd.ReverseKLLoss(), kd.DKDLoss(temperature=1.0)):
                loss(s.detach().requires_grad_(), sparse, y).backward()
    torch.ops.kdkernels.exp2(s.float().contiguous())


def everything():
    for v, dtype in itertools.product(WIDTHS, DTYPES):
        if (v > 300 or QUICK) and dtype in DTYPES[::3]:
            continue
        for loss in losses(v):
            step(loss, *rows(5, v, dtype))
        if v in (2, 33):
            for loss in losses(v):
                step(loss, *rows(0, v, dtype))
        others(*rows(5, v, dtype, damage=False))
        s, t, y = rows(4, v, dtype)
        mask = torch.arange(v) % 2 == 0
        for loss in (kd.ForwardKLLoss(), kd.JSDLoss(), kd.SpearmanLoss(), kd.ULDLoss()):
            step(loss, s.T.contiguous().T, t[:1].expand_as(t), y - y % 2, vocab_mask=mask)
    for loss in (kd.ForwardKLLoss(), kd.JSDLoss(), kd.SpearmanLoss(), kd.PearsonLoss(), kd.ULDLoss(), kd.KendallLoss()):
        for dtype in DTYPES[1:3]:
            step(loss, *rows(2, 20_000 if QUICK else 131072, dtype))


def in_threads():
    failed = []
    threading.excepthook = lambda what: failed.append(what.exc_value)
    for loss in losses(65):  # of two threads at once
        given = loss, *rows(70, 65, torch.float32)
        threads = [threading.Thread(target=step, args=given) for _ in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failed:
        raise failed[0]


if __name__ == "__main__":
    for threads in (1, 2, 3)[: 2 if QUICK else 3] if KIND == "address" else (1,):
        torch.set_num_threads(threads)
        everything() if threads == 1 else in_threads()
    if KIND == "thread":
        in_threads()
    print(f"{KIND}: nothing found, instruction set {torch.ops.kdkernels.isa()}")
