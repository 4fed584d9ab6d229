"""What a race measures: both sides' times, alternating, how far apart their weights end up, and each one's memory."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from dataclasses import dataclass

from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.models import Size
from benchmarks.paired import Ratio, Seconds, interleave, ratio_of
from benchmarks.races import Race
from benchmarks.side import largest_difference, step_on_the_same_gradients

METERED_STEPS = 2  # the second one has the state created by the first


@dataclass(frozen=True)
class Result:
    """The result of a race; ratios are ours over theirs."""

    method: str
    race: Race
    update: Ratio
    step: Ratio
    our_peak_bytes: int
    their_peak_bytes: int
    difference: float  # the largest of any weight

    @property
    def memory(self) -> float:
        """Our peak over theirs."""
        return self.our_peak_bytes / self.their_peak_bytes

    def lost(self) -> list[str]:
        """What is lost, in words; nothing for a comparison that isn't between equals."""
        limit, exact = self.race.update_limit, self.race.same_weights
        checks = {
            f"update time {self.update} above {limit}": limit is None or self.update.holds(limit),
            f"step time {self.step} above {limit}": limit is None or self.step.holds(limit),
            f"peak memory {self.memory:.4f} above {self.race.memory_limit:g}": limit is None
            or self.memory <= self.race.memory_limit,
            f"weights differ by {self.difference:.1e}, above {exact}": exact is None or self.difference <= exact,
        }
        return [text for text, holds in checks.items() if not holds]


def run(method: str, race: Race, size: Size, steps: int, warm_up: int) -> Result:
    """Time the race, compare the final weights, then meter both sides separately."""
    our_seconds, their_seconds, difference = _timed(race, size, steps, warm_up)
    if race.same_gradients:
        difference = _difference_on_the_same_gradients(race, size, warm_up + steps)
    our_peak, their_peak = peaks(race, size)
    return Result(
        method,
        race,
        ratio_of(our_seconds, their_seconds, "update"),
        ratio_of(our_seconds, their_seconds, "step"),
        our_peak,
        their_peak,
        difference,
    )


def _timed(race: Race, size: Size, steps: int, warm_up: int) -> tuple[list[Seconds], list[Seconds], float]:
    """The seconds of both sides, and the largest difference of their weights at the end."""
    gc.collect()
    ours, theirs = race.sides(size)
    return *interleave(ours.step, theirs.step, steps, warm_up), largest_difference(ours.model, theirs.model)


def _difference_on_the_same_gradients(race: Race, size: Size, steps: int) -> float:
    gc.collect()
    ours, theirs = race.sides(size)
    for number in range(steps):
        step_on_the_same_gradients(ours, theirs, number)
    return largest_difference(ours.model, theirs.model)


def peaks(race: Race, size: Size) -> tuple[int, int]:
    """Peak bytes of both sides, each with its own model."""
    gc.collect()
    with FakeTensorMode() if race.fake else nullcontext():
        ours, theirs = race.sides(size)
        return ours.peak_bytes(METERED_STEPS), theirs.peak_bytes(METERED_STEPS)
