"""Every loss with the same bits on any number of threads, in threads of Python, and in processes forked after use."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_fuzz import LOSSES, run

import kdkernels as kd

SHAPE = (3, 2500)


def rows(seed=0, shape=SHAPE):
    g = torch.Generator().manual_seed(seed)
    s, t = torch.randn(2, *shape, generator=g)
    return s, t, torch.randint(shape[-1], shape[:1], generator=g)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(3, 20_001), (90, 1200)], ids=str)
def test_threads_do_not_change_a_bit_of_any_loss(threads, shape):
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append({name: run(name, "cpu", *rows(shape=shape)) for name in LOSSES})
    for name in LOSSES:
        one, *others = (x[name] for x in found)
        assert all(torch.equal(a, b) for other in others for a, b in zip(one, other, strict=True)), name


def of_hidden_states(loss):
    """Value and gradients of LinearLoss, of several chunks."""
    g = torch.Generator().manual_seed(0)
    h, w, ht, wt = (torch.randn(*shape, generator=g) for shape in ((60, 16), (700, 16), (60, 12), (700, 12)))
    linear = kd.LinearLoss(loss, memory_budget=2**17)
    value = linear(h.requires_grad_(), w.requires_grad_(), ht, wt, torch.arange(60))
    value.backward()
    return value.detach(), h.grad, w.grad


def of_rows(loss, sparse=False):
    s, t, y = rows(shape=(30, 600))
    value = loss(s.requires_grad_(), kd.SparseTeacher.from_logits(t, 32) if sparse else t, y)
    value.backward()
    return value.detach(), s.grad


OTHERS = {
    "linear": lambda: of_hidden_states(kd.KDLoss()),
    "linear, ranks": lambda: of_hidden_states(kd.SpearmanLoss()),
    "linear, separable": lambda: of_hidden_states(kd.JSDLoss()),
    "sparse": lambda: of_rows(kd.ForwardKLLoss(), sparse=True),
    "sparse, separable": lambda: of_rows(kd.JSDLoss(), sparse=True),
    "LTKDLoss": lambda: of_rows(kd.LTKDLoss(torch.arange(600) % 3)),
    "SinkhornLoss": lambda: of_rows(kd.SinkhornLoss()),
}


@pytest.mark.parametrize("name", OTHERS)
def test_threads_do_not_change_a_bit_of_others(threads, name):
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(OTHERS[name]())
    one, *others = found
    assert all(torch.equal(a, b) for other in others for a, b in zip(one, other, strict=True))


def test_losses_at_once_in_threads_of_python():
    """One module in three threads, on rows of their own."""
    for name, make in LOSSES.items():
        loss, given = make(SHAPE[-1]), [rows(seed)[:2] for seed in range(6)]
        bare = isinstance(loss, (kd.CrossEntropyLoss, kd.BrierLoss, kd.LogitMSELoss))

        def step(pair, loss=loss, bare=bare):
            s = pair[0].clone().requires_grad_()
            value = loss(s, None if bare else pair[1], rows()[2])
            value.backward()
            return value.detach(), s.grad

        want = [step(pair) for pair in given]
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(step, given))
        for pair, other in zip(want, found, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(pair, other, strict=True)), name


class Losses(torch.utils.data.Dataset):
    def __len__(self):
        return len(LOSSES)

    def __getitem__(self, i):
        return run(list(LOSSES)[i], "cpu", *rows(i))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_forked_workers_of_a_data_loader(threads):
    """After use in the parent, whose threads a forked worker does not have."""
    threads(3)
    want = [Losses()[i] for i in range(len(LOSSES))]
    how = dict(num_workers=2, timeout=120, multiprocessing_context="fork")
    loader = torch.utils.data.DataLoader(Losses(), batch_size=None, **how)
    for pair, other in zip(want, loader, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(pair, other, strict=True))
