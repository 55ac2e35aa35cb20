"""What the Triton kernels of the rank losses share: a row's live classes, and soft ranks of numbers in order."""

import triton
import triton.language as tl

from .triton_elements import label_of, pair
from .triton_tape import INF

COUNT, COUNTED = tl.constexpr(21), tl.constexpr((1 << 21) - 1)  # low bits of a packed sum, which count


@triton.jit
def order_key(x):
    """float32 -> int64 in [0, 2^32) in the order of the numbers; both zeros the same."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648


@triton.jit
def live_pair(s_ptr, t_ptr, mask_ptr, cols, vocab, edge, last, HAS_MASK: tl.constexpr, BOTH: tl.constexpr):
    """Logits in float32, which classes live, and which spoil their row.

    Of the live ones only those whose teacher key is above `edge`, or is that and the class not beyond `last`.
    """
    s, t = pair(s_ptr, t_ptr, mask_ptr, cols, vocab, True, HAS_MASK)
    fine = (s < INF) & (t < INF)
    some = ((s != -INF) | (t != -INF)) if BOTH else ((s != -INF) & (t != -INF))
    key = order_key(t)
    return s, t, fine & some & ((key > edge) | ((key == edge) & (cols <= last))), fine == 0


@triton.jit
def row_at(s_ptr, t_ptr, label_ptr, top_ptr, grad_ptr, n, s_a, s_b, t_a, t_b, grad_row, B, vocab, ignore,
           HAS_LABEL: tl.constexpr, HAS_TOP: tl.constexpr):  # fmt: skip
    """The row's logits, its classes (0 if they are not asked for), NaN for a strange label, g, and the top's edge."""
    _y, keep, strange = label_of(label_ptr, n, vocab, ignore, HAS_LABEL)
    edge, last = n * 0 - 1, n * 0
    if HAS_TOP:
        edge, last = tl.load(top_ptr + 2 * n), tl.load(top_ptr + 2 * n + 1)
    g = tl.where(keep & (strange == 0), tl.load(grad_ptr + n * grad_row), 0.0)
    limit = tl.where(keep & (strange == 0), vocab + n * 0, 0)
    s_ptr += (n // B) * s_a + (n % B) * s_b
    t_ptr += (n // B) * t_a + (n % B) * t_b
    return s_ptr, t_ptr, limit, tl.where(strange, float("nan"), 0.0).to(tl.float64), keep, g, edge, last


@triton.jit
def count_of(packed):
    return packed & COUNTED


@triton.jit
def _chain(d, x, d2, x2):
    return d * d2, x * d2 + x2


@triton.jit
def _decayed(x_ptr, m, M, other, rate, mass, carry):
    """Scan of `mass` along m, each step towards it from its neighbour `other` multiplied by e^(-rate distance)."""
    use = (m >= 0) & (m < M)
    beside = use & (other >= 0) & (other < M)
    x, y = tl.load(x_ptr + m, mask=beside, other=0.0), tl.load(x_ptr + other, mask=beside, other=0.0)
    decay = tl.exp(-tl.abs(x.to(tl.float64) - y.to(tl.float64)) * rate)
    decay = tl.where(use, tl.where(beside, decay, 0.0), 1.0)
    d, total = tl.associative_scan((decay, tl.where(use, mass, 0.0)), 0, _chain)
    total += d * carry
    lane = tl.arange(0, total.shape[0])
    return total, tl.sum(tl.where(lane == total.shape[0] - 1, total, 0.0), 0)


@triton.jit
def _moments(x_ptr, sums, M, n, BLOCK: tl.constexpr):
    total, squares = n * 0.0, n * 0.0
    for first in range(0, M, BLOCK):
        m = first + tl.arange(0, BLOCK)
        c = count_of(tl.load(sums + m, mask=m < M, other=0)).to(tl.float64)
        total += tl.sum(c * tl.load(x_ptr + m, mask=m < M, other=0.0).to(tl.float64), 0)
    mean = total / tl.maximum(n, 1.0)
    for first in range(0, M, BLOCK):
        m = first + tl.arange(0, BLOCK)
        c = count_of(tl.load(sums + m, mask=m < M, other=0)).to(tl.float64)
        d = tl.load(x_ptr + m, mask=m < M, other=0.0).to(tl.float64) - mean
        squares += tl.sum(c * d * d, 0)
    return mean, squares / tl.maximum(n, 1.0)


@triton.jit
def lapsum(x_ptr, sums, R, K, G, M, n, tau, squares, g, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """Loss of M ascending bins x with packed sums (ranks' sum, count): `Correlation` of csrc/softrank.h, in its units.

    The gradient is A rank + B in each bin, A going to K and B to R; both times g.
    """
    mean, variance = _moments(x_ptr, sums, M, n, BLOCK)
    spread = tl.load(x_ptr + M - 1, mask=M > 0, other=0.0) > tl.load(x_ptr, mask=M > 0, other=0.0)
    fine = spread & (variance > 0) & (squares > 0)
    bins = tl.where(fine, M, 0)
    rate, share = 1 / (tau * tl.sqrt(tl.where(fine, variance, 1.0))), 1 / tl.maximum(n, 1.0)
    carry, count = n * 0.0, n * 0.0
    for first in range(0, bins, BLOCK):
        m = first + tl.arange(0, BLOCK)
        c = count_of(tl.load(sums + m, mask=m < M, other=0)).to(tl.float64)
        total, carry = _decayed(x_ptr, m, M, m - 1, rate, c * share, carry)
        low = total - c * share
        below = count + tl.cumsum(c, 0) - c
        count += tl.sum(c, 0)
        tl.store(R + m, (below * share - low).to(tl.float32), mask=m < M)  # small, and exact, where a is large
        tl.store(K + m, low.to(tl.float32), mask=m < M)
    tl.debug_barrier()
    carry, own, joint, count = n * 0.0, n * 0.0, n * 0.0, n * 0.0
    for first in range(0, bins, BLOCK):
        m = bins - 1 - first - tl.arange(0, BLOCK)
        packed = tl.load(sums + m, mask=m >= 0, other=0)
        c, S = count_of(packed).to(tl.float64) * share, (packed >> COUNT).to(tl.float64) * (share * share / 2)
        total, carry = _decayed(x_ptr, m, M, m + 1, rate, c, carry)
        above = count + tl.cumsum(c, 0) - c
        count += tl.sum(c, 0)
        r = (tl.load(R + m, mask=m >= 0, other=0.0).to(tl.float64) - (above - (total - c))) / 2
        own += tl.sum(c * r * r, 0)
        joint += tl.sum(r * S, 0)
        tl.store(R + m, r.to(tl.float32), mask=m >= 0)
        tl.store(K + m, (tl.load(K + m, mask=m >= 0, other=0.0) + total).to(tl.float32), mask=m >= 0)
    fine = fine & (own > 0)
    own = tl.where(fine, own, 1.0)
    root = tl.sqrt(own) * tl.sqrt(tl.where(fine, squares / (4 * n * n * n), 1.0))
    rho = tl.where(fine, joint / root, 0.0)
    if GRADIENT:
        _lines(x_ptr, sums, R, K, G, tl.where(fine, M, 0), n, rate, mean, variance, -1 / root, rho / own, g, BLOCK)
    return 1 - rho, fine


@triton.jit
def narrow(x):
    """In float32, no larger than it has numbers: two infinities of a line would meet."""
    return tl.minimum(tl.maximum(x, -3e38), 3e38).to(tl.float32)


@triton.jit
def _lines(x_ptr, sums, R, K, G, M, n, rate, mean, variance, ct, cr, g, BLOCK: tl.constexpr):
    """The loss's slope by R_i is (ct T_i + cr R_i) / n; through the kernel, and a, which follows the deviation."""
    tl.debug_barrier()
    carry, share = n * 0.0, 1 / tl.maximum(n, 1.0)
    for first in range(0, M, BLOCK):
        m = first + tl.arange(0, BLOCK)
        packed = tl.load(sums + m, mask=m < M, other=0)
        c, S = count_of(packed).to(tl.float64) * share, (packed >> COUNT).to(tl.float64) * (share * share / 2)
        slope = ct * S + cr * c * tl.load(R + m, mask=m < M, other=0.0).to(tl.float64)
        total, carry = _decayed(x_ptr, m, M, m - 1, rate, slope, carry)
        tl.store(G + m, (total - slope).to(tl.float32), mask=m < M)
    tl.debug_barrier()
    carry, radial, scale = n * 0.0, n * 0.0, rate * share / 2
    for first in range(0, M, BLOCK):
        m = M - 1 - first - tl.arange(0, BLOCK)
        packed = tl.load(sums + m, mask=m >= 0, other=0)
        c, S = count_of(packed).to(tl.float64) * share, (packed >> COUNT).to(tl.float64) * (share * share / 2)
        r = tl.load(R + m, mask=m >= 0, other=0.0).to(tl.float64)
        k = tl.load(K + m, mask=m >= 0, other=0.0).to(tl.float64)
        total, carry = _decayed(x_ptr, m, M, m + 1, rate, ct * S + cr * c * r, carry)
        A = scale * ct * k
        B = scale * (cr * r * k - total - tl.load(G + m, mask=m >= 0, other=0.0).to(tl.float64))
        d = tl.load(x_ptr + m, mask=m >= 0, other=0.0).to(tl.float64) - mean
        radial += tl.sum(tl.where(m >= 0, d * (A * S + c * B), 0.0), 0)
        tl.store(K + m, narrow(A * g * share / 2), mask=m >= 0)
        tl.store(R + m, narrow(g * B), mask=m >= 0)
    tl.debug_barrier()
    radial /= tl.where(variance > 0, variance, 1.0)
    for first in range(0, M, BLOCK):
        m = first + tl.arange(0, BLOCK)
        d = tl.load(x_ptr + m, mask=m < M, other=0.0).to(tl.float64) - mean
        B = tl.load(R + m, mask=m < M, other=0.0).to(tl.float64)
        tl.store(R + m, narrow(B - g * radial * d), mask=m < M)
