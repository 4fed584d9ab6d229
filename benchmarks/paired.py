"""Two sides timed alternately, and the uncertainty of their ratio."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Seconds = dict[str, float]  # of the parts of one step
Step = Callable[[int], Seconds]  # does step number n

_RESAMPLES = 2000


@dataclass(frozen=True)
class Ratio:
    """The median of paired ratios, ours over theirs, with its 95 % confidence interval."""

    median: float
    low: float
    high: float

    def holds(self, limit: float) -> bool:
        """Is it at most `limit`, within the noise?"""
        return self.low <= limit

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interleave(ours: Step, theirs: Step, steps: int, warm_up: int) -> tuple[list[Seconds], list[Seconds]]:
    """Do each step on both sides, one right after the other, alternating which goes first.

    Varying load on the machine then affects both sides equally, and each pair has its own ratio.

    Args:
        ours, theirs: do one step and return the seconds of its parts.
        steps: how many to keep.
        warm_up: how many to do before.
    """
    taken: tuple[list[Seconds], list[Seconds]] = ([], [])
    for step in range(warm_up + steps):
        sides = ((0, ours), (1, theirs))
        for index, side in sides if step % 2 == 0 else sides[::-1]:
            taken[index].append(side(step))
    return taken[0][warm_up:], taken[1][warm_up:]


def paired_ratio(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> Ratio:
    """The median of the pairs' ratios, with a bootstrap interval (percentiles; Efron & Tibshirani, 1993).

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"pairs are needed, not {len(ours)} and {len(theirs)} measurements")
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLES))
    return Ratio(statistics.median(ratios), medians[_RESAMPLES // 40], medians[-_RESAMPLES // 40])


def ratio_of(ours: Sequence[Seconds], theirs: Sequence[Seconds], part: str) -> Ratio:
    """`paired_ratio` of one part of the steps."""
    return paired_ratio([seconds[part] for seconds in ours], [seconds[part] for seconds in theirs])
