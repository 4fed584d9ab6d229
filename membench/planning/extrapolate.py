"""From a few sizes to any other: bytes are affine in the batch, and polynomials in the sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class NotAlikeError(Exception):
    """What was simulated doesn't follow one rule, so it tells nothing of what wasn't."""


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
