"""Divergences whose formula is a difference quotient: where its arguments meet, quadrature takes its place.

The functions of the order, log sum_i p_i^x q_i^(1 - x) and its like, are smooth: a quotient of close values loses the
digits that a mean of derivatives at a few points between them keeps.
"""

from __future__ import annotations

import math

from . import tape
from .loss import Loss, Moment, Point
from .options import check_number

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
    """-sum_i [p_i^a q_i^b - a/(a+b) p_i^(a+b) - b/(a+b) q_i^(a+b)] / (a b). [Cichocki et al. 2011; Wang et al. 2025]

    With its limits at a = 0, b = 0, a + b = 0 and a = b = 0. (1, 0) is KL(p || q), (0, 1) KL(q || p),
    (1, 1) half the squared distance, (1/2, 1/2) four times the squared Hellinger distance.
    It is the divided difference f[0, a, a + b] of f(x) = sum_i p_i^x q_i^(a + b - x); where arguments are close or
    equal, quadrature of f' or f'' stands for the difference quotients.

    Args:
        alpha, beta: any finite numbers; the paper's language models use 0.2 and 0.7.
    """

    def __init__(self, alpha: float = 0.2, beta: float = 0.7, **options):
        super().__init__(**options)
        self.alpha, self.beta = alpha, beta

    def check(self):
        check_number("alpha", self.alpha)
        check_number("beta", self.beta)

    def _arguments(self) -> tuple[float, float, float]:
        """x, y, z: the nearest two in front if they are close, and never the mixture's in the middle."""
        a, c = self.alpha, self.alpha + self.beta
        orders = (a, c, 0.0), (a, 0.0, c), (c, 0.0, a)
        nearest = min(orders, key=lambda order: abs(order[0] - order[1]))
        return nearest if abs(nearest[0] - nearest[1]) < _REACH else orders[0]

    def _nodes(self) -> tuple[dict[float, float], dict[float, float]]:
        """argument: weight of the quadrature of f' over (x, y), and of f'' over (x, y, z)."""
        x, y, z = self._arguments()
        line, triangle = {}, {}
        if abs(x - y) < _REACH:
            line = _merged((x + (y - x) * at, weight) for at, weight in _GAUSS)
        if max(x, y, z) - min(x, y, z) < _REACH:
            triangle = _merged((i * x + j * y + k * z, weight) for (i, j, k), weight in _RADON)
        return ({} if x == y == z else line), triangle

    def _at(self, x: float) -> Point:
        return Point(student=self.alpha + self.beta - x, teacher=x)

    def points(self):
        arguments = [*self._arguments(), *(x for nodes in self._nodes() for x in nodes)]
        return tuple(dict.fromkeys([Q, P, *map(self._at, arguments)]))  # each once

    def value(self, *moments):
        x, y, z = self._arguments()
        c = self.alpha + self.beta
        line, triangle = self._nodes()
        found = dict(zip(self.points(), moments, strict=True))
        q, p = found[Q], found[P]

        def log_f(x):  # a coefficient of 0 leaves its row out of the slope as well
            own = found[self._at(x)].lse
            own = own - x * p.lse if x else own
            return own - (c - x) * q.lse if c - x else own

        def quotient(x):
            return tape.expm1(log_f(x) - log_f(y)) / (x - y)

        def choose(width, center, quadrature, otherwise):
            square = _square(found[self._at(center)], q, p)
            return tape.where(_smooth(width, square, self.resolution), quadrature, otherwise)

        if line:
            first = sum(w * tape.exp(log_f(at) - log_f(y)) * _derivative(found[self._at(at)], q, p)
                        for at, w in line.items())  # fmt: skip
            first = first if x == y else choose(x - y, list(line)[1], first, quotient(x))
        elif x != y:
            first = quotient(x)
        if z != y:
            value = tape.exp(log_f(y)) * (first - quotient(z)) / (x - z)
        if triangle:
            second = sum(w * tape.exp(log_f(at)) * _square(found[self._at(at)], q, p) for at, w in triangle.items()) / 2
            width = max(x, y, z) - min(x, y, z)
            value = second if width == 0 else choose(width, next(iter(triangle)), second, value)
        for corner in (x, y, z):
            if min(self._at(corner)[:2]) < 0:  # of an impossible class infinite, and so is all of it
                value = tape.where(log_f(corner) > 1e300, math.inf, value)
        return value


def _merged(nodes) -> dict[float, float]:
    weights: dict[float, float] = {}
    for at, weight in nodes:
        weights[at] = weights.get(at, 0.0) + weight
    return weights


class RenyiLoss(Loss):
    """log(sum_i p_i^alpha q_i^(1 - alpha)) / (alpha - 1): a Jensen gap of the log-partition. [Renyi 1961]

    Args:
        alpha: order > 0; 1 is KL(p || q). Near 1, quadrature of the derivative stands for the quotient.
    """

    def __init__(self, alpha: float = 0.5, **options):
        super().__init__(**options)
        self.alpha = alpha

    def check(self):
        check_number("alpha", self.alpha, above=0)

    def _nodes(self) -> dict[float, float]:
        return _merged((1 + (self.alpha - 1) * at, w) for at, w in _GAUSS) if abs(self.alpha - 1) < _REACH else {}

    def _at(self, order: float) -> Point:
        return Point(student=1 - order, teacher=order)

    def points(self):
        return tuple(dict.fromkeys([Q, P, *map(self._at, [self.alpha, *self._nodes()])]))

    def value(self, *moments):
        found = dict(zip(self.points(), moments, strict=True))
        q, p, own = found[Q], found[P], found[self._at(self.alpha)]
        nodes = self._nodes()
        near = sum(w * _derivative(found[self._at(order)], q, p) for order, w in nodes.items())
        if self.alpha == 1:
            return near
        quotient = (own.lse - self.alpha * p.lse - (1 - self.alpha) * q.lse) / (self.alpha - 1)
        if not nodes:
            return quotient
        square = _square(found[self._at(list(nodes)[1])], q, p)
        smooth = _smooth(self.alpha - 1, square, self.resolution)
        return tape.where(p.s > -math.inf, tape.where(smooth, near, quotient), quotient)
