"""`kdkernels probe`: its figures from their definitions, and the command on a recipe's files."""

import json

import numpy
import pytest
import torch
from scipy import special, stats

from kdkernels.cli import main
from kdkernels.trainer import images, probe, probed
from kdkernels.trainer.checkpoint import save_tensors
from kdkernels.trainer.lab import state
from kdkernels.trainer.recipes import atsc, comparative, dfpt, rdd, simkd

N, V, ALPHA = 300, 12, 0.5


def measured(student, teacher, labels, size=64):
    batches = zip(*(x.split(size) for x in (student, teacher, labels)), strict=True)
    return probe.measure(batches, labels, ALPHA)


@pytest.fixture
def logits():
    draw = torch.Generator().manual_seed(0)
    t = 3 * torch.randn(N, V, generator=draw, dtype=torch.float64)
    s = 0.7 * t + torch.randn(N, V, generator=draw, dtype=torch.float64)
    return s, t, torch.randint(5, (N,), generator=draw)


def test_figures_from_their_definitions(logits):
    s, t, y = logits
    q, p = (special.softmax(x.numpy(), axis=1) for x in (s, t))
    figures, _ = measured(s, t, y)
    c, every = p.argmax(1), range(N)
    line = stats.linregress(special.logit(p[every, c]), special.logit(q[every, c]))
    assert figures["slope"] == pytest.approx(line.slope) and figures["intercept"] == pytest.approx(line.intercept)
    assert figures["agreement"] == pytest.approx((q.argmax(1) == c).mean())
    for side, x in (("student", q), ("teacher", p)):
        own = figures[side]
        assert own["accuracy"] == pytest.approx((x.argmax(1) == y.numpy()).mean())
        assert own["entropy"] == pytest.approx(stats.entropy(x, axis=1).mean())
        assert own["renyi_entropy"] == pytest.approx(2 * numpy.log(numpy.sqrt(x).sum(1)).mean())
        means = [x[y.numpy() == label].mean(0) for label in range(5)]
        assert own["cmi"] == pytest.approx(stats.entropy(x, [means[label] for label in y], axis=1).mean())
    again, _ = measured(s, t, y, size=N)
    assert json.dumps(again)[:60] == json.dumps(figures)[:60]


def test_a_student_that_exaggerates(logits):
    """Twice the teacher's log-odds: slope 2, no residual, less sure than the teacher where it is not sure."""
    _, t, y = logits
    c = t.argmax(1, keepdim=True)
    odds = probe.log_odds(t, c[:, 0])
    others = torch.zeros_like(t).scatter(1, c, -torch.inf)
    s = others - others.logsumexp(1, keepdim=True)
    s = s.scatter(1, c, 2 * odds[:, None])
    figures, _ = measured(s, t, y)
    assert figures["slope"] == pytest.approx(2) and figures["intercept"] == pytest.approx(0, abs=1e-9)
    tails = figures["tails"]
    assert tails["low"]["rows"] == tails["high"]["rows"] == N // 5
    assert all(abs(one["residual"]) < 1e-9 for one in tails.values())
    assert tails["low"]["y_minus_x"] == pytest.approx(odds.sort().values[: N // 5].mean().item())
    same, _ = measured(t, t, y)
    assert same["slope"] == pytest.approx(1) and same["kl"] == pytest.approx(0, abs=1e-12) and same["agreement"] == 1


def test_calibration():
    sure = torch.tensor([0.95, 0.95, 0.95, 0.95, 0.5, 1.0], dtype=torch.float64)
    right = torch.tensor([1, 1, 1, 0, 0, 1], dtype=torch.float64)
    error, bins = probe.calibration_error(sure, right)
    assert error == pytest.approx((5 * abs((4 * 0.95 + 1) / 5 - 0.8) + 0.5) / 6)
    assert [count for _, _, count in bins] == [1, 5]


def test_log_odds_of_a_sure_row():
    """Where 1 - p_c is nothing in the format the odds are still right."""
    x = torch.tensor([[60.0, 0.0, 0.0]])
    assert probe.log_odds(x, torch.tensor([0])).item() == pytest.approx(60 - 0.693147, abs=1e-5)


def test_the_command_on_files_of_a_recipe(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(images.Pairs.__init__, "__defaults__", (100, 200, 0.15, 1.0, 0))
    torch.manual_seed(0)
    paths = []
    for name, widths in (("kd", images.STUDENT), ("teacher", images.TEACHER)):
        net = images.ConvNet(widths)
        paths.append(str(tmp_path / f"{name}.safetensors"))
        save_tensors(paths[-1], {f"net/{k}": v for k, v in net.state_dict().items()} | {"curve": torch.zeros(2)})
    assert main(["probe", *paths]) == 0
    shown, saved = capsys.readouterr().out, json.loads((tmp_path / "probe/probe.json").read_text())
    assert "logit(q_c) = " in shown and saved["kd"]["rows"] == 200 and saved["kd"]["alpha"] == 0.5
    assert (tmp_path / "probe/kd.png").read_bytes().startswith(b"\x89PNG")
    torch.manual_seed(0)
    net = images.ConvNet(images.STUDENT).eval()
    right = net(images.Pairs().test[0]).argmax(1) == images.Pairs().test[1]
    assert saved["kd"]["student"]["accuracy"] == pytest.approx(right.double().mean().item())
    save_tensors(tmp_path / "other.safetensors", {"net/projector.weight": torch.zeros(2)})
    wrong = {
        ("a", "b", "c"): "got 3 paths", (*paths, "--alpha", "1"): "--alpha must be above 0 and not 1",
        (paths[0], "nowhere"): "nowhere: no such file", (str(tmp_path / "none"),): "no such folder",
        (str(tmp_path / "other.safetensors"), paths[1]): "not a network for images",
        ("x", "--tokens", "0"): "--tokens must be at least 1",
    }  # fmt: skip
    for given, message in wrong.items():
        assert main(["probe", *given]) == 2
        assert message in capsys.readouterr().err


def test_the_command_on_networks_of_pixels(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(images.Pairs.__init__, "__defaults__", (100, 50, 0.15, 1.0, 0))
    nets = {"rdd": rdd.SegNet(rdd.STUDENT), "teacher": rdd.SegNet(rdd.TEACHER), "kd": images.ConvNet(images.STUDENT)}
    paths = {name: str(tmp_path / f"{name}.safetensors") for name in nets}
    for name, net in nets.items():
        save_tensors(paths[name], {f"net/{k}": v for k, v in net.state_dict().items()})
    assert main(["probe", paths["rdd"], paths["teacher"]]) == 0
    saved = json.loads((tmp_path / "probe/probe.json").read_text())["rdd"]
    x, masks = images.Pairs().test[0], images.Pairs().test[2]
    q, p = (nets[name].eval()(x)[0] for name in ("rdd", "teacher"))
    assert saved["rows"] == masks.numel() == 50 * 12 * 20
    assert saved["agreement"] == pytest.approx((q.argmax(-1) == p.argmax(-1)).double().mean().item())
    assert saved["student"]["accuracy"] == pytest.approx((q.argmax(-1) == masks).double().mean().item())
    assert main(["probe", paths["kd"], paths["teacher"]]) == 2
    assert "kd.safetensors: not a network for the pixels of images" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["plain", "simkd", "atsc-two", "comparative", "dfpt"])
def test_nets_of_recipes_are_read_again(kind, tmp_path):
    """The student through the teacher's classifier, or all that is around it, from what its file has once."""
    torch.manual_seed(0)
    student, teachers = images.ConvNet(images.STUDENT), [images.ConvNet() for _ in range(2)]
    reusing = [simkd.Reusing(student, teacher) for teacher in teachers]
    nets = {"plain": images.ConvNet((4, 5, 6)), "simkd": reusing[0], "atsc-two": atsc.Several(reusing),
            "comparative": comparative.Remembering(student, 100),
            "dfpt": dfpt.Both(student, dfpt.DualPath(teachers[0]))}  # fmt: skip
    net, x = nets[kind], images.Pairs(train=10, test=50).test[0]
    net.train()(x)  # statistics of its normalisation that are not those it was made with
    found = probed.image_net(tmp_path, {k: v.clone() for k, v in state(net).items()})
    assert type(found) is type(net) and torch.equal(found(x), net.eval()(x))
