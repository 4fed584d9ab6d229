"""From a few depths to any other: bytes are affine in the depth, once layers repeat, and in the batch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import compress
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from membench.planning.moments import Key, Moment, Moments
from reports.parts import FIELDS

Bytes = NDArray[np.int64]
Table = dict[str, dict[str, int]]  # bytes of each part, by name


class NotAlikeError(Exception):
    """The simulated depths don't follow one rule, so they can't be extrapolated."""


class Weights(NamedTuple):
    """Weights of the values at some points in their interpolating polynomial at another point (Lagrange): fractions."""

    numerators: tuple[int, ...]
    denominator: int

    def apply(self, values: Sequence[int]) -> int:
        """The polynomial's value, rounded if it isn't a whole number."""
        return round_ratio(sum(map(int.__mul__, self.numerators, values)), self.denominator)


def weights(xs: Sequence[int], at: int) -> Weights:
    """The weights of the values at `xs`, all different, for the value at `at`."""
    above = [math.prod(at - other for other in (*xs[:i], *xs[i + 1 :])) for i in range(len(xs))]
    below = [math.prod(x - other for other in (*xs[:i], *xs[i + 1 :])) for i, x in enumerate(xs)]
    common = math.lcm(*below)
    return Weights(tuple(a * (common // b) for a, b in zip(above, below, strict=True)), common)


def round_ratio(numerator: int, denominator: int) -> int:
    """A ratio rounded to the nearest whole number, halves upwards."""
    return (2 * numerator + denominator) // (2 * denominator)


def extend_depth(depths: Sequence[int], profiles: Sequence[Moments], at: int) -> Moments:
    """The profile at depth `at` from three others, in which all moments that matter are linear in the depth.

    What the allocator reserves beyond the peak follows no rule in the depth; the largest value is used.

    Raises:
        NotAlikeError: a nonlinear moment determines a maximum of a part or of the whole, or might at depth `at`.
    """
    shared = [key for key in profiles[-1].moments if all(key in one.moments for one in profiles[:-1])]
    first, second, third = (_sizes(one, shared) for one in profiles)
    linear = (_extended(depths[:2], (first, second), depths[2]) == third).all(1)
    if not linear.any():
        raise NotAlikeError("no two depths have moments in common")
    extended = _extended(depths[::2], (first, third), at)[linear]
    regular = dict(zip(compress(shared, linear), extended.tolist(), strict=True))
    others = [_sizes(one, [key for key in one.moments if key not in regular]).max(0, initial=0) for one in profiles]
    slope = np.maximum(0.0, (others[2] - others[1]) / (depths[2] - depths[1]))  # neither end of the model affects it
    if (others[2] + slope * (at - depths[2]) > extended.max(0)).any():
        raise NotAlikeError("a maximum is at a moment whose sizes aren't on a line")
    positions = profiles[-1].moments
    moments = {key: Moment(tuple(sizes), positions[key].position) for key, sizes in regular.items()}
    return Moments(moments, max(one.surplus_bytes for one in profiles))


def _sizes(profile: Moments, keys: Sequence[Key]) -> Bytes:
    """The sizes (keys, parts) of some moments."""
    return np.array([profile.moments[key].sizes for key in keys], dtype=np.int64).reshape(len(keys), 1 + len(FIELDS))


def _extended(xs: Sequence[int], sizes: Sequence[Bytes], at: int) -> Bytes:
    """The lines through two points at another, as `Weights.apply`."""
    weight = weights(xs, at)
    numerator = sizes[0] * weight.numerators[0] + sizes[1] * weight.numerators[1]
    return (2 * numerator + weight.denominator) // (2 * weight.denominator)


def extend_tables(depths: Sequence[int], tables: Sequence[Mapping[str, Mapping[str, int]]], at: int) -> Table:
    """Sizes by name and part at depth `at`; a name missing at some depth counts as 0 there.

    Raises:
        NotAlikeError: they aren't on lines.
    """
    names = dict.fromkeys(name for table in tables for name in table)
    result: Table = {}
    for name in names:
        parts = next(table[name] for table in tables if name in table)
        columns = {part: [table[name][part] if name in table else 0 for table in tables] for part in parts}
        result[name] = {part: extend_number(depths, values, at) for part, values in columns.items()}
    return result


def extend_number(xs: Sequence[int], values: Sequence[int], at: int) -> int:
    """A whole number on the line through all the values.

    Raises:
        NotAlikeError: they aren't on a line.
    """
    ends = weights((xs[0], xs[-1]), at) if len(xs) > 1 else Weights((1, 0), 1)
    result = ends.apply([values[0], values[-1]])
    for x, value in zip(xs[1:-1], values[1:-1], strict=True):
        if weights((xs[0], xs[-1]), x).apply([values[0], values[-1]]) != value:
            raise NotAlikeError(f"{list(values)} at depths {list(xs)} aren't on a line")
    return result


def extend_text(xs: Sequence[int], texts: Sequence[str], at: int) -> str:
    """A text in which every number is on a line: "layers.3" at 4, "layers.4" at 5 gives "layers.31" at 32.

    Raises:
        NotAlikeError: the texts differ in more than numbers, or these aren't on a line.
    """
    if len({re.sub(r"\d+", "#", text) for text in texts}) > 1:
        raise NotAlikeError(f"{list(texts)} differ in more than their numbers")
    rows = zip(*([int(number) for number in re.findall(r"\d+", text)] for text in texts), strict=True)
    numbers = iter([extend_number(xs, values, at) for values in rows])
    return re.sub(r"\d+", lambda match: str(next(numbers)), texts[0])
