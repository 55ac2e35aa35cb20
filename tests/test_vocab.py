"""Vocabularies that are padded, and vocabularies that share some of their classes."""

import pytest
import torch
from accuracy import F32, F64, Batch, batch
from test_sparse import MERGED, TEACHER, by_textbook, near, run, temperatures, without_entropy
from textbook import cross_entropy, logp
from textbook_ranks import CASES as RANK_CASES

import kdkernels as kd
from kdkernels import SharedVocab, SparseTeacher

# The student's 12 classes in the teacher's 15; three of the student's have no counterpart, six of the teacher's.
MAP = torch.tensor([4, 0, -1, 7, 9, 2, -1, 14, 3, -1, 11, 6])
SHARED, OTHERS = (MAP >= 0).nonzero()[:, 0], (MAP < 0).nonzero()[:, 0]
LEFT = torch.tensor(sorted(set(range(15)) - set(MAP.tolist())))
on_both = pytest.mark.parametrize("backend", ["reference", "cpu"])


def pair(n=20) -> Batch:
    s, t = batch(n, 12, scale=2.0), batch(n, 15, scale=2.0, seed=1)
    return Batch(s.s, t.s, s.y)


def outcomes(log_p, shared, others, tail):
    rest = log_p[:, others].logsumexp(-1, keepdim=True)
    return torch.cat((log_p[:, shared], rest), -1) if tail == "bucket" else log_p[:, shared]


def rows(case, x, tail):
    own, other = temperatures(case)
    q, p = outcomes(logp(x.s / own), SHARED, OTHERS, tail), outcomes(logp(x.t / other), MAP[SHARED], LEFT, tail)
    at = torch.tensor([SHARED.tolist().index(y) if y in SHARED else len(SHARED) for y in x.y])
    value = without_entropy(case).rows(own * q, other * p, at)
    if ce := case.setting("ce_weight", 0.0):
        value = value + ce * cross_entropy(x.s, x.y, case.setting("label_smoothing", 0.0), case.setting("z_loss", 0.0))
    return value


@on_both
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("case", MERGED, ids=str)
def test_a_shared_subset_is_the_textbook_of_merged_distributions(case, tail, backend):
    x = pair()
    x = x if tail == "bucket" else x._replace(y=SHARED[x.y % len(SHARED)])
    loss, shared = getattr(kd, case.name)(**case.options, reduction="none"), SharedVocab(MAP, 15, tail=tail)
    found = []
    for textbook in (False, True):
        s, t = x.s.clone().requires_grad_(), x.t.clone().requires_grad_()
        with kd.use_backend(backend):
            value = rows(case, Batch(s, t, x.y), tail) if textbook else loss(s, shared(t), x.y)
        found.append((value.detach(), *torch.autograd.grad(value.sum(), (s, t), materialize_grads=True)))
    for got, want, name in zip(*found, ("value", "ds", "dt"), strict=True):
        near(got, want, name)


@pytest.mark.parametrize("case", [c for c in RANK_CASES if c.name != "KendallLoss"], ids=str)
def test_rank_losses_look_at_the_shared_classes(case):
    x = pair()
    loss = getattr(kd, case.name)(**case.options, reduction="none")
    got = loss(x.s, SharedVocab(MAP, 15, tail="renormalise")(x.t), x.y)
    near(got, loss(x.s[:, SHARED], x.t[:, MAP[SHARED]], x.y % 9))
    with pytest.raises(ValueError, match=f"{case.name} compares classes one by one"):
        loss(x.s, SharedVocab(MAP, 15)(x.t), x.y)


def test_a_permutation_is_the_loss_itself():
    x, order = batch(8, 30), torch.randperm(30, generator=torch.Generator().manual_seed(0))
    moved = x.t.clone()
    moved[:, order] = x.t
    for case in MERGED:
        loss = getattr(kd, case.name)(**case.options, reduction="none")
        near(loss(x.s, SharedVocab(order, 30)(moved), x.y), loss(x.s, x.t, x.y), str(case))


@pytest.mark.parametrize("junk", [30.0, torch.inf, torch.nan, -torch.inf])
def test_padding_is_no_class_on_either_side(junk):
    x = pair()
    wide = Batch(*(torch.cat((z, torch.full((20, n), junk, dtype=F64)), -1) for z, n in ((x.s, 4), (x.t, 7))), x.y)
    for case in MERGED:
        loss, shared = getattr(kd, case.name)(**case.options), SharedVocab(MAP, 15)
        s = wide.s.clone().requires_grad_()
        value = loss(s, shared(wide.t), x.y)
        (gradient,) = torch.autograd.grad(value, s)
        near(value, loss(x.s, shared(x.t), x.y), str(case))
        assert not gradient[:, 12:].any() and gradient.isfinite().all()


def test_more_classes_of_the_student_than_the_map_knows():
    x = pair()
    extra = torch.cat((x.s, torch.full((20, 2), 1.5, dtype=F64)), -1)
    longer = torch.cat((MAP, torch.tensor([-1, -1])))
    loss = kd.ForwardKLLoss()
    near(loss(extra, SharedVocab(MAP, 15)(x.t), vocab_size=14), loss(extra, SharedVocab(longer, 15)(x.t)))


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_a_sparse_teacher_in_its_own_vocabulary(tail):
    """Its classes that the student lacks go to the tail: the loss of the merged distributions, by hand."""
    x = pair()
    sparse = SparseTeacher.from_logits(x.t, 5, 2.0, tail=tail)
    loss, s = kd.ForwardKLLoss(temperature=2.0, reduction="none"), x.s.clone().requires_grad_()
    value = loss(s, SharedVocab(MAP, 15)(sparse))
    (gradient,) = torch.autograd.grad(value.sum(), s)
    p, want = (x.t / 2).softmax(-1), []
    for row in range(20):
        known = [c for c in range(12) if MAP[c] in sparse.indices[row]]
        rest = [c for c in range(12) if c not in known]
        a, b = p[row, MAP[known]], (s[row] / 2).softmax(-1)[known]
        if tail == "bucket":
            a, b = torch.cat((a, 1 - a.sum()[None])), torch.cat((b, (s[row] / 2).softmax(-1)[rest].sum()[None]))
        a, b = a / a.sum(), b / b.sum()
        want.append((a * (a / b).log()).sum() if len(known) else s[row].sum() * 0)
    good = torch.tensor([bool(((MAP[:, None] == i[None]).any()).item()) for i in sparse.indices])
    near(value[good], torch.stack(want)[good].detach())
    near(gradient[good], torch.autograd.grad(torch.stack(want).sum(), s)[0][good])


def test_of_tokens():
    student, teacher = {"a": 0, "b": 2, "c": 1}, {"c": 0, "x": 1, "a": 3}
    shared = SharedVocab.of_tokens(student, teacher)
    assert shared.student.tolist() == [0, 1] and shared.teacher.tolist() == [3, 0]
    assert (shared.student_vocab, shared.teacher_vocab) == (3, 4)


# --- padded vocabularies: 151936 classes in logits 152064 wide, smaller


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("junk", [40.0, torch.nan])
def test_padded_logits_of_two_widths(junk, backend):
    """Padding has probability 0 on both sides, whatever it holds, and no gradient."""
    dtype = F32 if backend == "triton" else F64
    x = batch(6, 36, scale=2.0, s_dtype=dtype)
    wide = [torch.cat((z, torch.full((6, n), junk, dtype=dtype)), -1) for z, n in ((x.s, 2), (x.t, 4))]
    among = TEACHER[:1] if backend == "triton" else [*TEACHER, *RANK_CASES]
    for case in among:
        loss = getattr(kd, case.name)(**case.options)
        s, t = wide[0].clone().requires_grad_(), wide[1]
        plain = x.s.clone().requires_grad_()
        with kd.use_backend(backend):
            value, want = loss(s, t, x.y, vocab_size=36), loss(plain, x.t, x.y)
        assert (value - want).abs() <= 8 * torch.finfo(dtype).eps * max(1, want.abs()), case
        gradient, by_want = torch.autograd.grad(value, s)[0], torch.autograd.grad(want, plain)[0]
        assert not gradient[:, 36:].any()
        torch.testing.assert_close(gradient[:, :36], by_want, rtol=1e-5, atol=8 * torch.finfo(dtype).eps)


def test_padded_logits_with_a_sparse_teacher():
    x = batch(20, 36, scale=2.0)
    wide = torch.cat((x.s, torch.full((20, 2), 40.0, dtype=F64)), -1)
    teacher = torch.cat((x.t, torch.full((20, 4), 40.0, dtype=F64)), -1)
    for case in MERGED:
        sparse = SparseTeacher.from_logits(teacher, 6, temperatures(case)[1], vocab_size=36)
        value, gradient = run(case, wide, sparse, x.y, vocab_size=36)
        want, by_want = by_textbook(case, x, sparse.indices, "bucket")
        near(value, want)
        near(gradient[:, :36], by_want)
        assert not gradient[:, 36:].any()


X = pair()


@pytest.mark.parametrize(
    ("error", "message", "make_it"),
    [
        (TypeError, "must be a tensor of integers, got torch.float32", lambda: SharedVocab(MAP.float(), 15)),
        (TypeError, "must be a tensor of integers, got list", lambda: SharedVocab([0, 1], 15)),
        (ValueError, r"must have shape \(V_s,\), got \(1, 12\)", lambda: SharedVocab(MAP[None], 15)),
        (ValueError, r"classes in \[0, 14\), or -1 for none, got -1 to 14", lambda: SharedVocab(MAP, 14)),
        (ValueError, r"or -1 for none, got -3 to 12", lambda: SharedVocab(MAP - 2, 15)),
        (ValueError, r"got -1 to -1", lambda: SharedVocab(MAP * 0 - 1, 15)),
        (ValueError, "a class of the teacher's once, got 0 12 times", lambda: SharedVocab(MAP * 0, 15)),
        (TypeError, "teacher_vocab must be an int, got 15.0", lambda: SharedVocab(MAP, 15.0)),
        (ValueError, "one of bucket, renormalise, got 'spread'", lambda: SharedVocab(MAP, 15, tail="spread")),
        (TypeError, "teacher_logits must be a tensor", lambda: SharedVocab(MAP, 15)(None)),
        (ValueError, r"vocab_size must be in \[1, 12\]", lambda: SharedVocab(MAP, 15)(X.s)),
        (ValueError, "12 classes of the shared", lambda: kd.ForwardKLLoss()(X.s[:, :9], SharedVocab(MAP, 15)(X.t))),
        (ValueError, "vocab_size must be >= 12", lambda: kd.KDLoss()(X.s, SharedVocab(MAP, 15)(X.t), vocab_size=9)),
        (ValueError, "the rows of student_logits", lambda: kd.ForwardKLLoss()(X.s[:3], SharedVocab(MAP, 15)(X.t))),
        (ValueError, r"must be in \[0, 15\), the teacher's classes", lambda: SharedVocab(MAP, 15)(SparseTeacher(torch.tensor([[15]]), torch.zeros(1, 1)))),  # noqa: E501
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(error, message, make_it):
    with pytest.raises(error, match=message):
        make_it()
