"""The recipes: each does what distinguishes it, goes on where it was stopped, and is honest about noise."""

import contextlib
import json

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing import event_accumulator

import kdkernels as kd
from benchmarks import validation
from kdkernels.cli import main
from kdkernels.trainer import checkpoint, images, recipelog, recipes, report, reproduce
from kdkernels.trainer.config import UserError
from kdkernels.trainer.lab import Lab, Update, frozen, logits_of
from kdkernels.trainer.recipes import (
    abkd,
    atsc,
    bayesian_teacher,
    comparative,
    dist,
    label_revision,
    mcmi,
    mse_teacher,
    simkd,
    ttm,
    wttm,
)
from kdkernels.trainer.recipes import kd as hinton

S, T = (3 * torch.randn(6, 100, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in range(2))
Y = torch.randint(100, (6,), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def lab(tmp_path):
    lab = Lab(tmp_path / "run", tmp_path / "cache", 0, report.silent, share=0.004)
    lab._data[()] = lab._data[("train", comparative.CALLS),] = images.Pairs(train=300, test=200)
    lab._data[("imbalance", 20.0),] = lab._data[()]
    return lab


def test_teachers_of_another_share_of_the_steps_are_other_files(tmp_path):
    for share in (0.002, 0.004):
        Lab(tmp_path / "run", tmp_path / "cache", 0, report.silent, share).teacher()
    assert len(list((tmp_path / "cache").glob("image-teacher-*"))) == 2


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


def test_every_seed_has_a_teacher_of_its_own(tmp_path):
    """So that what differs between seeds is of the teacher too; a second and a third are of few seeds."""
    labs = [Lab(tmp_path / str(seed), tmp_path / "cache", seed, report.silent, 0.001) for seed in range(5)]
    assert [one.teacher_seeds(3) for one in labs[:3]] == [[1000, 1001, 1002], [1001, 1002, 1000], [1002, 1000, 1001]]
    assert [sorted(set(one.teacher_seeds(3)) - {1003, 1004}) for one in labs[3:]] == [[1001, 1002], [1000, 1002]]
    first, second = (one.teacher().head.weight for one in labs[:2])
    assert not torch.equal(first, second) and torch.equal(second, labs[0].teacher(seed=1001).head.weight)


@pytest.mark.parametrize("name", [name for name in recipes.names() if not hasattr(recipes.load(name), "LAB")])
def test_every_recipe_runs_and_says_what_it_is(name, lab):
    recipe = recipes.load(name)
    assert f"kdkernels distill --recipe {name}\n" in recipe.__doc__
    figures = recipe.run(lab)
    assert all(arm in figures for pair in recipe.TREND for arm in pair) and recipes.claim(recipe).endswith(".")
    assert all(0 <= value <= 100 for value in figures.values())
    assert len({str(curve) for curve in lab.curves.values()}) == len(lab.curves)  # no arm does what another does
    files = {path: path.stat().st_mtime_ns for path in lab.folder.iterdir()}
    assert recipe.run(lab) == figures  # from what it has written
    assert files == {path: path.stat().st_mtime_ns for path in lab.folder.iterdir()}


def test_logs_are_written_as_a_recipe_goes_and_again_after_a_kill(lab, tmp_path):
    """As far as the nets' files, of which any process may have been killed before it logged them."""

    def train(where, stop=None, lines=None):
        log, lab.folder, lab.share = recipelog.Log(tmp_path / where), tmp_path / where, 1.0
        lab.log = lambda name, *values: log.add(f"seed-0/{name}", *values)
        if lines is not None:  # the last of them cut short
            kept = log.journal.path.read_text().splitlines()[:lines]
            log.journal.path.write_text("\n".join([*kept, '{"stage": "se']))
        net, teacher = lab.student(), lab.teacher(steps=1)

        def loss(batch):
            if batch.step == stop:
                raise KeyboardInterrupt
            return F.cross_entropy(net(batch.images), batch.labels)

        with contextlib.closing(log):
            lab.train("net", net, [Update(loss, list(net.parameters()))], steps=12, every=3, teacher=teacher)

    def logged(where):
        board = event_accumulator.EventAccumulator(str(tmp_path / where / "tensorboard")).Reload()
        scalars = {tag: [(one.step, one.value) for one in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
        return (tmp_path / where / "metrics.jsonl").read_text(), scalars

    train("whole")
    lines = [json.loads(line) for line in logged("whole")[0].splitlines()]
    assert [one["step"] for one in lines] == [0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12, 12]
    for where, of in (("stopped", None), ("behind", 4)):
        with pytest.raises(KeyboardInterrupt):
            train(where, stop=8)
        assert logged(where)[0].splitlines() == logged("whole")[0].splitlines()[:9]
        train(where, lines=of)
        assert logged(where) == logged("whole")
    (tmp_path / "whole/net.safetensors").unlink()
    train("whole")
    assert logged("whole") == logged("stopped")


def test_the_table_of_a_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "Lab", lambda *given, cfg: Lab(*given, share=0.004, cfg=cfg))
    monkeypatch.setattr(images.Pairs.__init__, "__defaults__", (200, 100, 0.15, 1.0, 0))
    where = ["--out", str(tmp_path / "o"), "--cache", str(tmp_path)]
    assert main(["distill", "--recipe", "kd", "--seeds", "2", *where]) == 0
    shown = capsys.readouterr().out
    assert "Hinton" in shown and "KD > cross-entropy: " in shown and " pictures/s  ETA 0 s\n" in shown
    result = json.loads((tmp_path / "o/results.json").read_text())
    assert len(result["arms"]["KD"]) == 2 and result["trend"][0]["holds"] in validation.COLOURS
    lines = [json.loads(line) for line in (tmp_path / "o/metrics.jsonl").read_text().splitlines()]
    assert {r["stage"] for r in lines} == {f"seed-{k}/{net}" for k in range(2) for net in ("kd", "cross-entropy")}
    kept = checkpoint.load_tensors(tmp_path / "o/seed-1/kd.safetensors")[0]["curve"].tolist()
    assert [r["loss"] for r in lines if r["stage"] == "seed-1/kd" and "loss" in r] == kept and len(kept) == 4
    board = event_accumulator.EventAccumulator(str(tmp_path / "o/tensorboard")).Reload()
    assert [point.value for point in board.Scalars("seed-1/kd/loss")] == pytest.approx(kept)
    assert (tmp_path / "o/curves.png").read_bytes().startswith(b"\x89PNG")
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
    assert reproduce.holds([87.75] * 3, [87.48] * 3) == "one seed"  # one pair of nets, three times


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


def test_kd_learns_soft_targets_beside_the_labels(lab, monkeypatch):
    given = {}
    monkeypatch.setattr(lab, "distil", lambda name, loss, teacher: given.update({name: loss}) or lab.student())
    hinton.run(lab)
    soft = 16 * F.kl_div((S / 4).log_softmax(-1), (T / 4).softmax(-1), reduction="batchmean")
    torch.testing.assert_close(given["kd"](S, T, Y), 0.1 * F.cross_entropy(S, Y) + 0.9 * soft)


def test_wttm_weighs_rows_by_the_power_sum_of_the_teacher():
    weight = (wttm.GAMMA * T.log_softmax(-1)).exp().sum(-1)
    rows = kd.TTMLoss(gamma=wttm.GAMMA, reduction="none")(S, T)
    torch.testing.assert_close(wttm.loss()(S, T, Y), F.cross_entropy(S, Y) + wttm.BETA * (weight * rows).mean())


def test_how_smooth_a_student_is(lab):
    net, data = lab.student().eval(), lab.data()
    q = net(data.test[0]).softmax(-1)
    assert images.entropy(net, data) == pytest.approx(100 * torch.distributions.Categorical(q).entropy().mean().item()
                                                      / torch.tensor(100.0).log().item())  # fmt: skip
    with torch.no_grad():
        for p in net.head.parameters():
            p.zero_()
    assert images.entropy(net, data) == pytest.approx(100)


def test_the_mse_teacher_is_not_trained_by_cross_entropy():
    onehot = F.one_hot(Y, 100)
    want = mse_teacher.SCALE * (S.softmax(-1) - onehot).square().sum(-1).mean()
    torch.testing.assert_close(mse_teacher.error()(S, Y), want)
    torch.testing.assert_close(mse_teacher.error("logit")(S, Y), (S - onehot).square().sum(-1).mean())


def first_loss(lab, teacher):
    """-> the first loss that a teacher was trained with, its first logits from start(), and their labels."""
    [path] = lab.cache.glob(f"image-teacher-{teacher}-*.safetensors")
    batch = lab.shared(1000).batch(lab.data(), 0, 64)
    logits = lambda net: net.train()(batch.images)  # noqa: E731
    return checkpoint.load_tensors(path)[0]["curve"][0], logits, batch.labels


@pytest.mark.parametrize("space", ["probability", "logit"])
def test_the_squared_error_is_what_its_teacher_learns_from(space, lab):
    mse_teacher.run(lab)
    found, logits, labels = first_loss(lab, f"mse-{space}")
    s = logits(mse_teacher.start(lab.teacher(), space))
    x, scale = (s.softmax(-1), mse_teacher.SCALE) if space == "probability" else (s, 1.0)
    torch.testing.assert_close(found, scale * (x - F.one_hot(labels, 100)).square().sum(-1).mean())
    assert (found - F.cross_entropy(s, labels)).abs() > 0.1


def test_abkd_is_the_divergence_at_a_temperature_without_its_square():
    p, q = (T / 4).softmax(-1), (S / 4).softmax(-1)
    a, b = 0.8, 0.3
    terms = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
    want = F.cross_entropy(S, Y) - abkd.LAMBDA * terms.sum(-1).mean() / (a * b)
    torch.testing.assert_close(abkd.loss(a, b)(S, T, Y), want)
    powers, q = T.softmax(-1) ** 0.2, S.softmax(-1)  # and with a transformed teacher
    p = powers / powers.sum(-1, keepdim=True)
    terms = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
    torch.testing.assert_close(abkd.with_ttm()(S, T, Y), F.cross_entropy(S, Y) - 20 * terms.sum(-1).mean() / (a * b))


def test_dist_looks_across_the_rows_of_a_batch():
    both = gradient(lambda s: dist.loss()(s, T, Y))
    rows = [slice(i, i + 1) for i in range(6)]
    alone = torch.cat([gradient(lambda s, i=i: dist.loss()(s, T[i], Y[i]), S[i]) / 6 for i in rows])
    assert (both - alone).norm() > 0.1 * both.norm()


def test_the_stronger_teacher_of_dist_has_twice_the_width_and_the_steps(lab, monkeypatch):
    asked, teacher = [], lab.teacher
    monkeypatch.setattr(lab, "teacher", lambda **options: asked.append(options) or teacher(**options))
    figures = dist.run(lab)
    assert asked == [dict(widths=(16, 32, 64), steps=600), {}] and images.TEACHER == (32, 64, 128)
    assert {f"{arm}, {note}" for arm in ("teacher", "KD", "DIST") for note in ("weaker", "stronger")} < set(figures)


def test_simkd_learns_features_and_leaves_the_classifier_to_the_teacher(lab):
    teacher = frozen(lab.teacher())
    net = simkd.Reusing(lab.student(), teacher)
    own = {id(p) for p in net.own()}
    assert not own & {id(p) for p in [*teacher.parameters(), *net.student.head.parameters()]}
    x = lab.data().train[0][:5]
    before = {name: p.clone() for name, p in teacher.state_dict().items()}
    loss = simkd.feature_loss(net, teacher)
    lab.train("net", net, [Update(loss, net.own())], steps=800)
    assert loss(lab.batch(lab.data(), 0, 64)) < lab.curves["net"][0]
    assert all(torch.equal(p, before[name]) for name, p in teacher.state_dict().items())
    torch.testing.assert_close(net(x), teacher.classify(net.projector(net.student.features(x))))


def test_the_loss_of_simkd_is_the_squared_error_of_the_features(lab, monkeypatch):
    nets = watched(lab, monkeypatch)
    simkd.run(lab)
    net, [update] = nets["simkd"]
    batch = lab.batch(lab.data(), 0, 8)
    wanted = lab.teacher().features(batch.images)
    error = (net.projector(net.student.features(batch.images)) - wanted).square().mean()
    torch.testing.assert_close(update.loss(batch), error)
    assert error > 0


def watched(lab, monkeypatch):
    """{name: (net, updates)} of all that the lab trains from here on."""
    found, train = {}, lab.train

    def watch(name, net, updates, **options):
        found[name] = net, updates
        return train(name, net, updates, **options)

    monkeypatch.setattr(lab, "train", watch)
    return found


def test_atsc_moves_the_teacher_towards_the_student(lab):
    """By the gradient of the error of the features, all there is where the teacher is still the pretrained one."""
    pretrained = frozen(lab.teacher())
    net, batch = atsc.shared(lab.student(), pretrained), lab.batch(lab.data(), 0, 16)
    encoder = list(net.teacher.body.parameters())
    move, _ = atsc.updates(net, pretrained)
    found = torch.autograd.grad(move.loss(batch), encoder)
    apart = net.features(batch.images).detach() - net.teacher.train().features(batch.images)
    for one, wanted in zip(found, torch.autograd.grad(apart.square().mean(), encoder), strict=True):
        torch.testing.assert_close(one, wanted)
    assert all(one.norm() > 0 for one in found)


def test_atsc_moves_the_teacher_and_then_the_whole_classifier(lab):
    """Weight and bias, which the first update leaves alone; the encoder stays near where it was."""
    pretrained = frozen(lab.teacher())
    net = atsc.shared(lab.student(), pretrained)
    move, share = atsc.updates(net, pretrained)
    head, encoder = list(net.teacher.head.parameters()), list(net.teacher.body.parameters())
    assert share.parameters == head and not {id(p) for p in head} & {id(p) for p in move.parameters}
    assert {id(p) for p in encoder} <= {id(p) for p in move.parameters}
    lab.train("net", net, [move, share], steps=800)
    changed = lambda name: not torch.equal(net.teacher.state_dict()[name], pretrained.state_dict()[name])  # noqa: E731
    assert changed("head.weight") and changed("head.bias") and changed("body.0.weight")
    batch = type("Batch", (), dict(inputs=lab.data().train[0][:8], labels=lab.data().train[1][:8]))
    with torch.no_grad():
        near = move.loss(batch)
        encoder[0].add_(1.0)
        assert move.loss(batch) > near + 100
    net.eval()
    assert torch.equal(net(batch.inputs), net.teacher.classify(net.projector(net.student.features(batch.inputs))))


def test_mcmi_maximises_the_divergence_from_frozen_centroids(lab):
    data, teacher = lab.data(), lab.teacher()
    log_q = mcmi.centroids(teacher, data)
    p = torch.cat([teacher(x) for x in data.train[0].split(1000)]).softmax(-1)
    here = p[data.train[1] == 7].mean(0)
    torch.testing.assert_close(log_q[7].exp(), here)
    q = log_q[Y].double()
    kl = (S.softmax(-1) * (S.log_softmax(-1) - q)).sum(-1).mean()
    torch.testing.assert_close(mcmi.loss(q.new_zeros(100, 100).index_copy(0, Y, q))(S, Y),
                               F.cross_entropy(S, Y) - mcmi.LAMBDA * kl)  # fmt: skip
    mcmi.run(lab)  # and that is what its teacher learns from
    found, logits, labels = first_loss(lab, "mcmi")
    s = logits(teacher)
    kl = (s.softmax(-1) * (s.log_softmax(-1) - log_q[labels])).sum(-1).mean()
    torch.testing.assert_close(found, F.cross_entropy(s, labels) - mcmi.LAMBDA * kl)
    assert mcmi.LAMBDA * kl > 0.01


def test_a_revised_label_is_the_most_likely_class_and_right_rows_stay():
    y = torch.cat((T.argmax(-1)[:3], Y[3:]))
    p, revised = (T / 4).softmax(-1), (label_revision.revised(T, y) / 4).softmax(-1)
    assert torch.equal(revised.argmax(-1), y) and (T.argmax(-1)[3:] != y[3:]).any()
    torch.testing.assert_close(revised[:3], p[:3])
    others = torch.ones_like(p).scatter(1, y[:, None], 0.0)
    ratio = (revised / p)[others.bool()].view(6, 99)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))  # all others lose alike
    chosen = label_revision.selected(torch.randn(200, 10), torch.randn(200, 10), torch.randint(10, (200,)))
    assert chosen.sum() == 160


def test_selected_pictures_teach_what_the_labels_do():
    """q is 1/3 everywhere and all labels 0: towards them is (-2, 1, 1) / 3, and a picture's score p_0 - 1/3."""
    own = torch.tensor([0.5, 0.1, 0.9, 0.6, 0.3, 0.2, 0.7, 0.8, 0.4, 0.35])
    p = torch.stack((own, 0.7 * (1 - own), 0.3 * (1 - own)), 1)
    chosen = label_revision.selected(torch.zeros(10, 3), p.log(), torch.zeros(10, dtype=torch.int64))
    assert chosen.tolist() == [1, 0, 1, 1, 1, 0, 1, 1, 1, 1]


def test_pictures_that_are_not_selected_teach_by_their_label_alone(lab, monkeypatch):
    nets, given, chosen = watched(lab, monkeypatch), [], (torch.arange(300) % 3 == 0).double()
    monkeypatch.setattr(label_revision, "selected", lambda *logits: given.append(logits) or chosen)
    label_revision.run(lab)
    net, [update] = nets["selection"]
    student, teacher, labels = given[0]
    data, batch = lab.data(), lab.batch(lab.data(), 0, 16)
    torch.testing.assert_close(student, logits_of(nets["cross-entropy"][0], data))
    torch.testing.assert_close(teacher, label_revision.revised(logits_of(lab.teacher(), data), data.train[1]))
    assert torch.equal(labels, data.train[1])
    s = net(batch.images)
    rows = 16 * F.kl_div((s / 4).log_softmax(-1), (teacher[batch.at] / 4).softmax(-1), reduction="none").sum(-1)
    distilled = (chosen[batch.at] * rows).mean()
    torch.testing.assert_close(update.loss(batch), (0.1 * F.cross_entropy(s, batch.labels) + 0.9 * distilled).float())
    assert 0 < chosen[batch.at].sum() < 16


def test_pairs_of_residuals_without_a_loop():
    d, o = torch.randn(5, 7, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    torch.testing.assert_close(comparative.pairs(d), (d[:, None] - d).square().sum(-1).mean())
    torch.testing.assert_close(comparative.across(d, o), (d[:, None] - o).square().sum(-1).mean())
    torch.testing.assert_close(comparative.pairs(d + 3.0), comparative.pairs(d))  # a common offset is free
    net = comparative.Remembering(torch.nn.Identity(), 7)
    with_memory, d, o = comparative.arms(net)["across batches"], d.float(), o.float()
    torch.testing.assert_close(with_memory(d), comparative.pairs(d))  # there is nothing to compare with yet
    assert torch.equal(net.residuals[:5], d) and not net.residuals[5:].any()
    torch.testing.assert_close(with_memory(o), (comparative.pairs(o) + comparative.across(o, d)) / 2)
    assert torch.equal(net.residuals[:9], torch.cat((o, d))) and net.kept == 9
    with_memory(torch.ones(comparative.KEPT, 7))
    assert net.residuals.eq(1).all() and net.kept == comparative.KEPT


def test_the_laplace_predictive_and_the_mixture(lab):
    """Logits shrink, the less the stronger the prior; and the mean of probabilities."""
    torch.testing.assert_close(bayesian_teacher.mixture(torch.stack((S, T))).exp(), (S.softmax(-1) + T.softmax(-1)) / 2)
    data, teacher = lab.data(), lab.teacher()
    f = torch.cat([teacher(x) for x in data.train[0].split(1000)])
    shrunk = bayesian_teacher.laplace(teacher, data)
    factor = shrunk / f
    assert (factor > 0).all() and (factor < 1).all()
    sure = bayesian_teacher.laplace(teacher, data, prior=1e9)
    torch.testing.assert_close(sure, f, rtol=1e-2, atol=1e-3)


def test_the_posterior_of_the_last_layer_is_that_of_its_whole_matrix():
    """Where rows agree on the probabilities the Kronecker form is all of it; its prior has the largest evidence."""
    x, weights = torch.randn(30, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    f = torch.randn(5, dtype=torch.float64).expand(30, 5)
    p = f[0].softmax(-1)
    matrix = torch.kron(x.T @ x, torch.diag(p) - p.outer(p))
    found, at = bayesian_teacher.LastLayer(x, f, weights), x[:3]
    jacobian = torch.stack([torch.kron(row, torch.eye(5, dtype=torch.float64)) for row in at])
    inverse = torch.linalg.inv(matrix + found.prior * torch.eye(20))
    want = (jacobian @ inverse @ jacobian.mT).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(found.variance(at), want)

    def evidence(delta):
        size = delta * weights.square().sum() - 20 * torch.tensor(delta).log()
        return -(size + torch.logdet(matrix + delta * torch.eye(20))) / 2

    assert evidence(found.prior) > max(evidence(found.prior * 1.1), evidence(found.prior / 1.1))
