"""The traces of a table's methods in few bytes, so that a page can replay them: what the allocator reserves beyond the
peak follows no rule between sizes.

A trace becomes a row of numbers that hold for any batch and sequence: 2k makes an allocation of kind k, whose bytes are
a polynomial in both, and odd ones free one of a kind, named by how many of that kind are newer. Layers then repeat each
other literally, and so do methods: from the second time on, what came before in the table is named instead of written.
"""

from __future__ import annotations

import json
import zlib
from base64 import b64decode, b64encode
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any

from membench.memory.allocator import reserved_bytes
from membench.planning.spread import Point, Spread
from membench.planning.summits import coefficients, value_at

Kind = tuple[tuple[int, ...] | None, tuple[int, ...] | None]  # coefficients: in a batch of one, and in larger ones

_ALIKE = 12  # numbers: a shorter repetition isn't worth to be named
_COMPRESSION = 9


class Traces:
    """The traces of one table."""

    def __init__(self) -> None:
        self._kinds: dict[Kind, int] = {}
        self._frees: dict[tuple[int, int], int] = {}  # a kind, and how many of it are newer
        self._rows: list[str] = []  # numbers as characters: rows of them are quickly looked up and compared

    def add(self, single: Spread, several: Spread) -> tuple[int, int]:
        """Note a method's traces, which may be the same one; their places, of batches of one and of larger ones."""
        if single.trace is several.trace:
            both = zip(_polynomials(single), _polynomials(several), strict=True)
            return (self._add(several, list(both)),) * 2
        one = [(polynomial, None) for polynomial in _polynomials(single)]
        more = [(None, polynomial) for polynomial in _polynomials(several)]
        return self._add(single, one), self._add(several, more)

    def _add(self, spread: Spread, kinds: Sequence[Kind]) -> int:
        numbers = [self._kinds.setdefault(kind, len(self._kinds)) for kind in kinds]
        self._rows.append("".join(map(chr, self._steps(spread.trace.events, numbers))))
        return len(self._rows) - 1

    def _steps(self, events: Sequence[int], kinds: Sequence[int]) -> Iterator[int]:
        left: dict[int, list[int]] = {}  # by kind, the allocations that are there, in order
        for event in events:
            if event >= 0:
                left.setdefault(kinds[event], []).append(event)
                yield 2 * kinds[event]
            else:
                alike = left[kinds[~event]]
                place = bisect_left(alike, ~event)
                free = kinds[~event], len(alike) - 1 - place
                yield 2 * self._frees.setdefault(free, len(self._frees)) + 1
                del alike[place]

    def packed(self) -> str:
        """All of them: JSON, deflated, in base64.

        kinds: of allocations, the coefficients of 1, s, s² in a batch of one, and of 1, s, s², b, bs, bs² in b of them;
            without zeros at the end, and null where there is no such allocation.
        frees: [k, n], for each odd number: an allocation of kind k is freed that n of its kind are newer than.
        lengths: of the traces.
        steps: the numbers of all of them in a row; -n and d stand for n numbers, the same as those d before.
        """
        document = {
            "kinds": list(self._kinds),
            "frees": list(self._frees),
            "lengths": [len(row) for row in self._rows],
            "steps": list(_named("".join(self._rows))),
        }
        text = json.dumps(document, separators=(",", ":"))
        return b64encode(zlib.compress(text.encode(), _COMPRESSION)).decode()


def _polynomials(spread: Spread) -> list[tuple[int, ...] | None]:
    """Of each allocation; None if it isn't made."""
    known = {given: trimmed(coefficients(spread, given)) for given in set(spread.sizes)}
    return [None if index in spread.dropped else known[given] for index, given in enumerate(spread.sizes)]


def trimmed(numbers: Sequence[int]) -> tuple[int, ...]:
    """Without zeros at the end."""
    last = max((place for place, number in enumerate(numbers) if number), default=-1)
    return tuple(numbers[: last + 1])


def _named(steps: str) -> Iterator[int]:
    """The numbers, with the length and the distance instead of any that came before."""
    known: dict[str, int] = {}
    here = 0
    while here < len(steps):
        before = known.get(steps[here : here + _ALIKE])
        known[steps[here : here + _ALIKE]] = here
        if before is None:
            yield ord(steps[here])
            here += 1
        else:
            same = _in_common(steps, before, here)
            yield -same
            yield here - before
            here += same


def _in_common(text: str, one: int, other: int) -> int:
    """How many characters are the same from two places on; `other` is the later one."""
    same, step = 0, _ALIKE
    while step:
        end = other + same + step
        if end <= len(text) and text[one + same : one + same + step] == text[other + same : end]:
            same, step = same + step, 2 * step
        else:
            step //= 2
    return same


class Unpacked:
    """The traces of a packed table, as the page's script reads them."""

    def __init__(self, packed: str):
        read: dict[str, Any] = json.loads(zlib.decompress(b64decode(packed)))
        self._kinds: list[list[list[int] | None]] = read["kinds"]
        self._frees: list[tuple[int, int]] = read["frees"]
        numbers = iter(read["steps"])
        steps: list[int] = []
        for number in numbers:
            if number >= 0:
                steps.append(number)
            else:
                start = len(steps) - next(numbers)
                for place in range(start, start - number):
                    steps.append(steps[place])
        ends = [sum(read["lengths"][: place + 1]) for place in range(len(read["lengths"]))]
        self._rows = [steps[end - length : end] for end, length in zip(ends, read["lengths"], strict=True)]

    def reserved_bytes(self, traces: Sequence[int], point: Point) -> int:
        """What the allocator reserves for a method, whose `traces` `Traces.add` has told."""
        several = int(point.batch > 1)
        kinds = [None if kind[several] is None else value_at(kind[several] or (), point) for kind in self._kinds]
        left: list[list[int]] = [[] for _ in kinds]
        sizes: list[int | None] = []
        events = []
        for step in self._rows[traces[several]]:
            if step % 2:
                kind, newer = self._frees[step // 2]
                index = left[kind].pop(-1 - newer)
            else:
                index = len(sizes)
                left[step // 2].append(index)
                sizes.append(kinds[step // 2])
            if sizes[index] is not None:
                events.append(~index if step % 2 else index)
        return reserved_bytes(events, [size or 0 for size in sizes])
