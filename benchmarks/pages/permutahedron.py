"""Soft ranks by projection onto the permutahedron, for the page's comparison. [Blondel et al. 2020, FastSoftSort]

r(s) is the point of the permutahedron of (1, ..., n) next to s / eps. Sorted in descending order it is s / eps - v, v
the non-increasing vector next to s / eps - (n, ..., 1): constant over blocks (pool adjacent violators). A block of one
entry has a rank of its own, whatever its logit: its gradient is 0.
"""

import numpy as np
from scipy.optimize import isotonic_regression


def soft_ranks(s, eps):
    """-> ascending soft ranks of s (n,), and the block of each entry."""
    s = np.asarray(s, dtype=np.float64)
    order = np.argsort(-s, kind="stable")
    z, n = s[order] / eps, len(s)
    found = isotonic_regression(z - np.arange(n, 0, -1), increasing=False)
    sizes = np.diff(found.blocks)
    ranks, block = np.empty(n), np.empty(n, dtype=np.int64)
    ranks[order], block[order] = z - found.x, np.repeat(np.arange(len(sizes)), sizes)
    return ranks, block


def spearman_gradient(s, target, eps):
    """-> 1 - the correlation of the soft ranks with `target`, its gradient by s, the number of blocks."""
    ranks, block = soft_ranks(s, eps)
    value, by_ranks = one_minus_correlation(ranks, target)
    means = np.bincount(block, by_ranks) / np.bincount(block)
    return value, (by_ranks - means[block]) / eps, len(means)


def one_minus_correlation(u, target):
    """-> 1 - rho, and its gradient by u."""
    u, v = u - u.mean(), target - target.mean()
    u_norm, v_norm = np.linalg.norm(u), np.linalg.norm(v)
    rho = u @ v / u_norm / v_norm
    return 1 - rho, (rho * u / u_norm - v / v_norm) / u_norm


def one_block_from(s):
    """The least eps at which the projection is one block: where no prefix of the sorted s / eps - (n, ..., 1) has a
    mean above that of all."""
    x = np.sort(np.asarray(s, dtype=np.float64))[::-1]
    k = np.arange(1, len(x))
    above = np.cumsum(x - x.mean())[:-1] / k
    return (2 * above / (len(x) - k)).max()
