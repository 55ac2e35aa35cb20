"""Other libraries' losses behind one interface, each at its best settings.

    pip install liger-kernel trl torchtune torchsort flash-linear-attention

A `Peer` makes a function of (student, teacher, labels) logits, or, if it is `linear`, of (student hidden, student head,
teacher hidden, teacher head, labels); -> the mean over the rows. What it cannot do (a temperature) its `make` does not
take.
"""

import importlib
import importlib.util
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import eager
from .harness import turns


@dataclass(frozen=True, eq=False)
class Peer:
    name: str
    loss: str  # the class of ours that is the same; "SymmetricKL" for half of either KL
    make: Callable[..., Callable]
    linear: bool = False
    gpu: bool = False  # Triton: a GPU, or its interpreter
    constant: bool = False  # the value is the cross-entropy with the teacher: above the KL by the teacher's entropy
    same: bool = True  # the same definition
    settings: Callable[[int], list[dict]] = lambda rows: [{}]  # what may be best at so many rows, for `tuned` to try


def of(module: str, name: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(importlib.import_module(module), name)


def trl(beta: float, temperature: float = 1.0) -> Callable:
    divergence = of("trl.experimental.gkd", "GKDTrainer").generalized_jsd_loss
    return lambda s, t, y=None: divergence(s, t, y, beta=beta, temperature=temperature)


def torchtune(name: str) -> Callable:
    """From the file of its losses, which needs torch alone; the package asks for a torchao of its time."""
    package = importlib.util.find_spec("torchtune")
    if not package or not package.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'torchtune'")
    path = Path(package.submodule_search_locations[0], "modules", "loss", "kd_losses.py")
    spec = importlib.util.spec_from_file_location("torchtune_kd_losses", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loss = getattr(module, name)()
    labels = lambda s, y: s.new_zeros(len(s), dtype=torch.int64) if y is None else y  # noqa: E731
    if "Chunked" not in name:
        return lambda s, t, y=None: loss(s, t, labels(s, y))
    return lambda s, t, y=None: loss(s[None].chunk(8, 1), t[None].chunk(8, 1), labels(s, y)[None])


def liger_jsd(beta: float) -> Callable:
    """It takes log-probabilities, which it is given here."""
    loss = of("liger_kernel.transformers", "LigerJSD")(beta)
    return lambda s, t, y=None: loss(s.log_softmax(-1), t.log_softmax(-1), y)


def liger_kl() -> Callable:
    loss = of("liger_kernel.transformers", "LigerKLDIVLoss")(reduction="batchmean", log_target=True)
    return lambda s, t, y=None: loss(s.log_softmax(-1), t.log_softmax(-1))


def liger_tvd() -> Callable:
    loss = of("liger_kernel.transformers", "LigerTVDLoss")()
    return lambda s, t, y=None: loss(s.softmax(-1), t.softmax(-1), y)


def liger_ce_tvd() -> Callable:
    """Cross-entropy and TVD of each row in one kernel, of which the second is asked for."""
    loss = of("liger_kernel.transformers.fused_ce_tvd", "LigerFusedCETVDLoss")()
    return lambda s, t, y=None: loss(s, t, s.new_zeros(len(s), dtype=torch.int64) if y is None else y)[1].mean()


def torchsort() -> Callable:
    rank = of("torchsort", "soft_rank")
    return lambda s, t, y=None: (1 - eager.correlation(rank(eager.wide(s)), eager.scattered_ranks(t))).mean()


def zeros(h: Tensor, y: Tensor | None) -> Tensor:
    return torch.zeros(len(h), dtype=torch.int64, device=h.device) if y is None else y


def trl_chunked(beta: float, temperature: float = 1.0) -> Callable:
    """As DistillationTrainer calls it. No logits in memory: they are made again backward."""
    function = of("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction")

    def mean(h, w, th, tw, y=None):
        rows = function.apply(h, w, None, th, tw, None, beta, temperature)[0]
        return rows.mean() if y is None else rows[y != -100].sum() / (y != -100).sum().clamp_min(1)

    return mean


def chunks(name: str) -> Callable[[int], list[dict]]:
    """All rows at once, half of them, a quarter."""
    return lambda rows: [{name: size} for size in sorted({max(rows // k, 64) for k in (1, 2, 4)})]


def liger_chunked(beta: float, temperature: float = 1.0, chunk_size: int = 1024) -> Callable:
    """torch.compiled."""
    loss = of("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")
    loss = loss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=temperature, chunk_size=chunk_size)
    return lambda h, w, th, tw, y=None: loss(h, w, th, tw, zeros(h, y))


def liger_fused(beta: float, temperature: float = 1.0) -> Callable:
    loss = of("liger_kernel.transformers", "LigerFusedLinearJSD")(jsd_beta=beta, temperature=temperature)
    return lambda h, w, th, tw, y=None: loss(h, w, th, tw, zeros(h, y))


def liger_fused_kl() -> Callable:
    """It takes the teacher's probabilities."""
    loss = of("liger_kernel.transformers.fused_linear_kl_div", "LigerFusedLinearKLDivLoss")()
    return lambda h, w, th, tw, y=None: loss(h, w, F.linear(th, tw).softmax(-1), y)


def fla() -> Callable:
    loss = of("fla.modules.fused_kl_div", "FusedKLDivLoss")()
    return lambda h, w, th, tw, y=None: loss(h, th, w, tw)


def torch_linear() -> Callable:
    """In PyTorch itself: of hidden states, the head and the teacher's probabilities. Of those it makes whole logits:
    its chunks (`options=`) take class indices alone, and of probabilities it warns that it does without."""
    return lambda h, w, th, tw, y=None: F.linear_cross_entropy(h, w, F.linear(th, tw).softmax(-1))


def torch_chunked(batch_chunk_size: int | None = None) -> Callable:
    """The same of class indices, in chunks; None: as large as it sees fit."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=batch_chunk_size)
    return lambda h, w, th, tw, y: F.linear_cross_entropy(h, w, y, options=options)


def liger_ce() -> Callable:
    loss = of("liger_kernel.transformers", "LigerCrossEntropyLoss")()
    return lambda s, t, y: loss(s, y)


def liger_fused_ce() -> Callable:
    loss = of("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")()
    return lambda h, w, th, tw, y: loss(w, h, y)


BETAS = {"ForwardKLLoss": 0.0, "ReverseKLLoss": 1.0, "JSDLoss": 0.5}


def with_beta(name: str, make: Callable, **kind) -> list[Peer]:
    bound = lambda beta: lambda **options: make(beta, **options)  # noqa: E731
    return [Peer(name, loss, bound(beta), **kind) for loss, beta in BETAS.items()]


def tune(loss: str, name: str, **kind) -> list[Peer]:
    return [Peer(f"torchtune{shown}", loss, lambda name=full: torchtune(name), **kind)
            for shown, full in (("", f"{name}Loss"), (" chunked", f"{name}WithChunkedOutputLoss"))]  # fmt: skip


PEERS = [
    *with_beta("TRL", trl),
    *tune("ForwardKLLoss", "ForwardKL", constant=True), *tune("ReverseKLLoss", "ReverseKL"),
    *tune("SymmetricKL", "SymmetricKL", constant=True),
    *with_beta("Liger JSD", liger_jsd, gpu=True), Peer("Liger KLDiv", "ForwardKLLoss", liger_kl, gpu=True),
    Peer("Liger TVD", "TVDLoss", liger_tvd, gpu=True), Peer("Liger CE + TVD", "TVDLoss", liger_ce_tvd, gpu=True),
    Peer("torchsort", "SpearmanLoss", torchsort, same=False),
    *with_beta("TRL chunked", trl_chunked, linear=True),
    *with_beta("Liger chunked", liger_chunked, linear=True, settings=chunks("chunk_size")),
    *with_beta("Liger fused", liger_fused, linear=True, gpu=True),
    Peer("Liger fused KL", "ForwardKLLoss", liger_fused_kl, linear=True, gpu=True),
    Peer("FLA fused", "ForwardKLLoss", fla, linear=True, gpu=True),
    Peer("torch linear_ce", "ForwardKLLoss", torch_linear, linear=True, constant=True),
    Peer("Liger CE", "CrossEntropyLoss", liger_ce, gpu=True),
    Peer("torch linear_ce chunked", "CrossEntropyLoss", torch_chunked, linear=True,
         settings=lambda rows: [{}, *chunks("batch_chunk_size")(rows)]),
    Peer("Liger fused CE", "CrossEntropyLoss", liger_fused_ce, linear=True, gpu=True),
]  # fmt: skip


def exact(peer: Peer, s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The mean of the textbook in float64, and what the peer adds to it."""
    return eager.pair(peer.loss, s.shape[-1])[1](s.double(), t.double(), y) + shift(peer, t)


def shift(peer: Peer, t: Tensor) -> Tensor | float:
    """What its value is above the definition's by: a constant of the student."""
    if not peer.constant:
        return 0.0
    return (0.5 if peer.loss == "SymmetricKL" else 1) * torch.special.entr(t.double().softmax(-1)).sum(-1).mean()


def made(peer: Peer, device: str = "cpu", interpreted: bool = False) -> tuple[Callable | None, str]:
    """Its function, tried on a small batch; or why there is none here."""
    if peer.gpu and device != "cuda" and not interpreted:
        return None, "needs a GPU"
    h, th = torch.randn(2, 8, 16, device=device, generator=torch.Generator(device).manual_seed(0))
    w, tw = torch.randn(2, 40, 16, device=device, generator=torch.Generator(device).manual_seed(1)) / 4
    s, t, y, level = h @ w.T, th @ tw.T, torch.arange(8, device=device), logging.root.manager.disable
    try:
        logging.disable(logging.ERROR)  # of kernels for other devices that could not be imported
        function = peer.make()
        got = function(h.requires_grad_(), w.requires_grad_(), th, tw, y) if peer.linear else function(s, t, y)
        want = exact(peer, s, t, y)
        if peer.same and abs(got.item() - want.item()) > 0.05 * want.item():
            raise ValueError(f"gives {got.item():.4g} where the textbook gives {want.item():.4g}")
        return function, ""
    except Exception as error:  # whatever another library raises, the table has to say
        return None, f"{type(error).__name__}: {str(error).splitlines()[0]}"
    finally:
        logging.disable(level)


def tuned(peer: Peer, h: Tensor, w: Tensor, *rest) -> tuple[Callable | None, str, dict]:
    """Its function in the settings that are the fastest for these inputs, why there is none, and the settings."""
    function, why = made(peer, h.device.type)
    tries = peer.settings(len(h))
    if not function or len(tries) == 1:
        return function, why, {}

    def once(f):
        h.grad = w.grad = None
        f(h, w, *rest).backward()

    def took(settings: dict) -> float:
        torch.compiler.reset()  # compiled for one shape: what has seen another is compiled for all
        function = peer.make(**settings)
        times = turns({"": lambda: once(function)}, h.device.type, least=0, repeats=3)[""]
        return min(times) if isinstance(times, list) else float("inf")

    best = min(tries, key=took)
    torch.compiler.reset()
    return peer.make(**best), "", best


def linear(loss: str, h: Tensor, w: Tensor, *rest, tune: bool = True) -> tuple[dict, dict[str, str], dict[str, dict]]:
    """Those of a loss from hidden states as functions of the student's; of those that cannot run why not; and of those
    that were tuned to these inputs (teacher's hidden states and head, labels are the rest) the settings."""
    found, missing, best = {}, {}, {}
    for peer in (p for p in PEERS if p.linear and p.loss == loss):
        function, missing[peer.name], chosen = tuned(peer, h, w, *rest) if tune else (*made(peer, h.device.type), {})
        if function:
            found[peer.name] = lambda h, w, f=function: f(h, w, *rest)
        if chosen:
            best[peer.name] = chosen
    return found, {k: why for k, why in missing.items() if why}, best
