"""Triton kernels of the separable losses: phi and its slopes become Triton source, once for each structure of a tape.

    sums    one program a row: reads s and t (2 w bytes a class at w bytes a logit), writes 64 bytes a row
    spread  `spread_kernel`, which adds the slope of phi

Constants of phi are read from memory: a loss whose options change is not compiled again.
"""

import functools
import linecache

import triton
import triton.language as tl

from ..elements import HEADER, INPUTS, LINE
from ..tape import Op
from .triton_elements import INF, STATS, _tile, _times

LOG2E, LN2_HI, LN2_LO = tl.constexpr(1.4426950408889634), tl.constexpr(0.693359375), tl.constexpr(-2.12194440e-4)


@triton.jit
def _power(x):
    """(2^f - 1, 2^(n - u), 1 + u) with e^x = 2^(n + f), u = 1 where n > 0: 2^n may overflow where e^x does not.

    The hardware's exp and log are good to some bits of the largest term only; these are good to 2 ulp.
    """
    x = tl.where(x < -88.0, -88.0, tl.where(x > 89.0, 89.0, x))
    n = tl.floor(x * LOG2E + 0.5)
    f = ((x - n * LN2_HI) - n * LN2_LO) * LOG2E
    p = 1.5594678e-4 * f + 1.3406644e-3
    p = ((p * f + 9.6176930e-3) * f + 5.5503106e-2) * f + 2.4022653e-1
    up = tl.where(n > 0, 1.0, 0.0)
    n = tl.where(n == n, tl.maximum(n, -126.0), 0.0)
    scale = ((n - up).to(tl.int32) + 127) << 23
    return (p * f + 6.9314721e-1) * f, scale.to(tl.float32, bitcast=True), 1.0 + up


@triton.jit
def _exp(x):
    p, scale, twice = _power(x)
    return tl.where(x < -87.3, 0.0, (p + 1.0) * scale * twice)


@triton.jit
def _expm1(x):
    p, scale, twice = _power(x)
    scale *= tl.where(x > 30.0, 1.0, twice)
    e = tl.where(x > 30.0, (p + 1.0) * scale * twice, p * scale + (scale - 1.0))
    return tl.where(x < -87.3, -1.0, e)


@triton.jit
def _log_of(u, x, ONE_PLUS: tl.constexpr):
    """log u, or log(1 + x) with u = 1 + x rounded. [fdlibm, logf and log1pf]"""
    small = u < 1.17549435e-38
    raw = tl.where(small, u * 33554432.0, u).to(tl.int32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    k = ((raw >> 23) - 127).to(tl.float32) - tl.where(small, 25.0, 0.0)
    f = ((raw & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    rest = f * 0.0
    if ONE_PLUS:
        rest = tl.where(k == 0, 0.0, tl.where(k > 0, 1.0 - (u - x), x - (u - 1.0)) / u)
        f = tl.where(k == 0, x, f)
    s = f / (2.0 + f)
    z, half = s * s, 0.5 * f * f
    r = z * (0.66666662693 + z * (0.40000972152 + z * (0.28498786688 + z * 0.24279078841)))
    y = k * LN2_HI - ((half - (s * (half + r) + (k * LN2_LO + rest))) - f)
    y = tl.where(u == INF, u, tl.where(u == 0, -INF, y))
    return tl.where(u >= 0, y, float("nan"))


@triton.jit
def _log(x):
    return _log_of(x, x, False)


@triton.jit
def _log1p(x):
    return _log_of(1.0 + x, x, True)


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + _log1p(_exp(-tl.abs(x)))


FORMS = {
    Op.ADD: "{0} + {1}", Op.SUB: "{0} - {1}", Op.MUL: "{0} * {1}", Op.DIV: "{0} / {1}", Op.EXP: "_exp({0})",
    Op.EXPM1: "_expm1({0})", Op.LOG: "_log({0})", Op.LOG1P: "_log1p({0})", Op.SQRT: "tl.sqrt({0})",
    Op.SOFTPLUS: "_softplus({0})", Op.TIMES: "_times({0}, {1})", Op.GT: "tl.where({0} > {1}, 1.0, 0.0)",
    Op.SELECT: "tl.where({0} != 0, {1}, {2})",
}  # fmt: skip


def compiled(numbers: list[float]):
    """The Triton function (log q, log p, constants) -> phi and its slopes in both, of a program's last numbers."""
    count, constants = int(numbers[0]), int(numbers[3])
    lines = numbers[HEADER + constants : HEADER + constants + LINE * count]
    return _compiled(constants, tuple(map(int, numbers[4:HEADER])), tuple(map(int, lines)))


@functools.cache
def _compiled(constants: int, outputs: tuple[int, ...], lines: tuple[int, ...]):
    text = ["@triton.jit", "def phi(r0, r1, constants):", "    zero = tl.zeros_like(r0)"]
    text += [f"    r{INPUTS + i} = zero + tl.load(constants + {i})" for i in range(constants)]
    for op, to, *operands in zip(*(lines[i::LINE] for i in range(LINE)), strict=True):
        text.append(f"    r{to} = {FORMS[Op(op)].format(*(f'r{x}' for x in operands))}")
    text.append(f"    return {', '.join(f'r{x}' for x in outputs)}")
    name = f"<kdkernels phi {hash((constants, outputs, lines)):x}>"
    source = "\n".join(text) + "\n"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # where triton reads it
    scope = {"triton": triton, "tl": tl, "_times": _times, "__name__": __name__} | {
        f.__name__: f for f in (_exp, _expm1, _log, _log1p, _softplus)
    }
    exec(compile(source, name, "exec"), scope)  # written here, of instruction codes and numbers only
    return scope["phi"]


@triton.jit
def _lse(stats):
    return tl.load(stats) + tl.log(tl.load(stats + 1))


@triton.jit(do_not_specialize=["args_row", "B", "vocab", "K"])
def sums_kernel(
    s_ptr, t_ptr, mask_ptr, args_ptr, stats_ptr, constants, out_ptr, s_a, s_b, t_a, t_b, args_row, B, vocab, K,
    PHI: tl.constexpr, HAS_MASK: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (N, 8): [inf, 1, sum of phi's slope in log q, in log p, sum of phi, by the student's scale, sum of phi, by
    the teacher's scale], from the statistics stats (N, K + 1, 7) of K points."""
    n = tl.program_id(0).to(tl.int64)
    s_ptr += (n // B) * s_a + (n % B) * s_b
    t_ptr += (n // B) * t_a + (n % B) * t_b
    args_ptr += n * args_row
    stats_ptr += n * (K + 1) * STATS
    last = stats_ptr + K * STATS
    b, a, smax, tmax = tl.load(args_ptr), tl.load(args_ptr + 1), tl.load(last + 2), tl.load(last + 3)
    lse_q, lse_p = _lse(stats_ptr), _lse(stats_ptr + STATS)
    lam_q, lam_p = (b * smax - lse_q).to(tl.float32), (a * tmax - lse_p).to(tl.float32)
    vocab = tl.where(tl.load(last + 4) > 0, vocab // ALIGN * ALIGN, 0)
    total, of_q, of_p = lse_q * 0.0, lse_q * 0.0, lse_q * 0.0
    by_s, by_t = lse_q * 0.0, lse_q * 0.0
    for first in range(0, vocab, BLOCK):
        s, t, live, _bad = _tile(s_ptr, t_ptr, mask_ptr, first + tl.arange(0, BLOCK), vocab, True, HAS_MASK)
        log_q = tl.where(live, (s - smax.to(tl.float32)) * b.to(tl.float32) + lam_q, 0.0)
        log_p = tl.where(live, (t - tmax.to(tl.float32)) * a.to(tl.float32) + lam_p, 0.0)
        phi, slope_q, slope_p = PHI(log_q, log_p, constants)
        slope_q, slope_p = tl.where(live, slope_q, 0.0), tl.where(live, slope_p, 0.0)
        total += tl.sum(tl.where(live, phi, 0.0), 0).to(tl.float64)
        of_q += tl.sum(slope_q, 0).to(tl.float64)
        of_p += tl.sum(slope_p, 0).to(tl.float64)
        by_s += tl.sum(_times(slope_q, log_q), 0).to(tl.float64)
        by_t += tl.sum(_times(slope_p, log_p), 0).to(tl.float64)
    of_q, of_p = tl.where(tl.abs(of_q) < INF, of_q, 0.0), tl.where(tl.abs(of_p) < INF, of_p, 0.0)
    row = (lse_q * 0.0 + INF, lse_q * 0.0 + 1.0, of_q, of_p, total, by_s + of_q * lse_q, total, by_t + of_p * lse_p)
    for j in tl.static_range(8):
        tl.store(out_ptr + n * 8 + j, row[j])
