"""From phi(log q, log p), traced, to what a kernel runs at every class: phi and both of its slopes, without branches.

The slopes are derived here, once, by running the tape backwards and recording the result on the same tape; kernels only
ever go forwards. What is left is a list of floats, a part of the loss's program (see `kdkernels.loss.Program`):

    [E, E1, R, C, phi, slope in log q, slope in log p], C constants, E x (op, to, a, b, c)

The last three of the header and to, a, b, c are registers: 0 is log q, 1 is log p, then C constants, then R scratch
registers, used again as soon as they are free. The first E1 instructions give phi and its slope in log q.
"""

from __future__ import annotations

from collections.abc import Callable

from .tape import Expr, Op, Tape, exp, softplus, times, where

HEADER, LINE, INPUTS = 7, 5, 2
OPERANDS = {Op.CONST: 0, Op.SELECT: 3} | dict.fromkeys((Op.ADD, Op.SUB, Op.MUL, Op.DIV, Op.TIMES, Op.GT), 2)


def lowered(phi: Callable) -> list[float]:
    """The program of phi, a function of two traced values."""
    tape = Tape(INPUTS)
    log_q, log_p = tape.input(0), tape.input(1)
    value = phi(log_q, log_p)
    if not isinstance(value, Expr):
        value = tape.emit(Op.CONST, const=float(value))
    return _encoded(tape, [value, *slopes(tape, value)])


def slopes(tape: Tape, value: Expr) -> list[Expr]:
    """Slopes of a value by the inputs of its tape, recorded on that tape. A slope of 0 passes nothing on."""
    zero = tape.emit(Op.CONST, const=0.0)
    varies = [True] * tape.inputs
    for line in tape.code:
        op, *operands = map(int, line[:4])
        still = op in (Op.GT, Op.DETACH)
        varies.append(not still and any(varies[r] for r in operands[: OPERANDS.get(Op(op), 1)]))
    found: dict[int, Expr | float] = {value.register: 1.0}
    for register in reversed(range(tape.inputs, len(varies))):
        if not varies[register] or register not in found:
            continue
        g = found.pop(register)
        op, *operands = map(int, tape.code[register - tape.inputs][:4])
        a, b, c = (tape.input(r) for r in operands)
        for at, slope in zip((a, b, c), _partials(Op(op), g, a, b, tape.input(register)), strict=False):
            if slope is not None and varies[at.register]:
                before = found.get(at.register)
                found[at.register] = slope if before is None else before + slope
    results = [found.get(r, zero) for r in range(tape.inputs)]
    return [g if isinstance(g, Expr) else tape.emit(Op.CONST, const=g) for g in results]


def _partials(op: Op, g, a: Expr, b: Expr, value: Expr) -> tuple:
    """What the operands of an instruction get of the slope g of its value."""

    def by(slope):
        line = a.tape.code[slope.register - a.tape.inputs] if slope.register >= a.tape.inputs else None
        known = line[4] if line is not None and line[0] == Op.CONST else None
        if isinstance(g, Expr):
            return g if known == 1 else times(g, slope)
        return slope * g if known is None and g != 1 else slope if known is None else g * known

    return {
        Op.ADD: lambda: (g, g),
        Op.SUB: lambda: (g, -g),
        Op.MUL: lambda: (by(b), by(a)),
        Op.DIV: lambda: (by(1 / b), by(-value / b)),
        Op.EXP: lambda: (by(value),),
        Op.EXPM1: lambda: (by(value + 1),),
        Op.LOG: lambda: (by(1 / a),),
        Op.LOG1P: lambda: (by(1 / (1 + a)),),
        Op.SQRT: lambda: (by(0.5 / value),),
        Op.SOFTPLUS: lambda: (by(exp(-softplus(-a))),),
        Op.TIMES: lambda: (where(a, by(b), 0.0), times(a, g)),
        Op.SELECT: lambda: (None, where(a, g, 0.0), where(a, 0.0, g)),
    }[op]()


def _encoded(tape: Tape, outputs: list[Expr]) -> list[float]:
    """Constants become registers of their own, and the rest shares the fewest registers."""
    alias = _renamed(tape)
    lines = {tape.inputs + i: (Op(int(x[0])), [alias[int(r)] for r in x[1 : 1 + OPERANDS.get(Op(int(x[0])), 1)]])
             for i, x in enumerate(tape.code)}  # fmt: skip
    ends = [alias[x.register] for x in outputs]
    first = _needed(lines, ends[:2])
    order = [*sorted(first), *sorted(_needed(lines, ends[2:]) - first)]
    constants = [r for r in order if lines[r][0] == Op.CONST]
    order = [r for r in order if lines[r][0] != Op.CONST]
    place = {r: r for r in range(INPUTS)} | {r: INPUTS + i for i, r in enumerate(constants)}
    base = fresh = INPUTS + len(constants)
    last = {r: i for i, at in enumerate(order) for r in lines[at][1]} | dict.fromkeys(ends, len(order))
    free, code = [], []
    for i, at in enumerate(order):
        op, operands = lines[at]
        registers = [place[r] for r in operands]
        free += sorted({place[r] for r in operands if last[r] == i and place[r] >= base})
        if not free:
            free, fresh = [fresh], fresh + 1
        place[at] = free.pop()
        code += [float(op), place[at], *[*registers, 0, 0, 0][:3]]
    early = len([r for r in order if r in first])
    values = [tape.code[r - tape.inputs][4] for r in constants]
    return [len(order), early, fresh - base, len(constants), *(place[r] for r in ends), *values, *map(float, code)]


def _renamed(tape: Tape) -> list[int]:
    """The register that holds a register's value: DETACH is nothing to compute, nor is what `with_slopes` adds."""
    zero = tape.emit(Op.CONST, const=0.0).register
    alias = list(range(tape.inputs))
    known: dict[tuple, int] = {}
    for i, line in enumerate(tape.code):
        op, used = line[0], OPERANDS.get(Op(int(line[0])), 1)
        a, b, c = (alias[int(r)] if k < used else -1 for k, r in enumerate(line[1:4]))
        same = known.setdefault((op, a, b, c, line[4]), tape.inputs + i)
        if op == Op.DETACH or (op in (Op.ADD, Op.SUB) and b == zero):
            same = a
        elif op == Op.ADD and a == zero:
            same = b
        elif (op == Op.SUB and a == b) or (op in (Op.MUL, Op.TIMES) and zero in (a, b)):
            same = zero
        alias.append(same)
    return alias


def _needed(lines: dict, ends: list[int]) -> set[int]:
    found, todo = set(), [r for r in ends if r >= INPUTS]
    while todo:
        if (r := todo.pop()) not in found:
            found.add(r)
            todo += [x for x in lines[r][1] if x >= INPUTS]
    return found
