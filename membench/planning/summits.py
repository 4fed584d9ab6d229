"""A plan's peak at any batch and sequence: the highest of a few polynomials, one for each moment that may be it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from membench.memory.allocator import reserved_bytes
from membench.planning.extrapolate import NotAlikeError
from membench.planning.moments import Key
from membench.planning.replay import Places
from membench.planning.spread import Point, Spread
from reports.parts import FIELDS

Bytes = NDArray[np.int64]
Name = tuple[Key, int]  # of a moment, and which of those with one key
_NEAR = 64  # bytes: rounding of floats while the highest moments are looked for


@dataclass(frozen=True)
class Summit:
    """A moment that is the peak at some batches and sequences.

    Attributes:
        phase: of the step.
        parts: by part, the coefficients of 1, s, s² and (but for batches of one) b, bs, bs²: bytes of b sequences
            of s tokens.
    """

    phase: str
    parts: tuple[tuple[Fraction, ...], ...]

    @cached_property
    def whole(self) -> tuple[Fraction, ...]:
        """The coefficients of the sum of all parts."""
        return tuple([sum(of_one, Fraction()) for of_one in zip(*self.parts, strict=True)])


class Mountains:
    """All moments of a plan, whose bytes are polynomials in batch and sequence.

    Args:
        spread: what its allocations take.
        places: of its simulations, see `replay.places_of`.
        depth: of the model.

    Raises:
        NotAlikeError: the depths don't follow one rule.
    """

    def __init__(self, spread: Spread, places: Sequence[Places], depth: int):
        self._spread = spread
        depths = [one.depth for one in spread.simulations]
        tables = [_moments(spread, number, known) for number, known in enumerate(places)]
        shared = [key for key in tables[-1] if all(key in table for table in tables)]
        stacked = [np.stack([table[key] for key in shared]) for table in tables]  # (keys, parts, points)
        regular = np.ones(len(shared), dtype=bool)
        bytes_ = stacked[0]
        if len(tables) == 3:
            (a, b, c), (first, second, third) = stacked, depths
            regular = ((b - a) * (third - first) == (c - a) * (second - first)).all((1, 2))
            bytes_ = a + (c - a) * (depth - first) // (third - first)
        if not regular.any():
            raise NotAlikeError("no two depths have moments in common")
        self._names = [key for key, kept in zip(shared, regular, strict=True) if kept]
        self._bytes: Bytes = bytes_[regular]
        known = set(self._names)
        self._others = [
            np.stack([table[key] for key in table if key not in known] or [np.zeros_like(bytes_[0])]).sum(1)
            for table in tables
        ]
        self._depths, self._depth = depths, depth

    def summits(self, points: Sequence[Point]) -> list[Summit]:
        """The moments that are the peak at some of `points`, in order of time."""
        weigh = _matrix(self._spread, points)  # (points, known points)
        totals = weigh @ self._bytes.sum(1).T  # (points, keys)
        self._check_others(weigh, totals.max(1))
        near = totals >= totals.max(1, keepdims=True) - _NEAR
        high = {key: self._summit(key) for key in np.flatnonzero(near.any(0)).tolist()}
        found = set()
        for point, candidates in zip(points, near, strict=True):
            exact = {key: value_at(high[key].whole, point) for key in np.flatnonzero(candidates).tolist()}
            found.add(max(exact, key=lambda key: exact[key]))  # the first of the highest
        return [high[key] for key in sorted(found)]

    def _summit(self, key: int) -> Summit:
        return Summit(self._names[key][0].phase, tuple([self._coefficients(row) for row in self._bytes[key]]))

    def _check_others(self, weigh: Any, peaks: Any) -> None:
        """See `extrapolate.extend_depth`."""
        if len(self._depths) == 1:
            return
        rest = [(weigh @ rows.T).max(1) for rows in self._others]
        slope = np.maximum(0.0, (rest[2] - rest[1]) / (self._depths[2] - self._depths[1]))
        if (rest[2] + slope * (self._depth - self._depths[2]) > peaks + 1).any():
            raise NotAlikeError("a maximum is at a moment whose sizes aren't on a line")

    def _coefficients(self, given: Bytes) -> tuple[Fraction, ...]:
        batches, sequences = self._spread.batches, self._spread.sequences
        values = [int(value) for value in given]
        rows = [newton(sequences, values[i : i + len(sequences)]) for i in range(0, len(values), len(sequences))]
        if len(batches) == 1:
            return tuple(rows[0])
        slopes = [(other - one) / (batches[1] - batches[0]) for one, other in zip(*rows, strict=True)]
        return (*(one - batches[0] * slope for one, slope in zip(rows[0], slopes, strict=True)), *slopes)


def value_at(coefficients: Sequence[Fraction | int], point: Point) -> Fraction:
    """A polynomial's value."""
    b, s = point
    terms = (1, s, s * s, b, b * s, b * s * s)
    return Fraction(sum(c * term for c, term in zip(coefficients, terms, strict=False)))


def peak_bytes(summits: Sequence[Summit], point: Point) -> int:
    """The highest of them."""
    return max(int(value_at(summit.whole, point)) for summit in summits)


def surplus_bytes(spread: Spread, point: Point) -> int:
    """What the allocator would reserve beyond the peak."""
    found = []
    for one, gone, sizes in zip(spread.simulations, spread.dropped, spread.at(point), strict=True):
        events = np.asarray(one.trace.events, dtype=np.int64)
        index = np.where(events < 0, ~events, events)
        if gone:
            kept = ~np.isin(index, list(gone))
            events, index = events[kept], index[kept]
        taken = np.asarray(sizes, dtype=np.int64)[index]
        peak = int(np.where(events < 0, -taken, taken).cumsum().max())
        found.append(reserved_bytes(events.tolist(), sizes) - peak)
    return max(found)


def newton(xs: Sequence[int], values: Sequence[int]) -> list[Fraction]:
    """The coefficients of 1, x and x² of the polynomial with `values` at three `xs`."""
    (x0, x1, x2), (y0, y1, y2) = xs, values
    first = Fraction(y1 - y0, x1 - x0)
    second = (Fraction(y2 - y1, x2 - x1) - first) / (x2 - x0)
    return [y0 - first * x0 + second * x0 * x1, first - second * (x0 + x1), second]


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


def _moments(spread: Spread, number: int, places: Places) -> dict[Name, Bytes]:
    """By name, the bytes of each part (parts, known points) at a moment, in order of time."""
    one, gone = spread.simulations[number], spread.dropped[number]
    events = np.asarray(one.trace.events, dtype=np.int64)
    index = np.where(events < 0, ~events, events)
    sizes = np.asarray(spread.sizes[number], dtype=np.int64)
    change = np.where((events < 0)[:, None], -sizes[index], sizes[index])  # (events, points)
    parts = np.asarray(one.trace.parts)[index]
    levels = np.stack([np.cumsum(np.where((parts == part)[:, None], change, 0), 0) for part in range(len(FIELDS))], 1)
    totals = levels.sum(1)
    found: dict[Name, int] = {}
    for key, everywhere in places.items():
        positions = [position for position in everywhere if int(events[position]) not in gone]
        if positions:
            found |= _highest(key, positions, totals[positions].argmax(0))
    return {name: levels[found[name]] for name in sorted(found, key=lambda name: found[name])}


def _highest(key: Key, positions: Sequence[int], highest: NDArray[np.intp]) -> dict[Name, int]:
    """Of the moments with one key, those that are the highest of them at a known point: mostly one.

    Several are numbered from the nearer end, since a deeper model has more of them.
    """
    numbers = sorted(set(highest.tolist()))
    if len(numbers) == 1:
        return {(key, 0): positions[numbers[0]]}
    return {(key, n + 1 if n < len(positions) / 2 else n - len(positions)): positions[n] for n in numbers}
