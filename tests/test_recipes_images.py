"""What distinguishes the recipes of images, each held to its formula in torch's own functions."""

import copy

import pytest
import torch
import torch.nn.functional as F
from textbook import kl, logp, ltkd

import kdkernels as kd
from benchmarks.pages import bayes_teacher
from kdkernels.trainer import images, report
from kdkernels.trainer.lab import Batch, Lab, frozen
from kdkernels.trainer.recipes import bayesian_teacher, cmkd, dfpt, faithful, grouped, rdd
from kdkernels.trainer.recipes import ltkd as longtail

S, T = (3 * torch.randn(6, 100, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in range(2))
Y = torch.randint(100, (6,), generator=torch.Generator().manual_seed(2))
DATA = images.Pairs(train=300, test=100)
SMALL = (8, 16, 24)


@pytest.fixture
def lab(tmp_path):
    lab = Lab(tmp_path / "run", tmp_path / "cache", 0, report.silent, share=0.004)
    lab._data[()] = lab._data[("imbalance", longtail.IMBALANCE),] = DATA
    return lab


def batch(step=0, size=8) -> Batch:
    at = torch.arange(size)
    return Batch(step, at, *(x[at] for x in DATA.train), torch.Generator().manual_seed(step))


def net(seed, widths=SMALL):
    """With statistics of its normalisation that are not those it was made with."""
    torch.manual_seed(seed)
    made = images.ConvNet(widths)
    made.train()(torch.randn(50, 1, 12, 20))
    return frozen(made)


def test_cmkd_leans_on_ranks_where_the_teacher_is_unsure():
    sure, unsure = T[:1].clone(), 1e-3 * T[:1]
    sure[0, 5] = 100 * cmkd.T
    for t, (certain, ranks) in ((sure, (1, 0)), (unsure, (0, 1))):
        correlations = certain * kd.PearsonLoss()(S[:1], t) + ranks * kd.SpearmanLoss()(S[:1], t)
        want = F.cross_entropy(S[:1], Y[:1]) + cmkd.WEIGHT * correlations
        torch.testing.assert_close(cmkd.loss()(S[:1], t, Y[:1]), want, rtol=1e-4, atol=0)
    assert (kd.PearsonLoss()(S[:1], unsure) - kd.SpearmanLoss()(S[:1], unsure)).abs() > 1e-3


def test_ltkd_balances_groups_of_the_batch_and_has_a_rare_tail():
    tempered = longtail.T**2 * ltkd(S / longtail.T, T / longtail.T, longtail.GROUPS).mean()
    torch.testing.assert_close(longtail.loss()(S, T, Y), F.cross_entropy(S, Y) + tempered)
    biased = T.softmax(-1)
    biased[:, longtail.GROUPS == 0] *= 20.0  # of the first row alone: what rebalancing takes away
    first = slice(0, 1)
    torch.testing.assert_close(*(longtail.loss()(S[first], t[first], Y[first]) for t in (T, biased.log())))
    counts = images.Pairs(train=2000, test=100, imbalance=longtail.IMBALANCE).counts
    assert counts[longtail.TAIL].max() <= counts[longtail.GROUPS < 2].min() and len(longtail.TAIL) == 33


def test_ltkd_learns_from_long_tailed_pictures(lab, monkeypatch):
    seen = []
    monkeypatch.setattr(lab, "data", lambda **options: seen.append(options) or DATA)
    figures = longtail.run(lab)
    assert seen == [{"imbalance": longtail.IMBALANCE}] and "LTKD, tail" in figures


def test_grouped_kd_is_binary_and_primary_without_secondary():
    """The label, here the student's least likely class, is a primary one."""
    y, t, s = S.argmin(-1), T / grouped.T, S / grouped.T
    inside = torch.zeros_like(S).bool().scatter(1, S.argsort(descending=True)[:, : grouped.N], True)
    inside.scatter_(1, y[:, None], True)
    assert (inside.sum(-1) == grouped.N + 1).all()
    masses = [torch.stack([(x.softmax(-1) * part).sum(-1) for part in (inside, ~inside)], -1) for x in (s, t)]
    within = [kl(*(logp(x[i][part[i]]) for x in (t, s))) for part in (inside, ~inside) for i in range(6)]
    primary, secondary = torch.stack(within[:6]).mean(), torch.stack(within[6:]).mean()
    binary = kl(masses[1].log(), masses[0].log()).mean()
    want = grouped.T**2 * (grouped.BINARY * binary + grouped.PRIMARY * primary)
    torch.testing.assert_close(grouped.loss()(S, T, y), want)
    torch.testing.assert_close(grouped.loss(3.0)(S, T, y), want + grouped.T**2 * 3.0 * secondary)
    assert min(binary, secondary) > 1e-3


def test_grouped_kd_begins_with_the_labels_alone(lab, monkeypatch):
    given = {}
    monkeypatch.setattr(grouped.hinton, "run", lambda lab: {})
    monkeypatch.setattr(lab, "train", lambda name, net, updates, **_: given.update({name: (net, updates[0].loss)}))
    grouped.run(lab)
    student, loss = given["grouped"]
    told = lab.teacher()(batch().images)
    s, ce = student(batch().images), F.cross_entropy(student(batch().images), batch().labels)
    own = grouped.loss()(s, told, batch().labels)
    for share, step in ((0.0, 0), (0.25, 50), (1.0, 200), (1.0, 800)):
        lab.share = 1.0
        torch.testing.assert_close(loss(batch(step)), ce + share * own)


def test_the_prompt_path_begins_as_the_teacher_and_learns_beside_it(lab):
    teacher, x = net(0), DATA.test[0][:10]
    both = dfpt.Both(net(1).requires_grad_(True), dfpt.DualPath(teacher))
    torch.testing.assert_close(both.dual(x), teacher(x))
    before = {name: value.clone() for name, value in both.dual.state_dict().items()}
    lab.train("dfpt", both, dfpt.updates(both), steps=2000)
    for name, value in both.dual.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("teacher."), name
    with torch.no_grad():
        through = both.dual(x)
        for prompt in both.dual.prompts:
            prompt.up.weight.zero_(), prompt.up.bias.zero_()
        assert (through - both.dual(x)).abs().max() > 1e-3  # the prompts, not the second head alone


def test_the_student_is_told_by_the_prompt_path_and_the_prompts_by_teacher_and_student():
    both, here = dfpt.Both(net(1), dfpt.DualPath(net(0))), batch()
    prompt, learn = dfpt.updates(both)
    both.student.train()
    q, p = both.student(here.images), both.dual.teacher(here.images)
    with torch.no_grad():
        both.dual.second.bias[3] += 2.0
        own = both.dual(here.images)
        told = kd.KDLoss(temperature=dfpt.T, alpha=0.9)(q, own, here.labels)
        torch.testing.assert_close(learn.loss(here), told)
        two = [dfpt.T**2 * kl(logp(x / dfpt.T), logp(own / dfpt.T)).mean() for x in (p, q)]
    want = F.cross_entropy(own, here.labels) + dfpt.A * two[0] + dfpt.B * two[1]
    torch.testing.assert_close(prompt.loss(here), want)
    assert {id(v) for v in prompt.parameters} == {id(v) for v in both.dual.own()}
    assert {id(v) for v in learn.parameters} == {id(v) for v in both.student.parameters()}


def test_an_ensemble_is_told_as_the_mean_of_tempered_distributions():
    several = torch.stack((T, S.flip(0), T.roll(1, 0)))
    loss = kd.KDLoss(temperature=bayesian_teacher.T, alpha=1.0)
    mean = (several / bayesian_teacher.T).softmax(-1).mean(0)
    want = bayesian_teacher.T**2 * kl(mean.log(), logp(S / bayesian_teacher.T)).mean()
    torch.testing.assert_close(loss(S, bayesian_teacher.ensemble(several)), want)
    assert (loss(S, bayesian_teacher.mixture(several)) - want).abs() > 1e-2  # tempered after it was mixed


def segmenters():
    torch.manual_seed(0)
    nets = [rdd.SegNet((4, 6, 6)) for _ in range(2)]
    with torch.no_grad():
        nets[1].main.bias[0] += 4.0  # sure of the background
    return [one.eval() for one in nets]


def crossed(heads, labels):
    """Cross-entropy (N, H, W) of both heads."""
    main, auxiliary = (F.cross_entropy(s.movedim(-1, 1), labels, reduction="none") for s in heads)
    return main + rdd.AUXILIARY * auxiliary


def test_rdd_weighs_pixels_by_the_teachers_heads_and_then_takes_those_hard_for_one_net():
    student, teacher = segmenters()
    here = batch(step=4)
    with torch.no_grad():
        heads, told = student(here.images), teacher(here.images)
        every = rdd.KL * kl(logp(told[0]), logp(heads[0])).mean()
        weight = (-kl(logp(told[1]), logp(told[0]))).exp()
        first, second, plain = (rdd.loss(student, teacher, stage)(here) for stage in (5, 4, None))
        torch.testing.assert_close(first, (weight * crossed(heads, here.masks)).mean() + every)
        torch.testing.assert_close(plain, crossed(heads, here.masks).mean() + every)
        own = [x[0].softmax(-1).gather(-1, here.masks[..., None])[..., 0] for x in (heads, told)]
        limits = [max(rdd.SURE, x.flatten().sort().values[int(rdd.HARDEST * x.numel())]) for x in own]
        one = (own[0] <= limits[0]) != (own[1] <= limits[1])
        assert 0 < one.sum() < one.numel()
        torch.testing.assert_close(second, crossed(heads, here.masks)[one].mean() + every)


def test_rdd_finds_the_hardest_pixels_where_all_are_easy():
    labels = torch.zeros(10, 10, dtype=torch.int64)
    s = torch.zeros(10, 10, 3)
    s[..., 0] = torch.linspace(5.0, 9.0, 100).view(10, 10)
    assert rdd.hard(s, labels).flatten().tolist() == [True] * 3 + [False] * 97  # 2.4% of 100, rounded up


def test_overlap_is_that_of_the_confusion_matrix():
    class Known(torch.nn.Module):
        def forward(self, x):
            logits = F.one_hot(DATA.test[2] % 3, rdd.CLASSES).float()
            return logits, logits

    masks = DATA.test[2]
    share = []
    for c in range(rdd.CLASSES):
        a, b = masks == c, masks % 3 == c
        share.append(((a & b).sum() / (a | b).sum()).item())
    assert rdd.overlap(Known(), DATA) == pytest.approx(100 * sum(share) / len(share))


class Spy(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.asked = inner, []

    def forward(self, x):
        self.asked.append(x.detach())
        return self.inner(x)


@pytest.mark.parametrize("held", [False, True])
def test_both_nets_are_at_the_adversarial_point(held):
    student, teacher, here = Spy(net(1)), Spy(net(0)), batch()
    student.train = lambda mode=True: student  # the same statistics everywhere
    value = faithful.loss(student, teacher, held=held)(here)
    (clean, at), told = student.asked[-2:], teacher.asked[-1]
    assert torch.equal(clean, here.images)
    assert 0 < (at - here.images).abs().max() <= faithful.RADIUS + 1e-6
    assert torch.equal(told, here.images if held else at)
    q, p = student.inner(at), teacher.inner(told)
    want = (1 - faithful.ALPHA) * F.cross_entropy(student.inner(clean), here.labels)
    torch.testing.assert_close(value, want + faithful.ALPHA * kl(logp(p), logp(q)).mean())
    told = teacher.inner(here.images)
    assert (kl(logp(p), logp(q)) > kl(logp(told), logp(student.inner(clean)))).all()
    plain = faithful.loss(student, teacher, radius=0.0)(here)
    assert torch.equal(student.asked[-1], here.images) and value > plain


def test_the_certificate_is_exact_for_two_classes_of_a_linear_net():
    linear = net(3)  # of one channel: intervals of several forget what these have in common
    linear.body = torch.nn.Sequential(torch.nn.BatchNorm2d(1), torch.nn.Conv2d(1, 1, 1)).eval()
    linear.body[0].running_var[:], linear.body[0].weight.data[:] = 0.3, -2.0
    linear.head = torch.nn.Linear(20, 2)
    x, y = DATA.test[0][:10], torch.arange(10) % 2
    (slope,) = torch.autograd.grad(linear(x.requires_grad_()).gather(1, y[:, None]).sum() * 2 - linear(x).sum(), x)
    for bound, sign in zip(faithful.bounds(linear, x, y, 0.05)[:2], (-1, 1), strict=True):
        worst = linear(x + sign * 0.05 * slope.sign()).log_softmax(-1).gather(1, y[:, None])[:, 0]
        torch.testing.assert_close(bound, worst, rtol=1e-4, atol=1e-5)
    low, _, certain = faithful.bounds(linear, x, y, 0.05)
    assert torch.equal(certain, low.exp() > 0.5) and 0 < certain.sum() < 10


def test_the_certificate_bounds_what_ascent_finds():
    student, teacher, (x, y, _) = net(1), net(0), (v[:20] for v in DATA.test)
    measure = faithful.gap(student, teacher, y)
    at_it = measure(x)
    torch.testing.assert_close(faithful.certificate(student, teacher, x, y, 0.0)[0], at_it, rtol=1e-3, atol=1e-5)
    for radius in (0.001, 0.01):
        most, _ = faithful.certificate(student, teacher, x, y, radius)
        apart, widest = faithful.found(student, teacher, x, y, radius, torch.Generator().manual_seed(0))
        assert (at_it <= widest + 1e-7).all() and (widest <= most + 1e-6).all() and (most < 1).all()
        assert (widest > at_it + 1e-6).any() and apart.any()
        for net_ in (student, teacher):
            low, high = (v.exp() for v in faithful.bounds(net_, x, y, radius)[:2])
            for _ in range(5):
                near = x + radius * torch.randn(x.shape).sign()
                own = net_(near).softmax(-1).gather(1, y[:, None])[:, 0]
                assert (low <= own + 1e-6).all() and (own <= high + 1e-6).all()


def test_nets_that_are_certified_to_agree_do():
    """Where both are certain of an answer, taken for the label, ascent finds no other in the ball."""
    student, (x, _, _) = net(1), (v[:40] for v in DATA.test)
    with torch.no_grad():
        student.head.weight.mul_(0.1), student.head.bias.zero_()
        student.head.bias[7] = 2.5
        other = copy.deepcopy(student)
        other.head.weight.mul_(1000.0)
        y = torch.full((40,), 7)
    _, certain = faithful.certificate(student, other, x, y, 2e-4)
    apart, _ = faithful.found(student, other, x, y, 2e-4, torch.Generator().manual_seed(0))
    assert 0 < certain.sum() < 40 and apart.any() and not (apart & certain).any()
    each = [faithful.bounds(one, x, y, 2e-4)[2] for one in (student, other)]
    assert torch.equal(certain, each[0] & each[1]) and not torch.equal(certain, each[0])


def test_the_posterior_of_the_mixture_is_that_of_its_densities():
    mixture = bayes_teacher.Mixture()
    x, _ = mixture.draw(30)
    each = torch.distributions.MultivariateNormal(mixture.means[:, None], torch.eye(mixture.means.shape[1]))
    torch.testing.assert_close(mixture.logits(x).softmax(-1), each.log_prob(x).T.softmax(-1))
    runs = [{"loss": name, "n": 5, "seed": 0, "distance": d, "teacher": -d, "student": d**2}
            for name, d in (("cross-entropy", 2.0), ("squared error", 1.0))]  # fmt: skip
    found = bayes_teacher.summary(runs)
    assert found["rank correlation with the student's error"] == pytest.approx({"distance": 1.0, "teacher": -1.0})
    assert found["of which squared error has the smaller"] == {"distance": 1, "student": 1}
