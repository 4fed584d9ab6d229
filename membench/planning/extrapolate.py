"""From a few depths to any other: bytes are affine in the depth, once layers repeat, and in the batch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from membench.planning.moments import Key, Moment, Moments

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


def extend_profiles(xs: Sequence[int], profiles: Sequence[Moments], at: int) -> Moments:
    """The profile at `at`, with the moments that all `profiles` have in common.

    What the allocator reserves beyond the peak follows no rule in the depth; the largest value is used.
    """
    weight = weights(xs, at)
    moments = {}
    for key in profiles[-1].moments:
        if all(key in one.moments for one in profiles):
            rows = zip(*(one.moments[key].sizes for one in profiles), strict=True)
            moments[key] = Moment(tuple([weight.apply(values) for values in rows]), profiles[-1].moments[key].position)
    return Moments(moments, max(one.surplus_bytes for one in profiles))


def extend_depth(depths: Sequence[int], profiles: Sequence[Moments], at: int) -> Moments:
    """The profile at depth `at` from three others, in which all moments that matter are linear in the depth.

    Raises:
        NotAlikeError: a nonlinear moment determines a maximum of a part or of the whole, or might at depth `at`.
    """
    predicted, seen = extend_profiles(depths[:2], profiles[:2], depths[2]).moments, profiles[2].moments
    regular = {key for key, moment in predicted.items() if key in seen and moment.sizes == seen[key].sizes}
    if not regular:
        raise NotAlikeError("no two depths have moments in common")
    extended = extend_profiles(depths[::2], profiles[::2], at).moments
    result = Moments({key: extended[key] for key in extended if key in regular}, max(p.surplus_bytes for p in profiles))
    for part in range(len(next(iter(profiles[0].moments.values())).sizes)):
        others = [_maximum(one, part, without=regular) for one in profiles]
        if _onwards(depths, others, at) > result.maximum(part):
            raise NotAlikeError("a maximum is at a moment whose sizes aren't on a line")
    return result


def _maximum(profile: Moments, part: int, *, without: set[Key]) -> int:
    return max((moment.sizes[part] for key, moment in profile.moments.items() if key not in without), default=0)


def _onwards(xs: Sequence[int], values: Sequence[int], at: int) -> float:
    """A bound for values that aren't on a line: extended from the last two, which neither end of the model affects."""
    slope = max(0.0, (values[-1] - values[-2]) / (xs[-1] - xs[-2]))
    return values[-1] + slope * (at - xs[-1])


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
