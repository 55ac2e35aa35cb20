"""The Triton kernel for what is left of a row: value, slopes and the coefficients of `spread`."""

import triton
import triton.language as tl

from .triton_elements import COEFS, STATS
from .triton_tape import INF, _times


@triton.jit
def _point(stats, args, program, k, use):
    """Statistics lse, S, T, ss, st, tt of point k; its flags, scales and scaled coefficients; m and log z."""
    flags = tl.load(program + 4 + k).to(tl.int32)
    row = stats + k * STATS
    m, z = tl.load(row, mask=use, other=0.0), tl.load(row + 1, mask=use, other=1.0)
    S, T = tl.load(row + 2, mask=use, other=0.0), tl.load(row + 3, mask=use, other=0.0)
    ss, st = tl.load(row + 4, mask=use, other=0.0), tl.load(row + 5, mask=use, other=0.0)
    tt = tl.load(row + 6, mask=use, other=0.0)
    r = tl.where((flags & 1) != 0, 1.0, tl.load(args, mask=use, other=1.0))
    rt = tl.where((flags & 1) != 0, 1.0, tl.load(args + 1, mask=use, other=1.0))
    b = r * tl.load(args + 3 + 2 * k, mask=use, other=0.0)
    a = rt * tl.load(args + 4 + 2 * k, mask=use, other=0.0)
    log_z = tl.where(z == 0, -INF, tl.log(tl.where(z == 0, 1.0, z)))
    return tl.where(z == 0, -INF, m + log_z), S, T, ss, st, tt, flags, r, rt, b, a, m, log_z


@triton.jit
def _inputs(stats, args, program, K: tl.constexpr, sy, ty, use):
    """The inputs of the tape; and true where a point has no class left to sum over."""
    bad, x = use & ((sy == INF) | (ty == INF)), ()  # which points without the label's class do not see
    for k in tl.static_range(K):
        lse, S, T, ss, st, tt, flags, r, rt, b, a, _m, _log_z = _point(stats, args, program, k, use)
        given, at = (flags & 64) != 0, args + 3 + 2 * k
        x3 = tl.where(given, tl.load(at, mask=use, other=0.0), r * r * ss)
        x4 = tl.where(given, tl.load(at + 1, mask=use, other=0.0), r * rt * st)
        x = x + (lse, r * S, rt * T, x3, x4, rt * rt * tt)  # type: ignore  # noqa: RUF005
        alone = ((flags & 4) != 0) & (tl.abs(_times(b, sy) + _times(a, ty)) < INF)
        apart = (b != 0) & (a != 0) & ((flags & 2) == 0)  # two rows may have no class in common
        bad = bad | ((lse == -INF) & (alone == 0) & (apart == 0))
    ss, ts = tl.load(args, mask=use, other=1.0), tl.load(args + 1, mask=use, other=1.0)
    return bad, x + (sy * ss, ty * ts, sy, tl.load(args + 2, mask=use, other=1.0))  # noqa: RUF005


@triton.jit
def _slopes_of(y, k: tl.constexpr, point):
    """Slopes of the value by the six statistics of point k, in raw logit units; y holds the value and its slopes."""
    r, rt, given = point[7], point[8], (point[6] & 64) != 0
    E, S, T, tt = y[6 * k + 1], y[6 * k + 2], y[6 * k + 3], y[6 * k + 6]
    ss, st = tl.where(given, 0.0, r * r * y[6 * k + 4]), tl.where(given, 0.0, r * rt * y[6 * k + 5])
    return E, r * S, rt * T, ss, st, rt * rt * tt  # coefficients have no slope


@triton.jit
def _point_coefs(side: tl.constexpr, point, slopes, smax, tmax):
    """The row of coefficients of a point, and its share of d value / d log(scale of this side)."""
    _lse, S, T, vs, vst, vt, flags, _r, _rt, b, a, m, log_z = point
    E, gS, gT, ps, pst, pt = slopes
    A = tl.where((flags & 2) != 0, 0.0, a if side else b)
    own_g, own_mean, own_v, own_p = (gT, T, vt, pt) if side else (gS, S, vs, ps)
    other_g = gS if side else gT
    c0 = _times(A, E - _times(ps, vs) - _times(pst, vst) - _times(pt, vt)) + own_g
    top = _times(b, smax) + _times(a, tmax)
    lam = tl.where(log_z == -INF, -INF, top - m - log_z)  # m + log z would lose the second
    # One class has all the weight of giant logits, and is the mean: see csrc/moments.h.
    some = tl.where((tl.abs(top) > 1e16) & (lam == 0) & ((b == 0) | (a == 0)), 0.0, 1.0)
    c1 = _times(some, _times(A, gS) + (pst if side else 2 * ps))
    c2 = _times(some, _times(A, gT) + (2 * pt if side else pst))
    c3, c4, c5 = _times(some * A, ps), _times(some * A, pst), _times(some * A, pt)
    scale = _times(_times(A, E) + own_g, own_mean) + _times(_times(own_g, A) + 2 * own_p, own_v)
    scale = tl.where((flags & 1) != 0, 0.0, scale + _times(_times(other_g, A) + pst, vst))
    D, F = smax - S, tmax - T  # from deviations of the means to deviations of the maxima
    c0 += _times(c1, D) + _times(c2, F) + _times(c3, D * D) + _times(c5, F * F)
    c0 += tl.where((c4 == 0) | (D == 0), 0.0, D * _times(c4, F))
    c1 += 2 * _times(c3, D) + _times(c4, F)
    c2 += 2 * _times(c5, F) + _times(c4, D)
    return (lam, b, a, c0, c1, c2, c3, c4, c5, ((flags & 4) != 0) + smax * 0), scale


@triton.jit
def finish_rows(
    stats, args, program, coef, side_stride, use, TAPE: tl.constexpr, K: tl.constexpr, SIDES: tl.constexpr
):  # fmt: skip
    """The value of rows at these pointers, whose coefficients go to coef."""
    last, code = stats + K * STATS, program + 4 + K
    sy, ty = tl.load(last, mask=use, other=0.0), tl.load(last + 1, mask=use, other=0.0)
    smax, tmax = tl.load(last + 2, mask=use, other=0.0), tl.load(last + 3, mask=use, other=0.0)
    kept = tl.load(last + 4, mask=use, other=0.0)
    keep = kept > 0
    bad, x = _inputs(stats, args, program, K, sy, ty, use)
    y = TAPE(x, code)
    value = tl.where(keep, tl.where(bad, float("nan"), y[0]), tl.where(kept < 0, float("nan"), 0.0))
    nan = tl.where(value != value, float("nan"), 0.0).to(tl.float64)
    gs, gt, gr = y[6 * K + 1], y[6 * K + 2], y[6 * K + 3]
    ss, ts = tl.load(args, mask=use, other=1.0), tl.load(args + 1, mask=use, other=1.0)
    for side in tl.static_range(SIDES):
        scale = _times(gt, ty * ts) if side else _times(gs, sy * ss)
        for k in tl.static_range(K):
            point = _point(stats, args, program, k, use)
            row, share = _point_coefs(side, point, _slopes_of(y, k, point), smax, tmax)
            scale += share
            for j in tl.static_range(10):
                tl.store(coef + k * COEFS + j, tl.where(keep, row[j] + (nan if j < 9 else 0.0), 0.0), mask=use)
        label = gt * ts if side else gs * ss + gr
        ending = (label + nan, smax, tmax, keep.to(tl.float64), scale + nan)
        for j in tl.static_range(5):
            tl.store(coef + K * COEFS + j, tl.where(keep, ending[j], 0.0), mask=use)
        coef += side_stride
    return value


@triton.jit
def finish_row(stats, args, program, coef, TAPE: tl.constexpr, K: tl.constexpr):
    """`finish_rows` of the one row of this program, which has stored its statistics, for the student."""
    tl.debug_barrier()  # the statistics are in memory, where all threads find them
    lane = tl.arange(0, 1)
    return finish_rows(stats + lane, args + lane, program, coef + lane, 0, lane == 0, TAPE, K, 1)


@triton.jit(do_not_specialize=["args_row", "N"])
def rows_kernel(
    stats, args, program, value_ptr, coef, args_row, N,
    TAPE: tl.constexpr, K: tl.constexpr, SIDES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A lane is a row."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    use, row = n < N, n * (K + 1)
    side_stride = N.to(tl.int64) * (K + 1) * COEFS
    value = finish_rows(
        stats + row * STATS, args + n * args_row, program, coef + row * COEFS, side_stride, use, TAPE, K, SIDES
    )
    tl.store(value_ptr + n, value, mask=use)
