"""What the allocator reserves beyond a plan's peak: at usual sizes, and how far from what they tell it is elsewhere."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence

from membench.planning.cards import CARDS
from membench.planning.spread import LEAST, Point, Spread
from membench.planning.summits import Summit, peak_bytes

PLANNED_BATCHES = (1, 2, 4, 8, 16, 32, 64)
PLANNED_SEQUENCES = (128, 256, 512, 1024, 2048, 4096, 8192, 16_384)
TRIED = 12  # other sizes of each method, drawn by chance
_DRAWN = 60  # at most, to find as many that a card may hold

Found = tuple[Spread, Sequence[Summit]]


class Surplus:
    """The surplus of one method on one model.

    Args:
        single: of batches of one: what allocations take, and the moments that are the peak.
        several: the same of all other batches.
        sequences: the usual ones.
        longest: the longest of all.
    """

    def __init__(self, single: Found, several: Found, sequences: Sequence[int], longest: int):
        self._single, self._several = single, several
        self._sequences, self._longest = sequences, longest
        self.table = [[self._at(Point(batch, tokens)) for tokens in sequences] for batch in PLANNED_BATCHES]

    def between(self, seed: str) -> tuple[float, float]:
        """By how much more than the share of the peak that usual sizes around tell: mostly, and at most.

        Usual sizes are multiples of what an allocator rounds to, others aren't. Of `TRIED` sizes drawn by chance.
        """
        draw, more = random.Random(seed), list[float]()
        for _ in range(_DRAWN):
            if len(more) == TRIED:
                break
            batch = round(PLANNED_BATCHES[-1] ** draw.random())
            point = Point(batch, round(LEAST * (self._longest / LEAST) ** draw.random()))
            told, found = self._told(point), self._at(point)
            if told is not None and found is not None:
                more.append(found / self._peak(point) - told)
        return (round(statistics.median(more), 4), round(max(more), 4)) if more else (0.0, 0.0)

    def _told(self, point: Point) -> float | None:
        """The share of the peak, between those at the planned sizes around, on logarithmic scales; None without any."""
        near = [
            (found / self._peak(Point(batch, tokens)), of_batch * of_tokens)
            for batch, of_batch in around(PLANNED_BATCHES, point.batch)
            for tokens, of_tokens in around(self._sequences, point.sequence)
            if (found := self._planned(batch, tokens)) is not None
        ]
        total = sum(weight for _, weight in near)
        return sum(share * weight for share, weight in near) / total if total else None

    def _planned(self, batch: int, tokens: int) -> int | None:
        return self.table[PLANNED_BATCHES.index(batch)][self._sequences.index(tokens)]

    def _of(self, point: Point) -> Found:
        return self._single if point.batch == 1 else self._several

    def _peak(self, point: Point) -> int:
        return peak_bytes(self._of(point)[1], point)

    def _at(self, point: Point) -> int | None:
        """Bytes; None where the peak alone is beyond all cards."""
        spread = self._of(point)[0]
        return None if self._peak(point) > CARDS[-1].usable_bytes else spread.replay.surplus_bytes(spread.at(point))


def around(known: Sequence[int], at: int) -> list[tuple[int, float]]:
    """The sizes at or next to one, with weights by how near they are."""
    low = max((one for one in known if one <= at), default=known[0])
    high = min((one for one in known if one >= at), default=known[-1])
    if low == high:
        return [(low, 1.0)]
    up = math.log(at / low) / math.log(high / low)
    return [(low, 1 - up), (high, up)]
