"""Exact rank metrics against scipy."""

import warnings

import numpy as np
import pytest
import scipy.stats
import torch
from accuracy import BF16, F16, F32, F64, only

import kdkernels as kd
from kdkernels import metrics

BOTH = pytest.mark.parametrize("backend", ["cpu", "reference"])
DTYPES = pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
PAIRS = [(metrics.spearman, scipy.stats.spearmanr), (metrics.kendall_tau, scipy.stats.kendalltau)]
KINDS = ("random", "ties", "all equal", "one distinct", "infinities", "zeros")


def rows(kind, V, dtype, N=2):
    g = torch.Generator().manual_seed(V)
    a, b = torch.randn(2, N, V, generator=g, dtype=F64)
    b = b + a
    if kind == "ties":
        a, b = a.round(), (2 * b).round()
    elif kind == "all equal":
        a = torch.full_like(a, -1.5)
    elif kind == "one distinct":
        a = torch.zeros_like(a).index_fill(1, torch.tensor([V // 2]), 1.0)
    elif kind == "infinities":
        a[:, : V // 3], b[:, V // 2 :] = -torch.inf, torch.inf
    elif kind == "zeros":
        a = torch.where(a.abs() < 1, torch.where(b > 0, 0.0, -0.0), a)
    return a.to(dtype), b.to(dtype)


def scipy_of(function, a, b):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant input: NaN, as here
        return np.array([function(x, y).statistic for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True)])


@BOTH
@DTYPES
@pytest.mark.parametrize("V", [2, 3, 127, 257, 4097])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_scipy(kind, V, dtype, backend):
    a, b = rows(kind, V, dtype)
    with only_metric(backend):
        ranks, rho, tau = metrics.rankdata(a), metrics.spearman(a, b), metrics.kendall_tau(a, b)
    assert ranks.dtype == rho.dtype == tau.dtype == F64
    np.testing.assert_array_equal(ranks, scipy.stats.rankdata(a.double().numpy(), axis=-1))
    np.testing.assert_allclose(rho, scipy_of(scipy.stats.spearmanr, a, b), rtol=0, atol=4e-15)
    np.testing.assert_allclose(tau, scipy_of(scipy.stats.kendalltau, a, b), rtol=0, atol=4e-15)


def equal_to_scipy(a, b, backends):
    ranks = scipy.stats.rankdata(a.double().numpy(), axis=-1)
    exact = [scipy_of(theirs, a, b) for _, theirs in PAIRS]
    for backend in backends:
        with only_metric(backend):
            np.testing.assert_array_equal(metrics.rankdata(a), ranks)
            for (ours, _), want in zip(PAIRS, exact, strict=True):
                np.testing.assert_allclose(ours(a, b), want, rtol=0, atol=4e-15)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("V", [32000, 32768, 50257, 128256, 262144])
def test_equal_to_scipy_over_a_vocabulary(V, dtype):
    equal_to_scipy(*rows("random", V, dtype, N=1), ["cpu"])


@pytest.mark.parametrize("V, dtype", [(32768, F32), (262144, BF16)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_scipy_over_a_vocabulary_of_every_kind(kind, V, dtype):
    """The kernels, and what torch computes elsewhere, on a GPU too."""
    equal_to_scipy(*rows(kind, V, dtype, N=1), ["cpu", "reference"])


@pytest.mark.parametrize("V", [2**20, 2**20 + 1])
def test_equal_to_scipy_where_a_sum_of_ranks_no_longer_fits_beside_its_count(V):
    a, _ = rows("random", V, BF16, N=1)
    a[:, : V // 2], b = a[:, : V // 2].clamp(max=-2), (-a).clamp(max=1)
    np.testing.assert_allclose(metrics.spearman(a, b), scipy_of(scipy.stats.spearmanr, a, b), rtol=0, atol=4e-15)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_more_ties_than_sixteen_bits_count(dtype):
    a, b = rows("random", 200_000, F32, N=1)
    a[:, :150_000], b[:, 50_000:180_000] = 0.25, -3.0
    a, b = a.to(dtype), b.to(dtype)
    for ours, theirs in PAIRS:
        np.testing.assert_allclose(ours(a, b), scipy_of(theirs, a, b), rtol=0, atol=4e-15)


def only_metric(backend):
    return only(backend) if backend == "cpu" else kd.use_backend(backend)


@BOTH
@DTYPES
@pytest.mark.parametrize("V", [5, 5000])
def test_a_nan_spoils_its_row_and_no_other(V, dtype, backend):
    a, b = rows("random", V, dtype, N=3)
    a[1, V // 2] = torch.nan
    with kd.use_backend(backend):
        found = metrics.rankdata(a).isnan().any(-1), metrics.spearman(a, b).isnan(), metrics.kendall_tau(b, a).isnan()
    assert all(x.tolist() == [False, True, False] for x in found)


@BOTH
def test_any_shape_and_strides_and_no_gradient(backend):
    a, b = torch.randn(3, 2, 7).requires_grad_(), torch.randn(2, 7, 3).permute(2, 0, 1).to(BF16)
    with kd.use_backend(backend):
        assert metrics.rankdata(a).shape == (3, 2, 7) and metrics.spearman(a[0, 0], b[0, 0]).shape == ()
        tau = metrics.kendall_tau(a, b)
        assert tau.shape == (3, 2) and not tau.requires_grad
        torch.testing.assert_close(tau[2, 1], metrics.kendall_tau(a[2, 1], b[2, 1]), rtol=0, atol=0)


def test_a_wrong_call_says_which_argument():
    a = torch.randn(3, 7)
    for error, message, wrong in [
        (TypeError, "a must be floating point", lambda: metrics.rankdata(a.long())),
        (TypeError, "b must be a tensor", lambda: metrics.spearman(a, a.tolist())),
        (ValueError, r"b must have a's shape \(3, 7\), got \(3, 6\)", lambda: metrics.kendall_tau(a, a[:, :6])),
        (ValueError, "b must be on a's device", lambda: metrics.kendall_tau(a, a.to("meta"))),
    ]:
        with pytest.raises(error, match=message):
            wrong()


def test_operators_pass_opcheck():
    a, b = rows("ties", 9, F32)
    torch.library.opcheck(torch.ops.kdkernels.rankdata.default, (a,))
    for name in ("spearman", "kendall_tau"):
        torch.library.opcheck(getattr(torch.ops.kdkernels, name).default, (a, b))
