"""Divergences whose formula is a difference quotient: where its arguments meet, quadrature takes its place.

The functions of the order, log sum_i p_i^x q_i^(1 - x) and its like, are smooth: a quotient of close values loses the
digits that a mean of derivatives at a few points between them keeps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import tape
from .loss import Loss, Moment, Point
from .options import REAL, check_coefficient, check_number

Q, P = Point(student=1), Point(teacher=1)

# Quadrature in place of a difference quotient of close arguments, exact for polynomials of degree 5: (position, weight)
# of Gauss and Legendre on [0, 1], (barycentric coordinates, weight) of Radon on a triangle.
_GAUSS = ((0.5 - 0.15**0.5, 5 / 18), (0.5, 8 / 18), (0.5 + 0.15**0.5, 5 / 18))
_RADON = [((1 / 3, 1 / 3, 1 / 3), 9 / 40)]
for _root in (15**0.5, -(15**0.5)):
    _x, _weight = (6 + _root) / 21, (155 + _root) / 1200
    _RADON += [(at, _weight) for at in ((_x, _x, 1 - 2 * _x), (_x, 1 - 2 * _x, _x), (1 - 2 * _x, _x, _x))]
_REACH = 0.05  # arguments within it are close: quadrature is an alternative


def _derivative(m: Moment, q: Moment, p: Moment):
    """Mean of log p - log q; like numbers are subtracted first: near p = q that is exact."""
    return (m.t - m.s) - (p.lse - q.lse)


def _square(m: Moment, q: Moment, p: Moment):
    """Mean of (log p - log q)^2."""
    bias = _derivative(m, q, p)
    both = tape.where(m.s > -math.inf, tape.where(m.t > -math.inf, bias * bias, math.inf), math.inf)
    return m.tt - 2 * m.st + m.ss + both


def _smooth(width: float, square, resolution: float):
    """Whether quadrature over `width` is nearer than the difference quotient: its error is (width^2 square)^3 / 1e4."""
    return width * width * square < resolution ** (1 / 4)


class AlphaBetaLoss(Loss):
    """`-sum_i [p_i^a q_i^b - a/(a+b) p_i^(a+b) - b/(a+b) q_i^(a+b)] / (a b)`. [Cichocki et al. 2011; Wang et al. 2025]

    With its limits at a = 0, b = 0, a + b = 0 and a = b = 0. (1, 0) is KL(p || q), (0, 1) KL(q || p),
    (1, 1) half the squared distance, (1/2, 1/2) four times the squared Hellinger distance.
    It is the divided difference f[0, a, a + b] of f(x) = sum_i p_i^x q_i^(a + b - x); where arguments are close or
    equal, quadrature of f' or f'' stands for the difference quotients.

    Args:
        alpha, beta: any finite numbers; the paper's language models use 0.2 and 0.7. Or tensors with one for each row
            of the logits, constants, limits of all kinds among them: make a loss for each batch. With standardize=True
            both may be 0, but not near 0 together.
    """

    def __init__(self, alpha: float | Tensor = 0.2, beta: float | Tensor = 0.7, **options: Any) -> None:
        super().__init__(**options)
        self.alpha, self.beta = alpha, beta

    def check(self) -> None:
        check_coefficient("alpha", self.alpha)
        check_coefficient("beta", self.beta)

    def _per_row(self) -> bool:
        return isinstance(self.alpha, Tensor) or isinstance(self.beta, Tensor)

    def _orders(self) -> tuple[Any, Any]:
        """a and a + b, numbers or (N,) or (1,) on the host."""
        if not self._per_row():
            return self.alpha, self.alpha + self.beta
        numbers = (torch.as_tensor(x, dtype=torch.float64, device="cpu") for x in (self.alpha, self.beta))
        a, b = torch.broadcast_tensors(*(x.reshape(-1) for x in numbers))
        return a, a + b

    def _corners(self) -> Any:
        """x, y, z: the nearest two in front if they are close, and never the mixture's in the middle."""
        a, c = self._orders()
        orders = (a, c, 0 * a), (a, 0 * a, c), (c, 0 * a, a)
        if not self._per_row():
            nearest = min(orders, key=lambda order: abs(order[0] - order[1]))
            return nearest if abs(nearest[0] - nearest[1]) < _REACH else orders[0]
        every = torch.stack([torch.stack(order) for order in orders])
        gap, first = (every[:, 0] - every[:, 1]).abs().min(0)
        return every.gather(0, torch.where(gap < _REACH, first, 0).expand(1, 3, -1))[0].unbind(0)

    def _keys(self) -> tuple[list[Point], int, int]:
        """The points with repetitions: q, p, corners, nodes; how many nodes between x and y, and between all three."""
        x, y, z = corners = self._corners()
        gap, width, rows = _abs(x - y), _width(x, y, z), self._per_row()
        line = _line(x, y) if _any(gap < _REACH) and (rows or width > 0) else []
        triangle = _triangle(x, y, z) if _any(width < _REACH) else []
        if rows:  # those that do without the nodes have nothing new there
            line = [torch.where(gap < _REACH, at, x) for at in line]
            triangle = [torch.where(width < _REACH, at, x) for at in triangle]
        c = self._orders()[1]
        points = [Point(student=c - at, teacher=at) for at in (*corners, *line, *triangle)]
        points[:3] = (point._replace(given=rows) for point in points[:3])
        return [Q, P, *points], len(line), len(triangle)

    def points(self) -> tuple[Point, ...]:
        return tuple(dict.fromkeys(self._keys()[0]))  # each once

    def value(self, *moments: Any) -> Any:
        keys, lines, triangles = self._keys()
        found = dict(zip(dict.fromkeys(keys), moments, strict=True))
        q, p, *nodes = (found[key] for key in keys)
        middle, inner = nodes[3 : 3 + lines], nodes[3 + lines :]
        corners, c = self._corners(), self._orders()[1]
        if self._per_row():
            corners, c = [m.teacher for m in nodes[:3]], nodes[0].teacher + nodes[0].student
        x, y, z = corners

        def log_f(m, at):
            return m.lse - _times(at, p.lse) - _times(c - at, q.lse)

        def quotient(at):
            return tape.expm1(logs[at] - logs[1]) / _not_0(corners[at] - y)

        def choose(width, center, quadrature, otherwise):
            """Quadrature where it is nearer, or all that there is."""
            square = _square(center, q, p)

            def close():
                return tape.where(_smooth(width, square, self.resolution), quadrature, otherwise())

            return _where(width > 0, lambda: _where(width < _REACH, close, otherwise), lambda: quadrature)

        first: Any = None
        logs = [log_f(m, at) for m, at in zip(nodes[:3], corners, strict=True)]
        if lines:
            terms = zip(middle, _line(x, y), _GAUSS, strict=True)
            slope = sum(w * tape.exp(log_f(m, at) - logs[1]) * _derivative(m, q, p) for m, at, (_, w) in terms)
            first = choose(_abs(x - y), middle[1], slope, lambda: quotient(0))
        elif self._per_row() or x != y:
            first = quotient(0)

        def value():
            return tape.exp(logs[1]) * (first - quotient(2)) / _not_0(x - z)

        if triangles:
            terms = zip(inner, _triangle(x, y, z), _RADON, strict=True)
            curve = sum(w * tape.exp(log_f(m, at)) * _square(m, q, p) for m, at, (_, w) in terms) / 2
            total = choose(_width(x, y, z), inner[0], curve, value)
        else:
            total = value()
        for at, log in zip(corners, logs, strict=True):  # of an impossible class infinite, and so is all of it
            total = _blown(at, log, _blown(c - at, log, total))
        return total


def _line(x, y) -> list:
    return [x + (y - x) * at for at, _ in _GAUSS]


def _triangle(x, y, z) -> list:
    return [i * x + j * y + k * z for (i, j, k), _ in _RADON]


# What follows takes numbers, for which it decides at once, and traced values and tensors, which have one for each row.


def _where(condition, yes, no):
    return (yes() if condition else no()) if isinstance(condition, bool) else tape.where(condition, yes(), no())


def _any(condition) -> bool:
    return condition if isinstance(condition, bool) else bool(condition.any())


def _abs(x) -> Any:
    return _where(x > 0, lambda: x, lambda: -x)


def _width(x, y, z) -> Any:
    return (_abs(x - y) + _abs(y - z) + _abs(x - z)) / 2


def _not_0(x):
    """x, or anything where it is 0: a quotient that is not taken."""
    return x if isinstance(x, REAL) else tape.where(x > 0, x, tape.where(x < 0, x, 1.0))


def _times(weight, x):
    """A coefficient of 0 leaves its row out of the slope as well."""
    return (weight * x if weight else 0.0) if isinstance(weight, REAL) else tape.times(weight, x)


def _blown(coefficient, log, value):
    """A negative power of an impossible class is infinite."""
    return _where(coefficient < 0, lambda: tape.where(log > 1e300, math.inf, value), lambda: value)


class RenyiLoss(Loss):
    """`log(sum_i p_i^alpha q_i^(1 - alpha)) / (alpha - 1)`: a Jensen gap of the log-partition. [Renyi 1961]

    Args:
        alpha: order > 0; 1 is KL(p || q). Near 1, quadrature of the derivative stands for the quotient.
    """

    def __init__(self, alpha: float = 0.5, **options: Any) -> None:
        super().__init__(**options)
        self.alpha = alpha

    def check(self) -> None:
        check_number("alpha", self.alpha, above=0)

    def _nodes(self) -> list[tuple[float, float]]:
        near = 0 < abs(self.alpha - 1) < _REACH
        return [(1 + (self.alpha - 1) * at, weight) for at, weight in _GAUSS] if near else []

    def _at(self, order: float) -> Point:
        return Point(student=1 - order, teacher=order)

    def points(self) -> tuple[Point, ...]:
        return tuple(dict.fromkeys([Q, P, self._at(self.alpha), *(self._at(order) for order, _ in self._nodes())]))

    def value(self, *moments: Any) -> Any:
        found = dict(zip(self.points(), moments, strict=True))
        q, p, own = found[Q], found[P], found[self._at(self.alpha)]
        if self.alpha == 1:
            return _derivative(p, q, p)
        nodes = [(found[self._at(order)], weight) for order, weight in self._nodes()]
        quotient = (own.lse - self.alpha * p.lse - (1 - self.alpha) * q.lse) / (self.alpha - 1)
        if not nodes:
            return quotient
        near = sum(weight * _derivative(m, q, p) for m, weight in nodes)
        smooth = _smooth(self.alpha - 1, _square(nodes[1][0], q, p), self.resolution)
        return tape.where(p.s > -math.inf, tape.where(smooth, near, quotient), quotient)
