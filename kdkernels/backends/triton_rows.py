"""The Triton kernel for what is left of a row: its tape forwards and backwards, and the coefficients of `spread`."""

import triton
import triton.language as tl

from .triton_elements import COEFS, INF, NAN, STATS, _times


@triton.jit
def _log1p(x):
    """log(1 + x) to full precision near 0 (Kahan), from log alone."""
    u = 1.0 + x
    return tl.where((u == 1) | (u == INF), x, tl.log(u) * (x / tl.where(u == 1, 1.0, u - 1)))


@triton.jit
def _expm1(x):
    """exp(x) - 1 to full precision near 0 (Kahan), from log and exp alone."""
    e = tl.exp(x)
    plain = (e == 1) | (e == INF) | (e - 1 == -1)
    return tl.where(plain, tl.where(e == 1, x, e - 1), (e - 1) * (x / tl.where(plain, 1.0, tl.log(e))))


@triton.jit
def _apply(op, a, b, c, const):
    """Value of one instruction of the tape (`kdkernels.tape.Op`), and its derivatives by a and b."""
    zero = tl.zeros_like(a)
    x, da, db = zero + const, zero, zero
    if op == 1:
        x, da, db = a + b, zero + 1, zero + 1
    elif op == 2:
        x, da, db = a - b, zero + 1, zero - 1
    elif op == 3:
        x, da, db = a * b, b, a
    elif op == 4:
        x, da, db = a / b, 1.0 / b, -a / b / b
    elif op == 5:
        x, da = tl.exp(a), tl.exp(a)
    elif op == 6:
        x, da = _expm1(a), tl.exp(a)
    elif op == 7:
        x, da = tl.log(a), 1.0 / a
    elif op == 8:
        x, da = _log1p(a), 1.0 / (1.0 + a)
    elif op == 9:
        x, da = tl.sqrt(a), 0.5 / tl.sqrt(a)
    elif op == 10:
        x, da = tl.maximum(a, 0.0) + _log1p(tl.exp(-tl.abs(a))), 1.0 / (1.0 + tl.exp(-a))
    elif op == 11:
        x, da, db = _times(a, b), tl.where(a == 0, 0.0, b), a
    elif op == 12:
        x = zero + tl.where(a > b, 1.0, 0.0)
    elif op == 13:
        x, db = tl.where(a != 0, b, c), zero + tl.where(a != 0, 1.0, 0.0)
    elif op == 14:
        x = a
    return x, da, db


@triton.jit
def _add(ptr, g, slope, use):
    """An adjoint or slope of 0 passes nothing on: 0 * inf would."""
    tl.store(ptr, tl.load(ptr, mask=use, other=0.0) + tl.where(slope == 0, 0.0, _times(g, slope)), mask=use)
    tl.debug_barrier()


@triton.jit
def _operands(code, tape, N, use):
    a, b, c = tl.load(code + 1).to(tl.int64) * N, tl.load(code + 2).to(tl.int64) * N, tl.load(code + 3).to(tl.int64) * N
    x, y = tl.load(tape + a, mask=use, other=1.0), tl.load(tape + b, mask=use, other=1.0)
    z = tl.load(tape + c, mask=use, other=1.0)
    value, dx, dy = _apply(tl.load(code).to(tl.int32), x, y, z, tl.load(code + 4))
    return a, b, c, value, dx, dy


@triton.jit
def _point(stats, args, program, k, use):
    """Statistics m, z, S, T, ss, st, tt of point k; its flags, scales and scaled coefficients."""
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
    lse = tl.where(z == 0, -INF, m + tl.log(tl.where(z == 0, 1.0, z)))
    return lse, S, T, ss, st, tt, flags, r, rt, b, a



@triton.jit
def _slopes_of(g, N, r, rt, given, use):
    """Slopes of the value by the six statistics of a point, in raw logit units."""
    E, S = tl.load(g, mask=use, other=0.0), tl.load(g + N, mask=use, other=0.0)
    T = tl.load(g + 2 * N, mask=use, other=0.0)
    ss, st = tl.load(g + 3 * N, mask=use, other=0.0), tl.load(g + 4 * N, mask=use, other=0.0)
    ss, st = tl.where(given, 0.0, r * r * ss), tl.where(given, 0.0, r * rt * st)  # coefficients have no slope
    return E, r * S, rt * T, ss, st, rt * rt * tl.load(g + 5 * N, mask=use, other=0.0)


@triton.jit
def _load_inputs(stats, args, program, tape, N, K, sy, ty, use):
    """Fills the input registers; true where a point has no class left to sum over."""
    bad = use == (use == 0)
    for k in range(K):
        lse, S, T, ss, st, tt, flags, r, rt, b, a = _point(stats, args, program, k, use)
        given, at = (flags & 64) != 0, args + 3 + 2 * k
        x3 = tl.where(given, tl.load(at, mask=use, other=0.0), r * r * ss)
        x4 = tl.where(given, tl.load(at + 1, mask=use, other=0.0), r * rt * st)
        x = (lse, r * S, rt * T, x3, x4, rt * rt * tt)
        for j in tl.static_range(6):
            tl.store(tape + (6 * k + j) * N, x[j], mask=use)
        alone = ((flags & 4) != 0) & (tl.abs(_times(b, sy) + _times(a, ty)) < INF)
        apart = (b != 0) & (a != 0) & ((flags & 2) == 0)  # two rows may have no class in common
        bad = bad | ((lse == -INF) & (alone == 0) & (apart == 0))
    at, ss, ts = tape + 6 * K * N, tl.load(args, mask=use, other=1.0), tl.load(args + 1, mask=use, other=1.0)
    rest = (sy * ss, ty * ts, sy, tl.load(args + 2, mask=use, other=1.0))
    for j in tl.static_range(4):
        tl.store(at + j * N, rest[j], mask=use)
    tl.debug_barrier()
    return bad


@triton.jit
def _differentiate(program, tape, slopes, N, K, R, out, use):
    """Slopes of the output by every register, from those after it to those before."""
    one = tl.full(use.shape, 1.0, tl.float64)
    _add(slopes + out * N, one, one, use)
    for back in range(R):
        i = R - 1 - back
        code = program + 4 + K + 5 * i
        a, b, c, _y, da, db = _operands(code, tape, N, use)
        g = tl.load(slopes + (6 * K + 4 + i) * N, mask=use, other=0.0)
        _add(slopes + a, g, da, use)
        _add(slopes + b, g, db, use)
        _add(slopes + c, g, tl.where(tl.load(code) == 13, 1.0 - db, 0.0), use)


@triton.jit
def _point_coefs(side: tl.constexpr, point, slopes, smax, tmax):
    """The row of coefficients of a point, and its share of d value / d log(scale of this side)."""
    lse, S, T, vs, vst, vt, flags, _r, _rt, b, a = point
    E, gS, gT, ps, pst, pt = slopes
    A = tl.where((flags & 2) != 0, 0.0, a if side else b)
    own_g, own_mean, own_v, own_p = (gT, T, vt, pt) if side else (gS, S, vs, ps)
    other_g = gS if side else gT
    c0 = _times(A, E - _times(ps, vs) - _times(pst, vst) - _times(pt, vt)) + own_g
    c1 = _times(A, gS) + (pst if side else 2 * ps)
    c2 = _times(A, gT) + (2 * pt if side else pst)
    c3, c4, c5 = _times(A, ps), _times(A, pst), _times(A, pt)
    scale = _times(_times(A, E) + own_g, own_mean) + _times(_times(own_g, A) + 2 * own_p, own_v)
    scale = tl.where((flags & 1) != 0, 0.0, scale + _times(_times(other_g, A) + pst, vst))
    D, F = smax - S, tmax - T  # from deviations of the means to deviations of the maxima
    c0 += _times(c1, D) + _times(c2, F) + _times(c3, D * D) + _times(c5, F * F)
    c0 += tl.where((c4 == 0) | (D == 0), 0.0, D * _times(c4, F))
    c1 += 2 * _times(c3, D) + _times(c4, F)
    c2 += 2 * _times(c5, F) + _times(c4, D)
    lam = tl.where(lse == -INF, -INF, _times(b, smax) + _times(a, tmax) - lse)
    return (lam, b, a, c0, c1, c2, c3, c4, c5, ((flags & 4) != 0) + smax * 0), scale


@triton.jit(do_not_specialize=["args_row", "N", "K", "R", "out"])
def rows_kernel(
    stats, args, program, tape, value_ptr, coef, args_row, N, K, R, out, SIDES: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Runs the tape (2, 6 K + 4 + R, N) forwards and backwards; a lane reads only what it wrote itself."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    use = n < N
    stats, args, tape, coef = stats + n * (K + 1) * STATS, args + n * args_row, tape + n, coef + n * (K + 1) * COEFS
    last = stats + K * STATS
    sy, ty = tl.load(last, mask=use, other=0.0), tl.load(last + 1, mask=use, other=0.0)
    smax, tmax = tl.load(last + 2, mask=use, other=0.0), tl.load(last + 3, mask=use, other=0.0)
    kept = tl.load(last + 4, mask=use, other=0.0)
    keep = kept > 0
    bad = _load_inputs(stats, args, program, tape, N, K, sy, ty, use)
    for i in range(R):
        _a, _b, _c, y, _da, _db = _operands(program + 4 + K + 5 * i, tape, N, use)
        tl.store(tape + (6 * K + 4 + i) * N, y, mask=use)
        tl.debug_barrier()
    value = tl.load(tape + out * N, mask=use, other=0.0)
    value = tl.where(keep, tl.where(bad, NAN, value), tl.where(kept < 0, NAN, 0.0))
    tl.store(value_ptr + n, value, mask=use)
    slopes = tape + (6 * K + 4 + R).to(tl.int64) * N
    _differentiate(program, tape, slopes, N, K, R, out, use)
    nan = tl.where(value != value, NAN, 0.0).to(tl.float64)
    g = slopes + 6 * K * N
    gs, gt = tl.load(g, mask=use, other=0.0), tl.load(g + N, mask=use, other=0.0)
    gr, ss = tl.load(g + 2 * N, mask=use, other=0.0), tl.load(args, mask=use, other=1.0)
    ts = tl.load(args + 1, mask=use, other=1.0)
    for side in tl.static_range(SIDES):
        scale = _times(gt, ty * ts) if side else _times(gs, sy * ss)
        for k in range(K):
            point = _point(stats, args, program, k, use)
            given, r, rt = (point[6] & 64) != 0, point[7], point[8]
            row, share = _point_coefs(side, point, _slopes_of(slopes + 6 * k * N, N, r, rt, given, use), smax, tmax)
            scale += share
            for j in tl.static_range(10):
                tl.store(coef + k * COEFS + j, tl.where(keep, row[j] + (nan if j < 9 else 0.0), 0.0), mask=use)
        label = gt * ts if side else gs * ss + gr
        ending = (label + nan, smax, tmax, keep.to(tl.float64), scale + nan)
        for j in tl.static_range(5):
            tl.store(coef + K * COEFS + j, tl.where(keep, ending[j], 0.0), mask=use)
        coef += N * (K + 1) * COEFS
