"""Tapes (`kdkernels.tape`) as Triton source, compiled once for each structure.

Numbers of a tape are read from memory: a loss whose options change is not compiled again.
"""

import functools
import linecache

import triton
import triton.language as tl

from ..tape import Op

INF = tl.constexpr(float("inf"))


@triton.jit
def _times(c, x):
    """c * x, where c = 0 ignores x, infinite or not."""
    return tl.where(c == 0, 0.0, c * x)


@triton.jit
def _pass(g, slope):
    """What an adjoint g passes on. One of 0 passes nothing, nor does a slope of 0: 0 * inf would."""
    return tl.where(slope == 0, 0.0, _times(g, slope))


@triton.jit
def _exp(x):
    return tl.exp(x)


@triton.jit
def _log(x):
    return tl.log(x)


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
def _softplus(x):
    return tl.maximum(x, 0.0) + _log1p(tl.exp(-tl.abs(x)))


VALUES = {
    Op.ADD: "{a} + {b}", Op.SUB: "{a} - {b}", Op.MUL: "{a} * {b}", Op.DIV: "{a} / {b}", Op.EXP: "exp({a})",
    Op.EXPM1: "expm1({a})", Op.LOG: "log({a})", Op.LOG1P: "log1p({a})", Op.SQRT: "tl.sqrt({a})",
    Op.SOFTPLUS: "softplus({a})", Op.TIMES: "_times({a}, {b})", Op.GT: "tl.where({a} > {b}, 1.0, 0.0)",
    Op.SELECT: "tl.where({a} != 0, {b}, {c})", Op.DETACH: "{a}",
}  # fmt: skip
ADJOINTS = {  # what the operands of an instruction of value {y} and adjoint {g} get
    Op.ADD: ("{g}", "{g}"), Op.SUB: ("{g}", "-{g}"), Op.MUL: ("_pass({g}, {b})", "_pass({g}, {a})"),
    Op.DIV: ("_pass({g}, 1.0 / {b})", "_pass({g}, -{y} / {b})"), Op.EXP: ("_pass({g}, {y})",),
    Op.EXPM1: ("_pass({g}, exp({a}))",), Op.LOG: ("_pass({g}, 1.0 / {a})",),
    Op.LOG1P: ("_pass({g}, 1.0 / (1.0 + {a}))",), Op.SQRT: ("_pass({g}, 0.5 / {y})",),
    Op.SOFTPLUS: ("_pass({g}, 1.0 / (1.0 + exp(-{a})))",),
    Op.TIMES: ("_pass({g}, tl.where({a} == 0, 0.0, {b}))", "_pass({g}, {a})"),
    Op.SELECT: ("", "_pass({g}, tl.where({a} != 0, 1.0, 0.0))", "_pass({g}, tl.where({a} != 0, 0.0, 1.0))"),
}  # fmt: skip
FUNCTIONS = dict(exp=_exp, expm1=_expm1, log=_log, log1p=_log1p, softplus=_softplus)


def written(signature: str, lines: list[str], **functions):
    """The Triton function of this source."""
    source = "\n".join(["@triton.jit", f"def {signature}:", *(f"    {line}" for line in lines)]) + "\n"
    name = f"<kdkernels {hash(source):x}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # where triton reads it
    scope = {"triton": triton, "tl": tl, "_times": _times, "_pass": _pass, "__name__": __name__} | functions
    exec(compile(source, name, "exec"), scope)  # written here, of instruction codes and numbers only
    return scope[signature.partition("(")[0]]


@functools.lru_cache(maxsize=256)
def compiled(program: bytes):
    """The Triton function (inputs, instructions) -> (value, slopes of it in the inputs) of a loss's program."""
    numbers = memoryview(program).cast("d")
    K, R, out = int(numbers[0]), int(numbers[1]), int(numbers[3])
    lines = (numbers[4 + K + 5 * i : 8 + K + 5 * i] for i in range(R))
    return _compiled(6 * K + 4, out, tuple(tuple(map(int, line)) for line in lines))


@functools.cache
def _compiled(inputs: int, out: int, code: tuple[tuple[int, ...], ...]):
    name = lambda i: f"x[{i}]" if i < inputs else f"r{i}"  # noqa: E731
    lines, adjoint = ["zero = tl.zeros_like(x[0])"], {out: "zero + 1.0"}
    for i, (op, a, b, c) in enumerate(code):
        form = VALUES[Op(op)] if op else f"tl.load(code + {5 * i + 4})"
        lines.append(f"r{inputs + i} = zero + " + form.format(a=name(a), b=name(b), c=name(c)))
    for i, (op, *operands) in reversed(list(enumerate(code, inputs))):
        if i not in adjoint:
            continue
        lines.append(f"g{i} = {adjoint[i]}")
        known = dict(zip("abc", map(name, operands), strict=True), y=name(i), g=f"g{i}")
        for to, form in zip(operands, ADJOINTS.get(Op(op), ()), strict=False):
            if form:
                adjoint[to] = f"{adjoint[to]} + {form}".format(**known) if to in adjoint else form.format(**known)
    slopes = [adjoint.get(i, "zero") for i in range(inputs)]
    return written("tape(x, code)", [*lines, f"return ({', '.join([name(out), *slopes])})"], **FUNCTIONS)
