"""The recipes of language models: who writes what, which rows are compared, schedules that go on where they stopped."""

import itertools
import json
import math
import shutil

import numpy
import pytest
import torch
import torch.nn.functional as F

from kdkernels.cli import main
from kdkernels.trainer import models, recipes, report, reproduce, textlab
from kdkernels.trainer.checkpoint import save_tensors
from kdkernels.trainer.config import Config
from kdkernels.trainer.lab import Update, frozen
from kdkernels.trainer.recipes import (
    akl,
    atsc,
    atsc_lm,
    distillm,
    divergences,
    dkd,
    on_policy,
    simkd,
    simkd_lm,
    skd,
    supervised,
    taid,
)
from kdkernels.trainer.sampling import AS_IS, Judge, Taste, draw, nucleus, respond

NAMES = [name for name in recipes.names() if hasattr(recipes.load(name), "LAB")]
S, T = (3 * torch.randn(6, 100, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in range(2))
Y = torch.randint(100, (6,), generator=torch.Generator().manual_seed(2))
P, Q = T.softmax(-1), S.softmax(-1)


@pytest.fixture
def lab(tmp_path, monkeypatch, texts):
    small = dict(PROMPT=5, RESPONSE=7, TEACHER=dict(hidden=32, ffn=32, heads=2, layers=2),
                 STUDENT=dict(hidden=16, ffn=16, heads=2, layers=1))  # fmt: skip
    for name, value in small.items():
        monkeypatch.setattr(textlab, name, value)
    lab = textlab.TextLab(tmp_path / "run", tmp_path / "cache", 1, report.silent, share=0.05)
    lab._data["text"] = textlab.Text(texts[0], texts[1:], vocab=300, few=40, held=8)
    return lab


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """The folder of what is cached, and texts of words that come as often as words do."""
    folder, rng = tmp_path_factory.mktemp("texts"), numpy.random.default_rng(0)
    words = ["".join(rng.choice([*"abcdefgh"], 2 + i % 4)) for i in range(200)]
    for i in range(30):
        (folder / f"{i}.txt").write_text(" ".join(words[k] for k in rng.zipf(1.5, 200) % 200))
    return folder / "cache", *map(str, folder.glob("*.txt"))


@pytest.fixture(scope="module")
def pair():
    """A student and a teacher that are sure of something, in float64."""
    nets = []
    for seed in range(2):
        net = models.build(Config(hidden=16, ffn=16, heads=2, seq_len=20, seed=seed), 40, 2).double()
        for p in net.parameters():
            p.data.mul_(20 if p.ndim > 1 else 1)
        net.lm_head.weight = torch.nn.Parameter(0.7 * torch.randn(40, 16, dtype=torch.float64))
        nets.append(frozen(net))
    return nets


def algorithm_1(student, prompt, u, taste, judge):
    """Xu et al.'s, a row and a token at a time, all of the text read again for each; and how often the teacher drew."""
    text, mended = prompt.tolist(), 0
    for own, other in u.tolist():
        token = drawn(student(input_ids=torch.tensor([text])).logits[0, -1], own, taste)
        if judge:
            logits = judge.teacher(input_ids=torch.tensor([text])).logits[0, -1]
            if token not in logits.topk(judge.top_k).indices:
                token, mended = drawn(logits, other, judge.taste), mended + 1
        text.append(token)
    return text, mended


def drawn(logits, u, taste):
    p = (logits / taste.temperature).softmax(-1).tolist()
    order = sorted(range(len(p)), key=lambda i: -p[i])
    sums = itertools.accumulate((p[i] for i in order), initial=0.0)
    nucleus = sorted(i for i, before in zip(order, sums, strict=False) if before < taste.top_p)
    sums = list(itertools.accumulate(p[i] for i in nucleus))
    return next(i for i, reached in zip(nucleus, sums, strict=True) if reached > u * sums[-1])


@pytest.mark.parametrize("top_k", [1, 4, 40, None])
def test_drafts_and_caches_change_nothing(pair, top_k):
    """The text of drawing and judging token by token, without a cache, whatever the length of the drafts."""
    student, teacher = pair
    prompts, u = torch.randint(40, (6, 5)), torch.rand(6, 13, 2, dtype=torch.float64)
    own, other = Taste(0.8, 0.9), Taste(0.5, 0.7)
    judge = Judge(teacher, top_k, other) if top_k else None
    rows = [algorithm_1(student, prompt, of, own, judge) for prompt, of in zip(prompts, u, strict=True)]
    for draft in (1, 3, 5) if judge else (0,):
        found = respond(student, prompts, u, own, judge and judge._replace(draft=draft))
        assert found.tolist() == [text for text, _ in rows]
    mended = sum(count for _, count in rows)
    assert (mended == 0) if top_k in (40, None) else (5 < mended < 6 * 13)


def test_both_models_keep_what_they_have_read(pair):
    """The prompt once, then the student a token at a time and the teacher the drafts of a round, never all of the text;
    where all drafts are taken the teacher adds none."""
    asked = [[], []]

    def spy(net, seen):
        return lambda **given: seen.append(given["input_ids"].shape[1]) or net(**given)

    student, teacher = map(spy, pair, asked)
    u = torch.rand(6, 12, 2, dtype=torch.float64)
    respond(student, torch.randint(40, (6, 5)), u, AS_IS, Judge(teacher, 40, draft=3))
    assert asked == [[4] + 12 * [1], [4] + 4 * [3]]


def test_a_judge_of_one_is_the_teacher_and_one_of_all_the_student(pair):
    student, teacher = pair
    prompts, u = torch.randint(40, (4, 5)), torch.rand(4, 9, 2, dtype=torch.float64)
    greedy = respond(teacher, prompts, u, Taste(1e-3))
    assert torch.equal(respond(student, prompts, u, AS_IS, Judge(teacher, 1, Taste(1e-3))), greedy)
    alone = respond(student, prompts, u, AS_IS)
    assert torch.equal(respond(student, prompts, u, AS_IS, Judge(teacher, 40)), alone)
    assert not torch.equal(alone, greedy) and torch.equal(alone[:, :5], prompts)


def test_tokens_are_drawn_with_their_probabilities():
    u, logits = torch.arange(0.5, 10000) / 10000, torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    shares = lambda taste: draw(logits.expand(10000, 4), u, taste).bincount(minlength=4) / 10000  # noqa: E731
    torch.testing.assert_close(shares(AS_IS), logits.exp(), rtol=0, atol=2e-4)
    torch.testing.assert_close(shares(Taste(0.5)), (2 * logits).softmax(-1), rtol=0, atol=2e-4)
    torch.testing.assert_close(shares(Taste(1.0, 0.5)), torch.tensor([0, 4, 0, 3]) / 7, rtol=0, atol=2e-4)
    p = logits.exp()
    torch.testing.assert_close(nucleus(p[None], 0.5, guess=1)[0], torch.tensor([0.0, 0.4, 0.0, 0.3]))
    assert draw(logits[None], torch.tensor([1.0]), Taste(1.0, 0.5)) == 3  # as a u next to 1 may round


def test_the_rows_compared_are_those_that_foretell_the_response(lab):
    """The first token of the response is one of them, what follows the last is none, nothing behind an end counts."""
    net, tokens = lab.student(), lab.data().few[torch.arange(4)]
    tokens[0, 7] = lab.data().end
    wanted = []
    for row, text in enumerate(tokens):
        for place in range(5, 12 if row else 8):
            log_q = net(input_ids=text[None, :place]).logits[0, -1].log_softmax(-1)
            wanted.append(-log_q[text[place]].item())
    assert lab.cross_entropy(net, tokens) == pytest.approx(sum(wanted) / len(wanted), rel=1e-5)


def test_the_student_is_compared_with_the_teacher_on_the_same_text(lab):
    given, texts = [], [lab.data().held[:4], lab.data().held[4:]]

    def loss(*rows):
        given.append([x.detach().clone() for x in rows])
        return (rows[0] - rows[1]).square().mean()

    net = lab.student()
    lab.distil("net", loss, lambda student, batch: texts[batch.step % 2], net=net)
    s, t, labels = given[0]
    for found, model in ((s, lab.student()), (t, lab.teacher())):
        torch.testing.assert_close(found, model(input_ids=texts[0]).logits[:, 4:11].flatten(0, 1))
    assert torch.equal(labels.view(4, 7)[texts[0][:, 5:] != lab.data().end][:3], texts[0][0, 5:8])
    torch.testing.assert_close(given[1][1], lab.teacher()(input_ids=texts[1]).logits[:, 4:11].flatten(0, 1))
    assert not torch.equal(net.model.norm.weight, lab.student().model.norm.weight)


def test_speculative_distillation_reads_what_the_teacher_has_mended(lab, monkeypatch):
    """Algorithm 1 of the step's own random numbers, and of the student as it is at that step."""
    net, batch = lab.student().double(), lab.batch(lab.data().few, 3, 8)
    teacher = lab.teacher().double()
    monkeypatch.setattr(lab, "teacher", lambda: teacher)
    weights = torch.randn(lab.data().vocab, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    net.lm_head.weight = torch.nn.Parameter(net.lm_head.weight.detach() + 0.2 * weights)  # of another mind
    u = torch.rand(8, 7, 2, generator=lab.noise(3))
    judge = skd.judge(lab.teacher())
    assert judge.top_k == 25 and judge.taste == (0.2, 0.5) and skd.STUDENT == (0.5, 0.5)
    rows = [algorithm_1(net, x[:5], of, skd.STUDENT, judge) for x, of in zip(batch.inputs, u, strict=True)]
    assert skd.interleaved(lab)(net, batch).tolist() == [text for text, _ in rows]
    assert 0 < sum(mended for _, mended in rows) < 8 * 7


def test_the_mixture_of_own_and_fixed_text(lab):
    net = lab.student()

    def own(share, step):
        batch = lab.batch(lab.data().few, step, 4)
        found = on_policy.mixture(lab, share)(net, batch)
        assert torch.equal(found[:, :5], batch.inputs[:, :5])
        return not torch.equal(found, batch.inputs)

    assert all(own(1.0, step) for step in range(5)) and not any(own(0.0, step) for step in range(5))
    assert 10 < sum(own(0.5, step) for step in range(40)) < 30
    batch = lambda: lab.batch(lab.data().few, 1, 4)  # noqa: E731
    before = on_policy.mixture(lab, 1.0)(net, batch())
    assert torch.equal(before, on_policy.mixture(lab, 1.0)(net, batch()))
    with torch.no_grad():
        net.get_input_embeddings().weight.mul_(8)
    assert not torch.equal(before, on_policy.mixture(lab, 1.0)(net, batch()))


def test_losses_are_those_they_are_named_after():
    kl = lambda a, b: (a * (a / b).log()).sum(-1)  # noqa: E731
    m, rows = (P + Q) / 2, torch.arange(6)
    torch.testing.assert_close(divergences.LOSSES["reverse KL"](S, T, Y), kl(Q, P).mean())
    torch.testing.assert_close(divergences.LOSSES["JSD"](S, T, Y), (kl(P, m) + kl(Q, m)).mean() / 2)
    p, q = P[rows, Y], Q[rows, Y]
    target = kl(torch.stack((p, 1 - p), 1), torch.stack((q, 1 - q), 1))
    others = [x.scatter(1, Y[:, None], 0.0) for x in (P, Q)]
    a, b = (x / x.sum(1, keepdim=True) for x in others)
    a, b = (x[x > 0].view(6, 99) for x in (a, b))
    torch.testing.assert_close(dkd.LOSS(S, T, Y), (target + 0.5 * kl(a, b)).mean())
    order = P.argsort(descending=True)
    head = torch.zeros_like(P).scatter(1, order, (P.gather(1, order).cumsum(1) <= 0.5).double())
    head.scatter_(1, order[:, :1], 1.0)
    gap = (P - Q).abs()
    w = (gap * head).sum(1) / gap.sum(1)
    torch.testing.assert_close(akl.LOSS(S, T, Y), (w * kl(P, Q) + (1 - w) * kl(Q, P)).mean())
    skewed = 0.9 * P + 0.1 * Q
    torch.testing.assert_close(distillm.LOSS(S, T, Y), kl(Q, skewed).mean())


def test_taid_moves_its_target(lab):
    """As the paper's code does: beside the line where the student learns, never behind it."""
    loss, tau, m, before = taid.Moving(20), 0.4, 0.0, None
    for step in range(20):
        s = S - 0.1 * step * (S - T)
        log_u = ((1 - tau) * s + tau * T).log_softmax(-1)
        cross = -(log_u.exp() * s.log_softmax(-1)).sum(-1).mean()
        torch.testing.assert_close(loss(s, T, Y), cross + (log_u.exp() * log_u).sum(-1).mean())
        if before is not None:
            m = 0.99 * m + 0.01 * (before - cross) / before
            tau = float(max(0.4 + 0.6 * step / 20, tau + 5e-4 * torch.sigmoid(m) * (1 - tau)))
        before = cross
        torch.testing.assert_close(loss.state, torch.tensor([step + 1, tau, m, before], dtype=torch.float64))
    assert tau >= 0.97
    slow = taid.Moving(10**9)  # the line stands still: what is left is the student's own pace
    for step in range(50):
        slow(S - 0.1 * step * (S - T), T, Y)
    assert 0.4 + 49 * 5e-4 * 0.5 * 0.55 < slow.state[1] < 0.45


def test_distillm_takes_its_own_text_when_the_fixed_does_not_help(lab, monkeypatch):
    monkeypatch.setattr(distillm, "CAPACITY", 8)
    net, few = lab.student(), lab.data().few
    schedule = distillm.Adaptive(lab, 1000)
    assert all(torch.equal(schedule(net, batch), batch.inputs) for batch in (lab.batch(few, k, 4) for k in range(1, 6)))
    for value, phi in ((5.0, 0.0), (4.0, 0.0), (5.2, 0.1), (5.1, 0.1), (5.4, 0.2)):
        schedule.look(value)
        assert schedule.phi == pytest.approx(phi)
    schedule.phi.fill_(1.0)
    written = [schedule(net, lab.batch(few, step, 4)) for step in (1, 2)]
    assert not torch.equal(written[0], lab.batch(few, 1, 4).inputs) and schedule.count == 8
    assert torch.equal(schedule.store, torch.cat(written))
    late = schedule(net, lab.batch(few, 999, 4))  # phi (1 - step / total) is small there, and the store is full
    assert schedule.count == 8 and all(row in schedule.store.tolist() for row in late.tolist())
    fresh = schedule(net, lab.batch(few, 3, 4))
    assert schedule.count == 12 and torch.equal(schedule.store[:4], fresh)
    asked = []
    monkeypatch.setattr(lab, "cross_entropy", lambda net, tokens: asked.append(tokens) or 0.0)
    for step in range(21):
        schedule(net, lab.batch(few, step, 4))
    assert len(asked) == 3 and asked[0] is lab.data().watched


def test_a_run_with_a_schedule_goes_on_where_it_was_stopped(lab, tmp_path, monkeypatch):
    """Bit by bit, with AdamW's moments, the share of own text and the store of it."""
    for name, value in dict(EVERY=1, CAPACITY=32, MORE=-math.inf, RISE=1.0).items():  # text of the store from step 3
        monkeypatch.setattr(distillm, name, value)
    start = lab.student().state_dict()

    def train(where, stop=None):
        lab.folder = tmp_path / where
        net = lab.student()
        net.load_state_dict(start)
        net.schedule = distillm.Adaptive(lab, 1)

        def loss(s, t, labels):
            steps.append(None)
            if len(steps) == stop:
                raise KeyboardInterrupt
            return distillm.LOSS(s, t, labels)

        steps = []
        lab.distil("net", loss, net.schedule, net=net, steps=12 / lab.share)
        return net.state_dict(), lab.curves["net"], len(steps)

    monkeypatch.setattr(lab, "train", lambda *given, train=lab.train, **options: train(*given, every=5, **options))
    whole = train("whole")
    assert whole[0]["schedule.count"] == 32 and whole[0]["schedule.phi"] == 1
    with pytest.raises(KeyboardInterrupt):
        train("stopped", stop=8)
    resumed = train("stopped")
    assert whole[2] == 12 and resumed[2] == 7
    assert all(torch.equal(a, b) for a, b in zip(whole[0].values(), resumed[0].values(), strict=True))
    assert (tmp_path / "whole/net.safetensors").read_bytes() == (tmp_path / "stopped/net.safetensors").read_bytes()


def test_heads_that_are_shared(lab):
    """The LM head of the teacher serves the student, whose embedding is not tied to it; ATSC moves it."""
    pretrained = frozen(simkd_lm.Halves(lab.teacher()))
    frozen_net, moving = (simkd_lm.reusing(lab, teacher) for teacher in
                          (pretrained, simkd_lm.Halves(lab.teacher()).requires_grad_(True)))  # fmt: skip
    head = pretrained.head.weight.clone()
    tokens = lab.data().held
    hidden = lab.teacher().model(input_ids=tokens).last_hidden_state
    torch.testing.assert_close(pretrained.classify(hidden), lab.teacher()(input_ids=tokens).logits)
    own = frozen_net.own()
    assert len(own) == len(list(frozen_net.student.body.parameters())) + 4
    assert not {id(p) for p in own} & {id(p) for p in pretrained.parameters()}
    move, share = atsc.updates(moving, pretrained, textlab.LR)
    assert len(share.parameters) == 1 and share.parameters[0] is moving.teacher.head.weight
    lab.train("atsc", moving, [move, share])
    assert torch.equal(pretrained.head.weight, head) and not torch.equal(moving.teacher.head.weight, head)
    assert not torch.equal(moving.teacher.body.layers[0].mlp.up_proj.weight,
                           pretrained.body.layers[0].mlp.up_proj.weight)  # fmt: skip
    written = simkd_lm.writer(lab.student(), moving)(input_ids=tokens).logits
    torch.testing.assert_close(textlab.responses(written), moving(tokens))
    torch.testing.assert_close(moving(tokens), F.linear(moving.features(tokens), moving.teacher.head.weight))


def test_the_loss_of_simkd_is_the_squared_error_of_the_hidden_states(lab, monkeypatch):
    found, train = {}, lab.train
    monkeypatch.setattr(lab, "train", lambda name, net, updates, **options:
                        found.update({name: (net, updates)}) or train(name, net, updates, **options))  # fmt: skip
    simkd_lm.run(lab)
    net, [update] = found["simkd"]
    batch = lab.batch(lab.data().few, 0, 8)
    hidden = lambda model: model(input_ids=batch.inputs).last_hidden_state[:, 4:11].flatten(0, 1)  # noqa: E731
    error = (net.projector(hidden(net.student.body)) - hidden(lab.teacher().model)).square().mean()
    torch.testing.assert_close(update.loss(batch), error)
    assert error > 0


def test_two_teachers_of_one_language_model(lab):
    """Both move, with a projector each, and one student, whose logits are the mean; both classifiers learn."""
    pretrained = [frozen(simkd_lm.Halves(lab.teacher(seed=seed))) for seed in (1000, 1001)]
    student = simkd_lm.Halves(lab.student())
    both = atsc.Several([simkd_lm.through(student, atsc_lm.movable(lab.teacher(seed=seed))) for seed in (1000, 1001)])
    first, *shares = atsc.together(both, pretrained, textlab.LR)
    tokens, batch = lab.data().held, lab.batch(lab.data().few, 0, 4)
    alone = sum(atsc.updates(net, one)[0].loss(batch) for net, one in zip(both.nets, pretrained, strict=True))
    torch.testing.assert_close(first.loss(batch), alone)
    for net in both.nets:  # each moves towards the student, whose error is all there is before it has moved
        weight = net.teacher.body.layers[0].mlp.up_proj.weight
        error = (net.features(batch.inputs).detach() - net.teacher.features(batch.inputs)).square().mean()
        [found], [wanted] = (torch.autograd.grad(of, [weight]) for of in (first.loss(batch), error))
        torch.testing.assert_close(found, wanted)
        assert found.norm() > 0
    assert len({id(p) for p in first.parameters}) == len(first.parameters)
    assert [len(share.parameters) for share in shares] == [1, 1]
    lab.train("two", both, [first, *shares])
    for net, one in zip(both.nets, pretrained, strict=True):
        assert net.student is student and not torch.equal(net.teacher.head.weight, one.head.weight)
        assert not torch.equal(net.teacher.body.layers[0].mlp.up_proj.weight, one.body.layers[0].mlp.up_proj.weight)
    want = (both.nets[0](tokens) + both.nets[1](tokens)) / 2
    torch.testing.assert_close(textlab.responses(atsc_lm.writer(lab.student(), both)(input_ids=tokens).logits), want)


def test_probe_of_language_models(lab, texts, monkeypatch, tmp_path, capsys):
    """On the held-out responses; of a student with the state of a schedule, and of one through the teacher's head."""
    text, pretrained = lab.data(), frozen(simkd_lm.Halves(lab.teacher()))
    net, reusing = lab.student(), simkd_lm.reusing(lab, pretrained)
    net.schedule = taid.Moving(5)
    nets = {"taid": lab.distil("taid", net.schedule, net=net)}
    lab.train("simkd", reusing, [Update(simkd.feature_loss(reusing, pretrained), reusing.own(), textlab.LR)])
    nets["simkd"] = simkd_lm.writer(lab.student(), reusing)
    student = simkd_lm.Halves(lab.student())
    both = atsc.Several([simkd_lm.through(student, atsc_lm.movable(lab.teacher())) for _ in range(2)])
    lab.train("atsc-two", both, atsc.together(both, [pretrained] * 2, textlab.LR))
    nets["atsc-two"] = atsc_lm.writer(lab.student(), both)
    [teacher] = lab.cache.glob("text-teacher-*")
    monkeypatch.setattr(textlab, "Text", lambda cache: text)
    probe = lambda *given: main(["probe", *map(str, given), "--tokens", "56", "--out", str(tmp_path / "p")])  # noqa: E731
    assert probe(lab.folder / "taid.safetensors", teacher) == 2
    assert "in the cache folder, with the text of both" in capsys.readouterr().err
    [shard] = texts[0].glob("text-*")
    shutil.copy(shard, lab.cache)
    for name, one in nets.items():
        assert probe(lab.folder / f"{name}.safetensors", teacher) == 0
        saved = json.loads((tmp_path / "p/probe.json").read_text())[name]
        assert saved["rows"] == (lab.labels(text.held) != -100).sum() and (tmp_path / f"p/{name}.png").exists()
        assert saved["student"]["cross_entropy"] == pytest.approx(lab.cross_entropy(one, text.held), rel=1e-5)
        assert saved["acceptance"] == pytest.approx(lab._acceptance(one, text.held) / 100, rel=1e-5)
    save_tensors(tmp_path / "image.safetensors", {"net/body.0.weight": torch.zeros(2)})
    assert probe(tmp_path / "image.safetensors", teacher) == 2 and "one is a language model" in capsys.readouterr().err
    (tmp_path / "of-recipe/seed-0").mkdir(parents=True)
    assert probe(tmp_path / "of-recipe") == 2 and "is of a recipe: give one of" in capsys.readouterr().err
    monkeypatch.setattr(textlab, "STUDENT", dict(hidden=24, ffn=16, heads=2, layers=1))
    assert probe(lab.folder / "taid.safetensors", teacher) == 2
    assert "not a language model as the recipes" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_runs_and_says_what_it_is(name, lab, monkeypatch):
    for setting, value in dict(EVERY=1, MORE=-math.inf, RISE=1.0).items():  # five steps are all there are
        monkeypatch.setattr(distillm, setting, value)
    recipe = recipes.load(name)
    assert f"kdkernels distill --recipe {name}\n" in recipe.__doc__
    figures = recipe.run(lab)
    assert all(arm in figures for pair in recipe.TREND for arm in pair) and recipes.claim(recipe).endswith(".")
    assert all(0 <= value <= 100 for value in figures.values())
    assert len({str(curve) for curve in lab.curves.values()}) == len(lab.curves)  # no arm does what another does
    files = {path: path.stat().st_mtime_ns for path in lab.folder.iterdir()}
    assert recipe.run(lab) == figures  # from what it has written
    assert files == {path: path.stat().st_mtime_ns for path in lab.folder.iterdir()}


def test_the_runner_knows_where_a_recipe_works(lab, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(supervised, "LAB", lambda *args, cfg: given.append(args) or lab)
    result = reproduce.run("supervised", tmp_path / "out", tmp_path / "cache", seeds=1)
    assert given[0][:3] == (tmp_path / "out/seed-0", tmp_path / "cache", 0)
    assert result["trend"][0]["holds"] == "one seed" and "supervised" in reproduce.table(result)
