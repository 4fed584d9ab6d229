"""A plan's peak at any batch and sequence: the highest of a few polynomials, one for each moment that may be it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import isqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from membench.planning.extrapolate import NotAlikeError
from membench.planning.spread import Point, Spread
from reports.parts import FIELDS

Bytes = NDArray[np.int64]
_NEAR = 64  # bytes: rounding of floats while the highest moments are looked for
_HALF_A_BYTE = 0.5  # the same of differences


@dataclass(frozen=True)
class Summit:
    """A moment that is the peak at some batches and sequences.

    Attributes:
        phase: of the step.
        parts: by part, its coefficients: see `coefficients`.
    """

    phase: str
    parts: tuple[tuple[int, ...], ...]

    @cached_property
    def whole(self) -> tuple[int, ...]:
        """The coefficients of the sum of all parts."""
        return tuple([sum(of_one) for of_one in zip(*self.parts, strict=True)])


class Mountains:
    """All moments of a plan, whose bytes are polynomials in batch and sequence."""

    def __init__(self, spread: Spread):
        self._spread = spread
        replay, trace = spread.replay, spread.trace
        made = replay.sign > 0
        sizes = np.asarray(spread.sizes, dtype=np.int64)
        changes = sizes[replay.index] * replay.sign[:, None]  # (events, points)
        parts = np.asarray(trace.parts)[replay.index]
        levels = [np.where((parts == part)[:, None], changes, 0).cumsum(0)[made] for part in range(len(FIELDS))]
        self._bytes: Bytes = np.stack(levels, 1)  # (moments, parts, points)
        self._curves = _curves(spread, np.unique(self._bytes.sum(1), axis=0))
        self._phases = [trace.phases[index] for index in replay.index[made].tolist()]

    def summits(self, first: Point, last: Point) -> list[Summit]:
        """The moments that are the peak at some batch and sequence from `first` to `last`, in order of time."""
        points = [first, last]
        while True:
            found = self._highest(points)
            missed = _above(self._curves, np.array([one.whole for one in found], dtype=float), first, last)
            if missed is None or missed in points:
                return found
            points.append(missed)

    def _highest(self, points: Sequence[Point]) -> list[Summit]:
        """Those that are the peak at some of `points`."""
        weigh = _matrix(self._spread, points)  # (points, known points)
        totals = weigh @ self._bytes.sum(1).T  # (points, moments)
        near = totals >= totals.max(1, keepdims=True) - _NEAR
        places = np.flatnonzero(near.any(0))
        _, first, like = np.unique(self._bytes[places], axis=0, return_index=True, return_inverse=True)
        high = {place: self._summit(place) for place in sorted(places[first].tolist())}
        same = dict(zip(places.tolist(), places[first][like.reshape(-1)].tolist(), strict=True))
        found = set()
        for point, candidates in zip(points, near, strict=True):
            moments = sorted({same[place] for place in np.flatnonzero(candidates).tolist()})
            exact = {place: value_at(high[place].whole, point) for place in moments}
            found.add(max(exact, key=lambda place: exact[place]))  # the first of the highest
        return [high[place] for place in sorted(found)]

    def _summit(self, place: int) -> Summit:
        given = self._bytes[place].tolist()
        return Summit(self._phases[place], tuple([coefficients(self._spread, row) for row in given]))


def coefficients(spread: Spread, given: Sequence[int]) -> tuple[int, ...]:
    """Of 1, s, s² and (but for batches of one) b, bs, bs²: bytes of b sequences of s tokens.

    Args:
        spread: it tells at which points.
        given: bytes at them.

    Raises:
        NotAlikeError: the coefficients aren't whole numbers.
    """
    found = _polynomial(spread, [Fraction(value) for value in given])
    if any(number.denominator > 1 for number in found):
        raise NotAlikeError("what is allocated isn't a polynomial with whole numbers")
    return tuple(map(int, found))


def value_at(numbers: Sequence[int], point: Point) -> int:
    """The value of the polynomial with these coefficients."""
    b, s = point
    return sum(map(int.__mul__, numbers, (1, s, s * s, b, b * s, b * s * s)))


def peak_bytes(summits: Sequence[Summit], point: Point) -> int:
    """The highest of them."""
    return max(value_at(summit.whole, point) for summit in summits)


def _curves(spread: Spread, given: Bytes) -> Any:
    """As `coefficients`, (curves, terms), of many polynomials at once: as floats, which hold whole bytes exactly."""
    return np.stack(_polynomial(spread, list(given.T.astype(float))), -1)


def _polynomial(spread: Spread, given: Sequence[Any]) -> list[Any]:
    """The coefficients, in order, of the polynomial with these values, numbers or arrays of them, at known points."""
    batches, count = spread.batches, len(spread.sequences)
    rows = [_parabola(spread.sequences, given[i : i + count]) for i in range(0, len(given), count)]
    if len(batches) == 1:
        return rows[0]
    slopes = [(other - one) / (batches[1] - batches[0]) for one, other in zip(*rows, strict=True)]
    return [*(one - batches[0] * slope for one, slope in zip(rows[0], slopes, strict=True)), *slopes]


def _parabola(xs: Sequence[int], values: Sequence[Any]) -> list[Any]:
    """The coefficients of 1, x and x² of the polynomial with `values` at three `xs`, by divided differences."""
    (x0, x1, x2), (y0, y1, y2) = xs, values
    first = (y1 - y0) / (x1 - x0)
    second = ((y2 - y1) / (x2 - x1) - first) / (x2 - x0)
    return [y0 - first * x0 + second * x0 * x1, first - second * (x0 + x1), second]


def _above(curves: Any, known: Any, first: Point, last: Point) -> Point | None:
    """A batch and a sequence from `first` to `last` where one of the curves is above all `known` ones; None if none is.

    By halves: within bounds, a difference of two curves is at most what its terms are, each where it is largest.
    """
    boxes = [(first, last, curves)]
    while boxes:
        low, high, curves = boxes.pop()
        least, most = (_terms(point)[: known.shape[1]] for point in (low, high))
        over = curves[:, None] - known  # (curves, known, terms)
        curves = curves[np.maximum(over * least, over * most).sum(2).min(1) > _HALF_A_BYTE]
        for point, terms in ((low, least), (high, most)):
            if len(curves) and (curves @ terms).max() > (known @ terms).max() + _HALF_A_BYTE:
                return point
        if len(curves) and low != high:
            boxes += [(*half, curves) for half in _halves(low, high)]
    return None


def _halves(low: Point, high: Point) -> list[tuple[Point, Point]]:
    """The two halves of what is between, along what grows more."""
    if high.batch * low.sequence > high.sequence * low.batch:
        middle = isqrt(low.batch * high.batch)
        return [(low, Point(middle, high.sequence)), (Point(middle + 1, low.sequence), high)]
    middle = isqrt(low.sequence * high.sequence)
    return [(low, Point(high.batch, middle)), (Point(low.batch, middle + 1), high)]


def _terms(point: Point) -> Any:
    b, s = point
    return np.array([1, s, s * s, b, b * s, b * s * s], dtype=float)


def _matrix(spread: Spread, points: Sequence[Point]) -> Any:
    """The weights of the values at the known points in those at `points`."""

    def lagrange(xs: Sequence[int], at: int) -> list[float]:
        return [float(np.prod([(at - other) / (x - other) for other in xs if other != x])) for x in xs]

    return np.array(
        [
            [one * other for one in lagrange(spread.batches, b) for other in lagrange(spread.sequences, s)]
            for b, s in points
        ]
    )
