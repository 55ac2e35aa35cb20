"""Scalar arithmetic that runs twice: on torch tensors, or traced once into a tape that every kernel can interpret.

A loss declares its value as ordinary Python arithmetic on row statistics. Given tensors, the functions here are the
torch functions of the same name; given traced expressions, they append one instruction to the tape. Kernels interpret
the tape once per row, forwards for the value and backwards for its slope (`csrc/tape.h` is the C++ interpreter), so
the value is written once and its derivative never.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Union

import torch
from torch import Tensor


class Op(IntEnum):
    """Instruction codes; `csrc/tape.h` and `backends/triton_tape.py` read the same numbers."""

    CONST = 0
    ADD = 1
    SUB = 2
    MUL = 3
    DIV = 4
    EXP = 5
    EXPM1 = 6
    LOG = 7
    LOG1P = 8
    SQRT = 9
    SOFTPLUS = 10
    TIMES = 11
    GT = 12
    SELECT = 13
    DETACH = 14


class Tape:
    """A straight-line program. Registers: `inputs` inputs first, then one register for each instruction."""

    def __init__(self, inputs: int) -> None:
        self.inputs = inputs
        self.code: list[tuple[float, ...]] = []
        self.used: set[int] = set()
        self._known: dict[tuple[float, ...], int] = {}

    def input(self, register: int) -> Expr:
        return Expr(self, register)

    def emit(self, op: Op, *operands: Value, const: float = 0.0) -> Expr:
        registers = [self._register(x) for x in operands]
        line = (float(op), *[*registers, 0, 0, 0][:3], const)
        if line not in self._known:  # common subexpressions are computed once
            self._known[line] = self.inputs + len(self.code)
            self.code.append(line)
            self.used.update(int(r) for r in registers)
        return Expr(self, self._known[line])

    def sloped(self, out: int) -> set[int]:
        """The registers by which that one has a slope: not what conditions alone read, or what is detached."""
        found = {out}
        for register in range(self.inputs + len(self.code) - 1, self.inputs - 1, -1):
            op, *operands, _ = self.code[register - self.inputs]
            if register in found and op not in (Op.CONST, Op.GT, Op.DETACH):
                found.update(int(r) for r in (operands[1:] if op == Op.SELECT else operands))
        return found

    def _register(self, x: Value) -> int:
        if isinstance(x, Expr):
            return x.register
        return self.emit(Op.CONST, const=float(x)).register


class Expr:
    """A traced scalar: one register of a tape."""

    __slots__ = ("register", "tape")

    def __init__(self, tape: Tape, register: int) -> None:
        self.tape, self.register = tape, register

    def __add__(self, other: Value) -> Expr:
        return self.tape.emit(Op.ADD, self, other)

    def __radd__(self, other: Value) -> Expr:
        return self.tape.emit(Op.ADD, other, self)

    def __sub__(self, other: Value) -> Expr:
        return self.tape.emit(Op.SUB, self, other)

    def __rsub__(self, other: Value) -> Expr:
        return self.tape.emit(Op.SUB, other, self)

    def __mul__(self, other: Value) -> Expr:
        return self.tape.emit(Op.MUL, self, other)

    def __rmul__(self, other: Value) -> Expr:
        return self.tape.emit(Op.MUL, other, self)

    def __truediv__(self, other: Value) -> Expr:
        return self.tape.emit(Op.DIV, self, other)

    def __rtruediv__(self, other: Value) -> Expr:
        return self.tape.emit(Op.DIV, other, self)

    def __neg__(self) -> Expr:
        return self.tape.emit(Op.SUB, 0.0, self)

    def __gt__(self, other: Value) -> Expr:
        return self.tape.emit(Op.GT, self, other)

    def __lt__(self, other: Value) -> Expr:
        return self.tape.emit(Op.GT, other, self)

    def __pow__(self, power: int) -> Expr:
        if not isinstance(power, int) or power < 1:
            raise TypeError(f"a traced value takes positive integer powers only (use exp(p * log(x))), got {power!r}")
        return self if power == 1 else self * self ** (power - 1)

    def __bool__(self) -> bool:
        raise TypeError("a traced value has no truth value: a loss may branch on its own options, and on row "
                        "statistics with kdkernels.tape.where(condition, a, b)")  # fmt: skip


Value = Union[Expr, Tensor, float]  # noqa: UP007 - evaluated at import, and Expr | Tensor needs Python 3.12's torch


def _unary(op: Op, function):
    def apply(x: Value) -> Value:
        return x.tape.emit(op, x) if isinstance(x, Expr) else function(torch.as_tensor(x))

    apply.__name__ = apply.__qualname__ = op.name.lower()
    apply.__doc__ = f"{op.name.lower()}(x), of a tensor or of a traced value."
    return apply


exp = _unary(Op.EXP, torch.exp)
expm1 = _unary(Op.EXPM1, torch.expm1)
log = _unary(Op.LOG, torch.log)
log1p = _unary(Op.LOG1P, torch.log1p)
sqrt = _unary(Op.SQRT, torch.sqrt)


def _softplus(x: Tensor) -> Tensor:
    """F.softplus is linear beyond 20, which is 2e-9 off; the slope of logaddexp is NaN at infinity."""
    infinite = x == torch.inf
    return torch.where(infinite, x, torch.logaddexp(torch.where(infinite, 0.0, x), torch.zeros_like(x)))


softplus = _unary(Op.SOFTPLUS, _softplus)
detach = _unary(Op.DETACH, torch.detach)


def with_slopes(value: Value, *known: tuple[Value, Value]) -> Value:
    """value, whose slopes are known: (x, d value / d x), ... Kernels take these; tensors differentiate the value."""
    if not isinstance(value, Expr):
        return value
    out: Value = detach(value)
    for x, slope in known:
        out = out + (x - detach(x)) * detach(slope)
    return out


def sigmoid(x: Value) -> Value:
    """1 / (1 + exp(-x)), without overflow on either side."""
    return exp(-softplus(-x))


def logaddexp(x: Value, y: Value) -> Value:
    """log(exp(x) + exp(y)); x or y may be -inf."""
    return where(x > y, x, y) + softplus(where(x > y, y - x, x - y))


def times(weight: Value, x: Value) -> Value:
    """weight * x, and 0 where the weight is 0 whatever x is, infinite included (0 log 0 = 0)."""
    for value in (weight, x):
        if isinstance(value, Expr):
            return value.tape.emit(Op.TIMES, weight, x)
    weight = torch.as_tensor(weight)
    return weight * torch.where(weight == 0, 0.0, torch.as_tensor(x))


def where(condition: Value, x: Value, y: Value) -> Value:
    """x where the condition holds, else y; the branch not taken contributes nothing to the slope."""
    for value in (condition, x, y):
        if isinstance(value, Expr):
            return value.tape.emit(Op.SELECT, condition, x, y)
    x, y = (v if isinstance(v, Tensor) else torch.as_tensor(v, dtype=torch.float64) for v in (x, y))
    return torch.where(torch.as_tensor(condition), x, y)
