"""The recipes: each does what distinguishes it, goes on where it was stopped, and is honest about noise."""

import json

import pytest
import torch
import torch.nn.functional as F

import kdkernels as kd
from kdkernels.cli import main
from kdkernels.trainer import images, recipes, reproduce
from kdkernels.trainer.config import UserError
from kdkernels.trainer.lab import Lab, Update, frozen
from kdkernels.trainer.recipes import abkd, dist, mse_teacher, simkd, ttm, wttm

S, T = (3 * torch.randn(6, 100, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in range(2))
Y = torch.randint(100, (6,), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def lab(tmp_path):
    lab = Lab(tmp_path / "run", tmp_path / "cache", 0, lambda text: None, share=0.004)
    lab._data[()] = images.Pairs(train=300, test=200)
    return lab


def test_pairs_of_digits():
    data, again = (images.Pairs(train=200, test=100, noise=0.0) for _ in range(2))
    for x, y in zip((*data.train, *data.test), (*again.train, *again.test), strict=True):
        assert torch.equal(x, y)
    pictures, labels, masks = data.train
    assert pictures.shape == (200, 1, 12, 20) and labels.bincount(minlength=100).eq(2).all()
    for picture, label, mask in zip(pictures, labels.tolist(), masks, strict=True):
        assert set(mask[:, :10].unique().tolist()) == {0, 1 + label // 10}
        assert set(mask[:, 10:].unique().tolist()) == {0, 1 + label % 10}
        assert (picture[0][mask > 0] > 0).all()
    rare = images.Pairs(train=2000, test=100, imbalance=20.0).counts
    assert 15 < rare[0] / rare[-1] < 25 and (rare.diff() <= 0).all()


def test_a_training_run_goes_on_where_it_was_stopped(lab, tmp_path):
    """Bit by bit, with the optimiser's and the normalisation's state."""

    def train(where, stop=None):
        lab.folder, lab.share = tmp_path / where, 1.0
        net = lab.student()

        def loss(batch):
            if batch.step == stop:
                raise KeyboardInterrupt
            return F.cross_entropy(net(batch.images), batch.labels) + 0 * torch.rand(3, generator=batch.noise).sum()

        lab.train("net", net, [Update(loss, list(net.parameters()))], steps=12, every=3)
        return net.state_dict(), lab.curves["net"]

    whole = train("whole")
    with pytest.raises(KeyboardInterrupt):
        train("stopped", stop=8)
    resumed = train("stopped")
    assert all(torch.equal(a, b) for a, b in zip(whole[0].values(), resumed[0].values(), strict=True))
    assert whole[1] == pytest.approx(resumed[1], rel=1e-6) and len(resumed[1]) == 12
    assert (tmp_path / "whole/net.safetensors").read_bytes() == (tmp_path / "stopped/net.safetensors").read_bytes()
    with pytest.raises(UserError, match="is of another run"):
        lab.train("net", lab.student(), [], steps=12)


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_runs_and_says_what_it_is(name, lab):
    recipe = recipes.load(name)
    assert f"kdkernels distill --recipe {name}\n" in recipe.__doc__ and "xpected" in recipe.__doc__
    figures = recipe.run(lab)
    assert all(arm in figures for pair in recipe.TREND for arm in pair) and recipe.CLAIM.endswith(".")
    assert all(0 <= value <= 100 for value in figures.values())
    files = {path: path.stat().st_mtime_ns for path in lab.folder.iterdir()}
    assert recipe.run(lab) == figures  # from what it has written
    assert files == {path: path.stat().st_mtime_ns for path in lab.folder.iterdir()}


def test_the_table_of_a_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "Lab", lambda *given: Lab(*given, share=0.004))
    monkeypatch.setattr(images.Pairs.__init__, "__defaults__", (200, 100, 0.15, 1.0, 0))
    where = ["--out", str(tmp_path / "o"), "--cache", str(tmp_path)]
    assert main(["distill", "--recipe", "kd", "--seeds", "2", *where]) == 0
    shown = capsys.readouterr().out
    assert "Hinton" in shown and "KD > cross-entropy: " in shown
    result = json.loads((tmp_path / "o/results.json").read_text())
    assert len(result["arms"]["KD"]) == 2 and result["trend"][0]["holds"] in ("yes", "no", "within noise")
    wrong = {"--recipe kdd": "unknown recipe 'kdd'; known: abkd", "--seeds 2": "belongs to --recipe",
             "--recipe kd --lr 1": "not --lr", "--recipe kd --seeds 0": "at least 1"}  # fmt: skip
    for flags, message in wrong.items():
        assert main(["distill", *flags.split()]) == 2
        assert message in capsys.readouterr().err
    assert main(["recipes"]) == 0 and "ttm" in capsys.readouterr().out


def test_what_counts_as_a_trend():
    assert reproduce.holds([3.0, 3.2, 2.9], [1.0, 1.1, 1.2]) == "yes"
    assert reproduce.holds([1.0, 1.1, 1.2], [3.0, 3.2, 2.9]) == "no"
    assert reproduce.holds([3.0, 1.0, 2.0], [2.0, 2.1, 1.9]) == "within noise"
    assert reproduce.holds([3.0], [1.0]) == "one seed"


def gradient(loss, s=S):
    leaf = s.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


def test_ttm_has_no_temperature_of_the_student_and_is_kd_with_a_renyi_entropy():
    loss, g = ttm.loss(), ttm.GAMMA
    torch.testing.assert_close(loss(S, T, Y), ttm.textbook(S, T, Y))
    torch.testing.assert_close(gradient(lambda s: loss(s, T, Y)), gradient(lambda s: ttm.textbook(s, T, Y)))
    p, q = (g * T).softmax(-1), (g * S).softmax(-1)
    power = (g * S.log_softmax(-1)).logsumexp(-1) / (1 - g)  # the Renyi entropy of order g
    kl = (p * (p.log() - q.log())).sum(-1)
    identity = kl / g - (1 / g - 1) * power - (1 / g - 1) * (p * p.log()).sum(-1)
    torch.testing.assert_close(kd.TTMLoss(gamma=g, reduction="none")(S, T), identity)


def test_wttm_weighs_rows_by_the_power_sum_of_the_teacher():
    weight = (wttm.GAMMA * T.log_softmax(-1)).exp().sum(-1)
    rows = kd.TTMLoss(gamma=wttm.GAMMA, reduction="none")(S, T)
    torch.testing.assert_close(wttm.loss()(S, T, Y), F.cross_entropy(S, Y) + wttm.BETA * (weight * rows).mean())


def test_the_mse_teacher_is_not_trained_by_cross_entropy():
    onehot = F.one_hot(Y, 100)
    want = mse_teacher.SCALE * (S.softmax(-1) - onehot).square().sum(-1).mean()
    torch.testing.assert_close(mse_teacher.error()(S, Y), want)
    torch.testing.assert_close(mse_teacher.error("logit")(S, Y), (S - onehot).square().sum(-1).mean())


def test_abkd_is_the_divergence_at_a_temperature_without_its_square():
    p, q = (T / 4).softmax(-1), (S / 4).softmax(-1)
    a, b = 0.8, 0.3
    terms = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
    want = F.cross_entropy(S, Y) - abkd.LAMBDA * terms.sum(-1).mean() / (a * b)
    torch.testing.assert_close(abkd.loss(a, b)(S, T, Y), want)


def test_dist_looks_across_the_rows_of_a_batch():
    both = gradient(lambda s: dist.loss()(s, T, Y))
    rows = [slice(i, i + 1) for i in range(6)]
    alone = torch.cat([gradient(lambda s, i=i: dist.loss()(s, T[i], Y[i]), S[i]) / 6 for i in rows])
    assert (both - alone).norm() > 0.1 * both.norm()


def test_simkd_learns_features_and_leaves_the_classifier_to_the_teacher(lab):
    teacher = frozen(lab.teacher())
    net = simkd.Reusing(lab.student(), teacher)
    own = {id(p) for p in net.own()}
    assert not own & {id(p) for p in [*teacher.parameters(), *net.student.head.parameters()]}
    x = lab.data().train[0][:5]
    before = {name: p.clone() for name, p in teacher.state_dict().items()}
    lab.train("net", net, [Update(simkd.feature_loss(net, teacher), net.own())], steps=800)
    assert all(torch.equal(p, before[name]) for name, p in teacher.state_dict().items())
    torch.testing.assert_close(net(x), teacher.classify(net.projector(net.student.features(x))))
