"""Triton kernels of the separable losses: phi and its slopes become Triton source, once for each structure of a tape.

    sums    one program a row: reads s and t (2 w bytes a class at w bytes a logit), writes 64 bytes a row
    spread  `spread_kernel`, which adds the slope of phi

Constants of phi are read from memory: a loss whose options change is not compiled again.
"""

import functools

import triton
import triton.language as tl

from ..elements import HEADER, INPUTS, LINE
from ..tape import Op
from .triton_elements import STATS, _tile
from .triton_math import exp, expm1, log, log1p, softplus
from .triton_tape import INF, VALUES, _times, written


def compiled(numbers: list[float]):
    """The Triton function (log q, log p, constants) -> phi and its slopes in both, of a program's last numbers."""
    count, constants = int(numbers[0]), int(numbers[3])
    lines = numbers[HEADER + constants : HEADER + constants + LINE * count]
    return _compiled(constants, tuple(map(int, numbers[4:HEADER])), tuple(map(int, lines)))


@functools.cache
def _compiled(constants: int, outputs: tuple[int, ...], lines: tuple[int, ...]):
    text = ["zero = tl.zeros_like(r0)"]
    text += [f"r{INPUTS + i} = zero + tl.load(constants + {i}).to(tl.float32)" for i in range(constants)]
    for op, to, *operands in zip(*(lines[i::LINE] for i in range(LINE)), strict=True):
        text.append(f"r{to} = " + VALUES[Op(op)].format(**{k: f"r{x}" for k, x in zip("abc", operands, strict=False)}))
    text.append(f"return {', '.join(f'r{x}' for x in outputs)}")
    return written("phi(r0, r1, constants)", text, **{f.__name__: f for f in (exp, expm1, log, log1p, softplus)})


@triton.jit
def _lse(stats):
    return tl.load(stats) + tl.log(tl.load(stats + 1))


@triton.jit(do_not_specialize=["args_row", "B", "vocab", "K"])
def sums_kernel(
    s_ptr, t_ptr, mask_ptr, args_ptr, stats_ptr, constants, out_ptr, s_a, s_b, t_a, t_b, args_row, B, vocab, K,
    PHI: tl.constexpr, WHOLE: tl.constexpr, HAS_MASK: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (N, 8): [inf, 1, sum of phi's slope in log q, in log p, sum of phi, by the student's scale, sum of phi, by
    the teacher's scale], from the statistics stats (N, K + 1, 7) of K points. Not WHOLE, of a vocabulary shard: what
    `kdkernels.ops.with_sums` takes."""
    n = tl.program_id(0).to(tl.int64)
    s_ptr += (n // B) * s_a + (n % B) * s_b
    t_ptr += (n // B) * t_a + (n % B) * t_b
    args_ptr += n * args_row
    stats_ptr += n * (K + 1) * STATS
    last = stats_ptr + K * STATS
    b, a = tl.load(args_ptr) * tl.load(args_ptr + 3), tl.load(args_ptr + 1) * tl.load(args_ptr + 6)
    smax, tmax = tl.load(last + 2), tl.load(last + 3)
    lse_q, lse_p = _lse(stats_ptr), _lse(stats_ptr + STATS)
    lam_q, lam_p = (b * smax - lse_q).to(tl.float32), (a * tmax - lse_p).to(tl.float32)
    b, a, smax, tmax = b.to(tl.float32), a.to(tl.float32), smax.to(tl.float32), tmax.to(tl.float32)
    vocab = tl.where(tl.load(last + 4) > 0, vocab // ALIGN * ALIGN, 0)
    total, of_q, of_p = lse_q * 0.0, lse_q * 0.0, lse_q * 0.0
    by_s, by_t, z_q, z_p = lse_q * 0.0, lse_q * 0.0, lse_q * 0.0, lse_q * 0.0
    for first in range(0, vocab, BLOCK):
        s, t, live, _bad = _tile(s_ptr, t_ptr, mask_ptr, first + tl.arange(0, BLOCK), vocab, True, HAS_MASK)
        log_q = tl.where(live, (s - smax) * b + lam_q, 0.0)
        log_p = tl.where(live, (t - tmax) * a + lam_p, 0.0)
        phi, slope_q, slope_p = PHI(log_q, log_p, constants)
        slope_q, slope_p = tl.where(live, slope_q, 0.0), tl.where(live, slope_p, 0.0)
        total += tl.sum(tl.where(live, phi, 0.0), 0).to(tl.float64)
        # Their sum cancels against the slope of a class that has most of the weight.
        slope_q, slope_p = slope_q.to(tl.float64), slope_p.to(tl.float64)
        z_q += tl.sum(tl.where(live, exp(log_q), 0.0).to(tl.float64), 0)
        z_p += tl.sum(tl.where(live, exp(log_p), 0.0).to(tl.float64), 0)
        of_q += tl.sum(slope_q, 0)
        by_s += tl.sum(_times(slope_q, log_q.to(tl.float64)), 0)
        of_p += tl.sum(slope_p, 0)
        by_t += tl.sum(_times(slope_p, log_p.to(tl.float64)), 0)
    row = (total, of_q, of_p, by_s, by_t, z_q, z_p, total)
    if WHOLE:
        of_q, of_p = tl.where(tl.abs(of_q) < INF, of_q, 0.0), tl.where(tl.abs(of_p) < INF, of_p, 0.0)
        # The rounding of log-partitions leaves no sum of probabilities at 1, and no sum of slopes at 0 without this.
        of_q, of_p = of_q / tl.where(z_q > 0, z_q, 1.0), of_p / tl.where(z_p > 0, z_p, 1.0)
        inf, by_s, by_t = lse_q * 0.0 + INF, by_s + of_q * lse_q, by_t + of_p * lse_p
        row = (inf, lse_q * 0.0 + 1.0, of_q, of_p, total, by_s, total, by_t)
    for j in tl.static_range(8):
        tl.store(out_ptr + n * 8 + j, row[j])
