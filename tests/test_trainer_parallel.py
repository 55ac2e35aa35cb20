"""Parts of a batch, on one rank and on several: the gradient is that of the whole."""

import json
import multiprocessing
import os
import socket
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import kdkernels as kd
from kdkernels.trainer import parallel
from kdkernels.trainer.config import Config, UserError
from kdkernels.trainer.distill import check_parts, check_room, cross_entropy, in_order
from kdkernels.trainer.loop import Learner, Stage, train

BATCH, LENGTH, CLASSES = 7, 5, 11
Output = namedtuple("Output", ["logits"])  # FSDP2 looks for tensors in what torch knows


class Toy(nn.Module):
    """A model as the trainer calls it: input_ids -> .logits; its layers in .model.layers. Float64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.first, self.last = nn.Embedding(CLASSES, 6), nn.Linear(6, CLASSES)
        self.double()

    def forward(self, input_ids):
        x = self.first(input_ids)
        for layer in self.model.layers:
            x = layer(x).tanh()
        return Output(5 * self.last(x))


class Batches:
    """One batch, of whose rows the labels count from none to all."""

    def batch(self, stream, step, size):
        draw = torch.Generator().manual_seed(step)
        inputs, labels = (torch.randint(CLASSES, (BATCH, LENGTH), generator=draw) for _ in "xy")
        labels[torch.arange(LENGTH) > torch.arange(BATCH)[:, None]] = -100
        labels[3] = -100
        return inputs, labels


def gradients(loss, **settings):
    """-> {name: gradient} of a training step, and its loss."""
    cfg = Config(**settings, clip=0.0, seq_len=LENGTH)
    teacher = torch.randn(BATCH, LENGTH, CLASSES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    learner = Learner(Toy(), loss, cfg)
    stage = Stage("student", 1, BATCH, 1, 0.1, None, "")

    def teach(step, row, inputs):
        return teacher[row : row + len(inputs)].flatten(0, 1)

    found = train(stage, 0, {"it": learner}, Batches(), cfg, teach)["it"]
    return {name: parallel.whole(p.grad) for name, p in learner.model.named_parameters()}, found


def test_mixed_precision():
    """Matrix products and the loss's logits in bfloat16; weights, their gradients and moments in float32."""
    seen, learners = [], {}
    inputs, labels = Batches().batch(1, 0, BATCH)
    told = torch.randn(BATCH * LENGTH, CLASSES, generator=torch.Generator().manual_seed(1))
    for dtype in ("float32", "bfloat16"):

        def loss(student, teacher, *rest):
            seen.append(student.dtype)
            return in_order(kd.KDLoss(reduction="mean"))(student, teacher.to(student.dtype), *rest)

        one = learners[dtype] = Learner(Toy().float(), loss, Config(dtype=dtype, clip=0.0, seq_len=LENGTH))
        one.add(inputs, labels, told, int((labels != -100).sum()), 1.0, True)
    assert seen == [torch.float32, torch.bfloat16]
    for p, q in zip(*(one.model.parameters() for one in learners.values()), strict=True):
        assert p.grad.dtype == q.grad.dtype == torch.float32
        assert 0 < (p.grad - q.grad).norm() < 3e-2 * p.grad.norm()
    learners["bfloat16"].update(1e-3)
    assert all(x.dtype == torch.float32 for x in learners["bfloat16"].tensors().values())


def the_loss(name):
    if name == "cross-entropy":
        return cross_entropy
    return in_order(kd.WTTMLoss(gamma=0.5, ce_weight=0.3, reduction=name))


def whole(name):
    """The same from the definition, of the batch in one."""
    if name == "cross-entropy":
        return lambda s, t, y, *_: nn.functional.cross_entropy(s, y)
    return lambda s, t, y, *_: kd.WTTMLoss(gamma=0.5, ce_weight=0.3, reduction=name)(s, t, y)


def agree(found, wanted, rtol=1e-9):
    assert found[1] == pytest.approx(wanted[1], rel=1e-6)
    for name, gradient in wanted[0].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=rtol, atol=rtol / 100)


@pytest.mark.parametrize("accumulate", [1, 3, 20])
@pytest.mark.parametrize("name", ["mean", "sum", "batchmean", "cross-entropy"])
def test_the_gradient_of_parts_is_that_of_the_whole(name, accumulate):
    rtol = 1e-5 if name == "cross-entropy" else 1e-9  # the trainer's is in float32
    agree(gradients(the_loss(name), accumulate=accumulate), gradients(whole(name)), rtol)


def on_a_rank(rank, port, path):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port)
    torch.set_num_threads(1)
    cfg = Config(out=f"{path}/{rank}")
    parallel.start(cfg)
    found = {"out": cfg.out, "first": parallel.first(lambda: "done")}
    for kind in ("ddp", "fsdp"):
        for accumulate in (1, 2):
            grads, loss = gradients(the_loss("mean"), parallel=kind, accumulate=accumulate)
            found[f"{kind} {accumulate}"] = {name: g.tolist() for name, g in grads.items()}, loss
    try:
        parallel.first(lambda: 1 / 0)
    except (UserError, ZeroDivisionError) as error:
        found["failed"] = str(error)
    with open(f"{path}/{rank}.json", "w") as file:
        json.dump(found, file)


def test_ranks_add_up_their_gradients(tmp_path):
    """Not their directions alone, which is all that AdamW looks at: with DDP and FSDP2, in parts and not."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=on_a_rank, args=(rank, port, str(tmp_path))) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [one["out"] for one in found] == [f"{tmp_path}/0"] * 2
    assert [one["first"] for one in found] == ["done", None]
    assert [one["failed"] for one in found] == ["division by zero", "rank 1 ends: the first rank has failed"]
    wanted = gradients(whole("mean"))
    for one in found:
        for name in ("ddp 1", "ddp 2", "fsdp 1", "fsdp 2"):
            grads, loss = one[name]
            agree(({k: torch.tensor(g, dtype=torch.float64) for k, g in grads.items()}, loss), wanted)


def test_every_rank_has_rows_in_as_many_parts(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    for batch, accumulate, parts in [(12, 2, 2), (8, 4, 2), (3, 5, 1)]:
        taken = []
        for rank in "012":
            monkeypatch.setenv("RANK", rank)
            mine = parallel.rows(batch, accumulate)
            assert len(mine) == parts and all(len(part) for part in mine)
            taken += [row for part in mine for row in part]
        assert taken == list(range(batch))


def test_what_cannot_be_cut_is_said_before_it_starts(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="DISTLoss compares the rows of a batch: no --accumulate"):
        check_parts(kd.DISTLoss(), Config(accumulate=2))
    check_parts(kd.DISTLoss(), Config())
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(UserError, match="6 ranks need a --batch and --teacher-batch as large, got 4"):
        check_parts(kd.WTTMLoss(), Config())
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=5 << 20))
    check_room(tmp_path / "not" / "yet", 5 << 20)
    with pytest.raises(UserError, match=f"too little room in {tmp_path}: 5 MB free, 8 MB needed"):
        check_room(tmp_path / "not" / "yet", 7 << 20)
