"""The subset of tensors with the largest total size below a limit, exactly."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence


def subset_below(sizes: Sequence[int], items: Sequence[int], limit: int) -> list[int]:
    """Those of `items` with the largest sum of sizes below `limit`; of equal ones the first.

    A bit for each sum that can be reached, in units of the sizes' greatest common divisor: a few hundred tensors of a
    handful of sizes take milliseconds.

    Args:
        sizes: of each item.
        items: indices into `sizes`.
        limit: at least 1.
    """
    unit = math.gcd(*(sizes[i] for i in items)) or 1
    below = (1 << -(-limit // unit)) - 1  # a bit for each multiple of the unit below the limit
    reached, bundles = [1], []
    for bundle in _bundles(sizes, items):
        reached.append((reached[-1] | reached[-1] << sum(sizes[i] for i in bundle) // unit) & below)
        bundles.append(bundle)
    total = reached.pop().bit_length() - 1
    chosen: list[int] = []
    for bundle in reversed(bundles):
        before = reached.pop()
        if not before >> total & 1:
            chosen += bundle
            total -= sum(sizes[i] for i in bundle) // unit
    return _first_of_equal_size(sizes, items, chosen)


def _bundles(sizes: Sequence[int], items: Iterable[int]) -> Iterator[list[int]]:
    """Items of equal size in bundles of 1, 2, 4, ... and the rest: any number of them is a sum of bundles."""
    alike: dict[int, list[int]] = {}
    for i in items:
        alike.setdefault(sizes[i], []).append(i)
    for group in alike.values():
        length = 1
        while group:
            yield group[:length]
            group = group[length:]
            length *= 2


def _first_of_equal_size(sizes: Sequence[int], items: Sequence[int], chosen: Iterable[int]) -> list[int]:
    left = [sizes[i] for i in chosen]
    first = []
    for i in items:
        if sizes[i] in left:
            left.remove(sizes[i])
            first.append(i)
    return first
