"""The page's soft ranks by projection: against their definition, and where they are Pearson's correlation."""

import numpy as np
import pytest

from benchmarks.pages.permutahedron import one_block_from, one_minus_correlation, soft_ranks, spearman_gradient

S, T = np.random.default_rng(0).normal(size=(2, 30)) * 3
TARGET = T.argsort().argsort() + 1.0


@pytest.mark.parametrize("eps", [0.02, 0.1, 0.3, 1.0])
def test_next_to_the_logits_in_the_permutahedron(eps):
    """r is in it, and no vertex lies in the direction of s / eps from r: what makes a point the nearest."""
    r, _ = soft_ranks(S, eps)
    largest = np.sort(r)[::-1].cumsum()
    assert np.all(largest <= np.arange(30, 0, -1).cumsum() + 1e-9) and np.isclose(r.sum(), 30 * 31 / 2)
    away = S / eps - r
    vertex = np.empty(30)
    vertex[np.argsort(away, kind="stable")] = np.arange(1, 31)
    assert away @ vertex <= away @ r + 1e-9


@pytest.mark.parametrize("eps", [0.1, 0.3, 1.0])
def test_gradient(eps):
    value, gradient, _ = spearman_gradient(S, TARGET, eps)
    steps = 1e-6 * np.eye(30)
    both = [[spearman_gradient(S + sign * step, TARGET, eps)[0] for sign in (1, -1)] for step in steps]
    np.testing.assert_allclose(gradient, [(a - b) / 2e-6 for a, b in both], atol=1e-8)
    assert 0 < value < 2


def test_one_block_is_pearson_and_where_it_begins():
    eps = one_block_from(S)
    assert spearman_gradient(S, TARGET, 0.999 * eps)[2] > 1
    value, gradient, blocks = spearman_gradient(S, TARGET, 1.001 * eps)
    assert blocks == 1
    np.testing.assert_allclose(value, one_minus_correlation(S, TARGET)[0])
    np.testing.assert_allclose(gradient, one_minus_correlation(S, TARGET)[1], atol=1e-12)
