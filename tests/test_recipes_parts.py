"""Recipes with parts of a batch, on one rank and on several, and in mixed precision; what their bars show."""

import contextlib
import json
import multiprocessing
import os
import socket

import numpy
import pytest
import torch
import torch.nn.functional as F

import kdkernels as kd
from kdkernels.cli import main
from kdkernels.trainer import checkpoint, images, parallel, recipes, report, reproduce, textlab
from kdkernels.trainer.config import Config, UserError
from kdkernels.trainer.lab import Lab, Runs, Update
from kdkernels.trainer.recipes import comparative, ltkd, on_policy, rdd

SIZES = dict(PROMPT=5, RESPONSE=7, TEACHER=dict(hidden=32, ffn=32, heads=2, layers=2),
             STUDENT=dict(hidden=16, ffn=16, heads=2, layers=1))  # fmt: skip
BATCH_NORM = F.batch_norm


def pictures():
    data = images.Pairs(train=300, test=100)
    for side in ("train", "test"):
        pixels, *rest = getattr(data, side)
        setattr(data, side, (pixels.to(torch.get_default_dtype()), *rest))
    return data


def picture_lab(place, **settings):
    lab = Lab(place / "run", place / "cache", 0, report.silent, share=0.004, cfg=Config(**settings))
    lab._data = dict.fromkeys([(), (("train", comparative.CALLS),), (("imbalance", ltkd.IMBALANCE),)], pictures())
    return lab


def text_lab(place, texts, **settings):
    """Of texts that mostly end early: rows have different numbers of labels that count."""
    lab = textlab.TextLab(place / "run", place / "cache", 1, report.silent, share=0.03, cfg=Config(**settings))
    lab._data["text"] = text = textlab.Text(f"{texts}-cache", [texts], vocab=300, few=40, held=8)
    text.end = text.few[torch.arange(40)].flatten().mode().values.item()
    return lab


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("texts"), numpy.random.default_rng(0)
    words = ["".join(rng.choice([*"abcdefgh"], 2 + i % 4)) for i in range(200)]
    for i in range(30):
        (folder / f"{i}.txt").write_text(" ".join(words[k] for k in rng.zipf(1.5, 200) % 200))
    return str(folder)


@pytest.fixture
def small(monkeypatch):
    for name, value in SIZES.items():
        monkeypatch.setattr(textlab, name, value)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def frozen_statistics(x, mean, var, weight, bias, training, momentum, eps):
    """In place of F.batch_norm: rows apart from each other."""
    return BATCH_NORM(x, mean, var, weight, bias, False, momentum, eps)


def lab_of(recipe, place, texts, **settings):
    return text_lab(place, texts, **settings) if hasattr(recipe, "LAB") else picture_lab(place, **settings)


@pytest.mark.parametrize("name", recipes.names())
def test_the_gradient_of_parts_and_ranks_is_that_of_the_whole(name, small, double, texts, tmp_path, monkeypatch):
    """Of every update of every recipe but those that say why not: and of these it is not."""
    recipe = recipes.load(name)
    lab, gradient, apart = lab_of(recipe, tmp_path, texts), Runs._gradient, []
    monkeypatch.setattr(F, "batch_norm", frozen_statistics)
    monkeypatch.setattr(rdd, "SURE", 0.0)  # nets that have learnt nothing find all pixels hard
    monkeypatch.setattr(parallel, "add", lambda gradients: None)
    monkeypatch.setattr(parallel, "total", lambda value: value.item())

    def measured(update, batch, size, ranks, parts):
        noise, loss, lab.cfg.accumulate = batch.noise.get_state(), 0.0, parts
        for p in update.parameters:
            p.grad = None
        with monkeypatch.context() as here:
            here.setattr(parallel, "size", lambda: ranks)
            for rank in range(ranks):
                here.setattr(parallel, "rank", lambda rank=rank: rank)
                batch.noise.set_state(noise)
                loss += gradient(lab, update, batch, size)
        batch.noise.set_state(noise)
        return loss, torch.cat([p.grad.flatten() for p in update.parameters])

    def compared(self, update, batch, size):
        if self is lab and batch.step == 1:
            batch, update = update.prepare(batch) if update.prepare else batch, update._replace(prepare=None)
            parts, whole = (measured(update, batch, size, *cut) for cut in ((2, 3), (1, 1)))
            apart.append(max(abs(parts[0] - whole[0]), (parts[1] - whole[1]).norm().item() / whole[1].norm().item()))
            return whole[0]
        return gradient(self, update, batch, size)

    monkeypatch.setattr(Runs, "_gradient", compared)
    recipe.run(lab)
    assert apart and (max(apart) > 1e-9) == bool(getattr(recipe, "WHOLE", "")), apart


@pytest.mark.parametrize("name", recipes.names())
def test_mixed_precision(name, small, texts, tmp_path, monkeypatch):
    """Students learn in bfloat16, with weights and moments in float32; teachers are those of any precision."""
    recipe, seen, curves = recipes.load(name), set(), []
    monkeypatch.setattr(torch.nn.Module, "_call_impl", watching(torch.nn.Module._call_impl, seen))
    for dtype in ("float32", "bfloat16"):
        lab = lab_of(recipe, tmp_path, texts, dtype=dtype)
        lab.folder = tmp_path / dtype
        seen.clear()
        figures = recipe.run(lab)
        assert all(0 <= value <= 100 for value in figures.values())
        assert (torch.bfloat16 in seen) == (dtype == "bfloat16")
        curves.append(lab.curves)
        for path in lab.folder.glob("*.safetensors"):
            assert torch.bfloat16 not in {x.dtype for x in checkpoint.load_tensors(path)[0].values()}
    assert curves[0].keys() == curves[1].keys() and not any(curves[0][arm] == curves[1][arm] for arm in curves[0])
    for arm, curve in curves[0].items():
        assert curves[1][arm][0] == pytest.approx(curve[0], rel=0.05), arm


def watching(call, seen):
    def watched(self, *given, **named):
        found = call(self, *given, **named)
        seen.update([found.dtype] if isinstance(found, torch.Tensor) else [])
        return found

    return watched


def test_a_run_in_parts_and_mixed_precision_goes_on_where_it_was_stopped(tmp_path):
    def train(where, stop=None, **settings):
        lab = picture_lab(tmp_path, **settings)
        lab.folder, lab.share = tmp_path / where, 1.0
        net, teacher = lab.student(), lab.teacher(steps=1)

        def loss(batch):
            if batch.step == stop:
                raise KeyboardInterrupt
            assert len(batch.labels) == 64 // settings["accumulate"]
            return kd.KDLoss()(net(batch.images), teacher(batch.images), batch.labels)

        lab.train("net", net, [Update(loss, list(net.parameters()))], steps=8, every=3, teacher=teacher)
        return (tmp_path / where / "net.safetensors").read_bytes()

    cut = dict(accumulate=4, dtype="bfloat16")
    whole = train("whole", **cut)
    with pytest.raises(KeyboardInterrupt):
        train("stopped", stop=5, **cut)
    assert train("stopped", **cut) == whole
    for other in (dict(cut, dtype="float32"), dict(cut, accumulate=2)):
        with pytest.raises(UserError, match=r'is of another run: .*"dtype": "bfloat16".*take another --out'):
            train("stopped", **other)


def test_what_a_bar_shows(small, texts, tmp_path):
    """The last loss and how far both nets agree on what is held out; not of a net without a teacher."""
    shown = []

    @contextlib.contextmanager
    def show(title, unit):
        yield lambda done, total, **values: shown.append((title, unit, done, total, values))

    lab = picture_lab(tmp_path)
    lab.show, lab.share = show, 1.0
    teacher = lab.teacher(steps=3)
    assert [one[0].startswith("image-teacher-ce-") and "agreement" not in one[4] for one in shown] == [True] * 3
    shown.clear()
    net = lab.distil("kd", kd.KDLoss(), teacher, steps=5, every=2)
    assert [one[:4] for one in shown] == [("kd", "pictures/s", step, 5) for step in range(1, 6)]
    assert [one[4]["loss"] for one in shown] == lab.curves["kd"] and all(one[4]["speed"] > 0 for one in shown)
    held = checkpoint.load_tensors(tmp_path / "run/kd.safetensors")[0]["held"].tolist()
    assert [step for step, _ in held] == [0, 2, 4, 5]
    assert [one[4]["agreement"] for one in shown] == [held[k][1] for k in (0, 1, 1, 2, 3)]
    x = lab.data().test[0]
    assert held[-1][1] == (net(x).argmax(1) == teacher(x).argmax(1)).double().mean() < 1
    shown.clear()
    assert lab.distil("kd", kd.KDLoss(), teacher, steps=5, every=2) is not net and not shown  # it is done

    lab = text_lab(tmp_path, texts)
    lab.show = show
    net, x = lab.distil("text", kd.ForwardKLLoss()), lab.data().watched
    kept = lab.labels(x) != -100
    answers = [one(input_ids=x).logits[:, 4:11].argmax(-1)[kept] for one in (net, lab.teacher())]
    held = checkpoint.load_tensors(tmp_path / "run/text.safetensors")[0]["held"].tolist()
    assert held[-1][1] == (answers[0] == answers[1]).double().mean() and shown[-1][:2] == ("text", "tokens/s")


def test_settings_of_a_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "Lab", lambda *given, cfg: Lab(*given, share=0.004, cfg=cfg))
    monkeypatch.setattr(images.Pairs.__init__, "__defaults__", (200, 100, 0.15, 1.0, 0))
    given = ["--seeds", "1", "--out", str(tmp_path / "o"), "--cache", str(tmp_path)]
    cut = [*given, "--accumulate", "4", "--dtype", "bfloat16"]
    assert main(["distill", "--recipe", "kd", *cut]) == 0
    assert "kd, seed 0: kd: 4/4  loss " in (shown := capsys.readouterr().out) and "  agreement 0." in shown
    records = [json.loads(line) for line in (tmp_path / "o/metrics.jsonl").read_text().splitlines()]
    mine = [r for r in records if r["stage"] == "seed-0/kd"]
    assert [r["step"] for r in mine] == [0, 1, 2, 3, 4, 4] and set(mine[-1]["held_out"]) == {"agreement"}
    wrong = {
        ("kd", *given): "holds a run of {'recipe': 'kd', 'accumulate': 4, 'dtype': 'bfloat16'}, not {'recipe': 'kd'}",
        ("ttm", *cut): "take another --out", ("kd", *given, "--accumulate", "0"): "--accumulate must be at least 1",
        ("kd", *given, "--dtype", "int8"): "--dtype must be float32 or bfloat16",
        ("kd", *given, "--parallel", "fsdp"): "not --parallel",
        ("dist", "--accumulate", "2"): "--recipe dist: DIST correlates the pictures of a batch: no --accumulate",
    }  # fmt: skip
    for flags, message in wrong.items():
        assert main(["distill", "--recipe", *flags]) == 2
        assert message in capsys.readouterr().err
    lab = picture_lab(tmp_path)
    monkeypatch.setattr(parallel, "size", lambda: 65)
    with pytest.raises(UserError, match="65 ranks are more than the batches of net have rows: 64"):
        lab.plain("net")


def job(place, texts, normalised, **settings):
    """Students of both kinds; -> {name: weights}."""
    F.batch_norm = BATCH_NORM if normalised else frozen_statistics
    try:
        lab = picture_lab(place, **settings)
        lab.distil("kd", kd.KDLoss(temperature=4.0), lab.teacher())
        lab = text_lab(place, texts, **settings)
        lab.distil("mixed", kd.ForwardKLLoss(), on_policy.mixture(lab, 0.5))
    finally:
        F.batch_norm = BATCH_NORM
    found = [checkpoint.load_tensors(place / f"run/{name}.safetensors")[0] for name in ("kd", "mixed")]
    return [{k: v for k, v in one.items() if k == "curve" or k.endswith(("weight", "bias"))} for one in found]


def on_a_rank(rank, port, place, texts):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    vars(textlab).update(SIZES)
    saved, save = [], checkpoint.save_tensors
    checkpoint.save_tensors = lambda path, *given, **named: saved.append(str(path)) or save(path, *given, **named)
    parallel.start(Config(out=str(place)))
    for normalised in (False, True):
        job(place / str(normalised), texts, normalised)
    torch.set_default_dtype(torch.float32)
    images.Pairs.__init__.__defaults__ = (200, 100, 0.15, 1.0, 0)
    reproduce.Lab = lambda *given, cfg: Lab(*given, share=0.004, cfg=cfg)
    for _ in range(2):
        result = reproduce.run("kd", place / "whole", place / "cache", 2, report.silent)
    (place / f"{rank}.json").write_text(json.dumps([saved, result]))


def test_two_ranks_train_as_one(small, double, texts, tmp_path):
    """As one rank without batch normalisation, and with it as one rank that cuts batches into two parts. The first one
    trains what runs share, and writes all files."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=on_a_rank, args=(rank, port, tmp_path, texts)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    alone = {normalised: job(tmp_path / f"alone-{normalised}", texts, normalised, accumulate=1 + normalised)
             for normalised in (False, True)}  # fmt: skip
    for rank in ranks:
        rank.join(600)
        assert rank.exitcode == 0
    for normalised, wanted in alone.items():
        for name, one in zip(("kd", "mixed"), wanted, strict=True):
            found = checkpoint.load_tensors(tmp_path / f"{normalised}/run/{name}.safetensors")[0]
            for k, x in one.items():
                rtol = 1e-6 if k == "curve" else 1e-9  # kept in float32
                torch.testing.assert_close(found[k].double(), x.double(), rtol=rtol, atol=1e-11)
    (saved, result), (none, same) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert result == same and len(result["arms"]["KD"]) == 2 and not none and len(saved) == len(set(saved))
    assert json.loads((tmp_path / "whole/config.json").read_text()) == {"recipe": "kd", "ranks": 2}
