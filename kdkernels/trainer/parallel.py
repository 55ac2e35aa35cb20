"""Data-parallel training under torchrun: every rank learns from its rows of a batch, the first one writes the files.

    torchrun --nproc-per-node 2 -m kdkernels distill --out runs/two
    torchrun --nproc-per-node 2 -m kdkernels distill --resume runs/two

The ranks share the run folder and the cache. Batches, their gradients and what is written are those of one rank, to
rounding: a batch is cut into the rows of each rank, and those into --accumulate parts. So it is with a recipe, but that
batch normalisation takes each part by itself; its teachers are trained by the first rank.
"""

import atexit
import contextlib
import gc
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .config import UserError

_alone = False


def size() -> int:
    """The number of ranks torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ and not _alone else 1


def rank() -> int:
    return int(os.environ["RANK"]) if size() > 1 else 0


def start(cfg):
    """Joins the ranks. All but the first are silent; all write where the first one does."""
    if size() == 1 or dist.is_initialized():
        return
    cuda = cfg.device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    atexit.register(leave)
    name = torch.zeros(4096, dtype=torch.uint8)
    if rank() == 0:
        spelled = os.path.abspath(cfg.out).encode()
        name[: len(spelled)] = torch.frombuffer(bytearray(spelled), dtype=torch.uint8)
    else:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)
    dist.broadcast(name, 0)
    cfg.out = bytes(name[name > 0].tolist()).decode()


def leave():
    """Ends the group. A thread of it that lets go of a tensor while Python is torn down would abort the process."""
    gc.collect()  # models refer to themselves, and to the group
    dist.destroy_process_group()


def alone(work):
    """work() on this rank, as if there were no others."""
    global _alone
    before, _alone = _alone, True
    try:
        return work()
    finally:
        _alone = before


def first(work):
    """work() on the first rank. The others wait for it, and stop where it fails."""
    if size() == 1:
        return work()
    done = torch.zeros(1)
    try:
        found = work() if rank() == 0 else None
        done += 1
    finally:
        dist.all_reduce(done)
    if done.item() < size():
        raise UserError(f"rank {rank()} ends: the first rank has failed")
    return found


def wrap(model, cfg):
    """-> what to call in place of the model. With FSDP2 the model's own parameters are cut into shards."""
    if size() == 1:
        return model
    if cfg.parallel == "ddp":
        # Without this the first step of a process would add gradients in another order than the next: not the same bits
        # after a resume. Torch warns once that it finds none.
        return DistributedDataParallel(model, find_unused_parameters=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(cfg.device.split(":")[0], (size(),))
    for part in [*model.model.layers, model]:
        fully_shard(part, mesh=mesh, reshard_after_forward=True)  # a measurement has no backward that would do it
    return model


def exchanging(net, last: bool):
    """A context for the backward of a part: gradients meet after the last one."""
    if isinstance(net, DistributedDataParallel):
        return contextlib.nullcontext() if last else net.no_sync()
    if hasattr(net, "set_requires_gradient_sync"):
        net.set_requires_gradient_sync(last)
    return contextlib.nullcontext()


def total(value: Tensor) -> float:
    """The sum over all ranks."""
    if size() > 1:
        dist.all_reduce(value)
    return value.item()


def add(gradients: list[Tensor]):
    """Makes each its sum over all ranks, for updates of more nets than one that a `wrap` could hold."""
    if size() > 1:
        for x in gradients:
            dist.all_reduce(x)


def same_statistics(net):
    """Batch normalisation's running ones, of each rank's rows, become their mean."""
    if size() > 1:
        for part in net.modules():
            if part.training and isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
                for x in (part.get_buffer("running_mean"), part.get_buffer("running_var")):
                    dist.all_reduce(x.div_(size()))


def rows(batch: int, accumulate: int) -> list[range]:
    """The rows of a batch that this rank takes, in parts; as many parts on every rank."""
    parts = min(accumulate, batch // size())
    ends = [batch * k // (parts * size()) for k in range(parts * size() + 1)]
    mine = range(rank() * parts, (rank() + 1) * parts)
    return [range(ends[k], ends[k + 1]) for k in mine]


def whole(x: Tensor) -> Tensor:
    """Of all ranks' shards."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def shard_like(x: Tensor, parameter: Tensor) -> Tensor:
    """x, the whole of it on every rank, as the parameter is cut and where it lies."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    x = x.to(parameter.device)
    if not isinstance(parameter, DTensor) or x.ndim == 0:
        return x
    return distribute_tensor(x, parameter.device_mesh, parameter.placements)
