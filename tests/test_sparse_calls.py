"""Wrong teachers of some classes, and wrong calls with right ones."""

import pytest
import torch
from accuracy import F64, batch

import kdkernels as kd
from kdkernels import SparseTeacher

K = 6


def sparse_of(x, **change):
    at = x.t.topk(K).indices
    given = dict(indices=at, log_probs=x.t.log_softmax(-1).gather(1, at), log_tail=torch.zeros(len(at), dtype=F64))
    return SparseTeacher(**(given | change))


X = batch(4, 40)
TOP = X.t.topk(K).indices


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "indices must be a tensor of integers, got torch.float64", dict(indices=X.t)),
        (ValueError, r"indices must have shape \(..., k\)", dict(indices=torch.tensor(3))),
        (
            ValueError,
            "indices must be classes, or -1 for none, got -2",
            dict(indices=TOP.clone().fill_(-2)),
        ),
        (
            ValueError,
            "different classes in each row, got 3 twice",
            dict(indices=torch.tensor([[3, 1, 3, 2, 4, 5]] * 4)),
        ),
        (TypeError, "needs log_probs or logits, one of them", dict(logits=X.t[:, :K])),
        (TypeError, "needs log_probs or logits, one of them", dict(log_probs=None)),
        (TypeError, "log_probs must be a floating-point tensor, got torch.int64", dict(log_probs=TOP)),
        (ValueError, r"log_probs must have shape \(4, 6\) like indices, got \(4, 5\)", dict(log_probs=X.t[:, :5])),
        (ValueError, r"log_tail must have shape \(4,\) like indices, got \(4, 1\)", dict(log_tail=X.t[:, :1])),
        (ValueError, "temperature must be > 0, got 0", dict(temperature=0)),
        (ValueError, "tail must be one of bucket, renormalise, spread, got 'none'", dict(tail="none")),
        (ValueError, "tail='bucket' needs log_tail", dict(log_tail=None, tail="bucket")),
        (ValueError, "sparse_gradient needs tail='renormalise'", dict(sparse_gradient=True)),
    ],
)
def test_a_wrong_teacher_is_refused(error, message, change):
    with pytest.raises(error, match=message):
        sparse_of(X, **change)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (
            ValueError,
            "tail at temperature 1, and the loss has a teacher at 2",
            lambda: kd.KDLoss()(X.s, sparse_of(X), X.y),
        ),
        (
            ValueError,
            "tail at temperature 1, and the loss has a teacher at 3",
            lambda: kd.ForwardKLLoss()(X.s, sparse_of(X), temperature=torch.full((4,), 3.0)),
        ),
        (
            ValueError,
            r"rows of student_logits \(2, 40\), got indices of shape \(4, 6\)",
            lambda: kd.ForwardKLLoss()(X.s[:2], sparse_of(X)),
        ),
        (
            ValueError,
            r"indices of a SparseTeacher must be in \[0, 20\)",
            lambda: kd.ForwardKLLoss()(X.s[:, :20], sparse_of(X)),
        ),
        (
            ValueError,
            "requires grad, but no gradient flows to it",
            lambda: kd.ForwardKLLoss()(X.s, sparse_of(X, log_probs=X.t[:, :K].clone().requires_grad_())),
        ),
        (
            ValueError,
            "SpearmanLoss compares classes one by one.*renormalise",
            lambda: kd.SpearmanLoss()(X.s, sparse_of(X)),
        ),
        (ValueError, "ForwardKLLoss z-scores its rows", lambda: kd.ForwardKLLoss(standardize=True)(X.s, sparse_of(X))),
        (ValueError, "DISTLoss compares a class in all rows", lambda: kd.DISTLoss()(X.s, sparse_of(X))),
        (
            ValueError,
            r"labels must be in \[0, 40\) or ignore_index=-100, got 40 at row 2",
            lambda: kd.KDLoss(temperature=1.0)(X.s, sparse_of(X), torch.tensor([0, 1, 40, 2])),
        ),
        (ValueError, "needs labels", lambda: kd.KDLoss(temperature=1.0)(X.s, sparse_of(X))),
        (
            ValueError,
            "DKDLoss needs the label's class among those.*at row 0 is none",
            lambda: kd.DKDLoss()(X.s, sparse_of(X, tail="renormalise"), X.t.argmin(-1)),
        ),
        (
            ValueError,
            "sparse_gradient needs ce_weight=0",
            lambda: kd.KDLoss()(X.s, sparse_of(X, tail="renormalise", sparse_gradient=True), X.y),
        ),
        (ValueError, r"k must be in \[1, 40\], got 41", lambda: SparseTeacher.from_logits(X.t, 41)),
        (TypeError, "student_logits must be a tensor", lambda: kd.ForwardKLLoss()(None, sparse_of(X))),
    ],
)
def test_a_wrong_call_is_refused(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_a_loss_at_temperature_one_of_its_own_is_refused_elsewhere():
    class Raw(kd.Loss):
        """log sum exp of the teacher at temperature 1."""

        def points(self):
            return (kd.Point(teacher=1, raw=True),)

        def value(self, p):
            return p.lse

    sparse = SparseTeacher.from_logits(X.t, K, 2.0)
    with pytest.raises(ValueError, match="Raw sums powers"):
        Raw(temperature=2.0)(X.s, sparse)
