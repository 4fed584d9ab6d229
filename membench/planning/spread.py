"""How a plan's allocations grow with the batch and the sequence at once: each is a polynomial in both.

As in `growth`, one step on a shallow model tells what each allocation of the plan takes at another size. Here they are
learned at a few batches times a few sequences, which determine a polynomial: of degree one in the batch, and (because
of attention) of degree two in the sequence. A batch of one has polynomials of its own, and lacks a few copies that only
several sequences need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from membench.memory.trace import Trace
from membench.planning.align import aligned
from membench.planning.blueprint import Blueprint
from membench.planning.extrapolate import NotAlikeError, weights
from membench.planning.growth import Sizes, Spot, spots
from membench.planning.method import Plan
from membench.planning.replay import Replay
from membench.planning.simulate import Simulation, simulate

BATCHES = (2, 3)  # a single sequence has strides that no other batch has
LEAST = 16  # tokens
_CHECKED_BATCH, _CHECKED_BEFORE = 7, 37  # a size that determines nothing: so many tokens before the longest


class Point(NamedTuple):
    """A micro-batch: so many sequences of so many tokens."""

    batch: int
    sequence: int


@dataclass
class Spread:
    """What the allocations of a plan take at each of some points.

    Attributes:
        batches, sequences: the points are their pairs, in order.
        trace: of the plan.
        sizes: by allocation, bytes at the points.
        dropped: the allocations that aren't made at these batches.
    """

    batches: tuple[int, ...]
    sequences: tuple[int, ...]
    trace: Trace
    sizes: list[tuple[int, ...]]
    dropped: set[int]

    @cached_property
    def replay(self) -> Replay:
        """The plan's trace at these batches."""
        return Replay(self.trace, self.dropped)

    def at(self, point: Point) -> list[int]:
        """Bytes of each allocation at another point."""
        value = value_at(self.batches, self.sequences, point)
        known = {given: value(given) for given in set(self.sizes)}
        return [known[given] for given in self.sizes]


def value_at(batches: Sequence[int], sequences: Sequence[int], point: Point) -> Callable[[Sequence[int]], int]:
    """Tells the value at `point` of the polynomial with given values at all pairs of `batches` and `sequences`."""
    along_batch, along_sequence = weights(batches, point.batch), weights(sequences, point.sequence)

    def value(given: Sequence[int]) -> int:
        rows = [given[i : i + len(sequences)] for i in range(0, len(given), len(sequences))]
        return along_batch.apply([along_sequence.apply(row) for row in rows])

    return value


class Learner:
    """Steps on a shallow model, and what they tell of a plan.

    Args:
        plan: made at the first of `sequences`.
        blueprint: its workload.
        values: the method's hyper-parameters.
        sequences: three, the last the longest.

    Raises:
        NotAlikeError: the steps don't have all that the plan has.
    """

    def __init__(self, plan: Plan, blueprint: Blueprint, values: Mapping[str, Any], sequences: Sequence[int]):
        self._plan, self._blueprint, self._values, self._sequences = plan, blueprint, values, tuple(sequences)
        self._of_plan = spots(plan.simulation, ranked=True)
        self._start = Point(blueprint.workload.batch_size, self._sequences[0])
        self._needed = {spot for spot in self._of_plan if spot is not None}
        for self._depth in dict.fromkeys((blueprint.shallowest, *blueprint.depths)):
            try:
                self._here = self._step(self._start)
            except ValueError:  # a model may be too shallow for a method
                continue
            self._spots = spots(self._here, ranked=True)
            if self._needed <= set(self._spots):
                return
        raise NotAlikeError("a shallow model doesn't have all that is made at the model's own depth")

    def spread(self, batches: tuple[int, ...]) -> Spread:
        """What allocations take in batches of one, (1,), or in all others, `BATCHES`.

        Raises:
            NotAlikeError: steps at the points, or at others that are checked, differ in more than sizes, or these
                aren't polynomials.
        """
        seen = [self._sizes(Point(batch, sequence)) for batch in batches for sequence in self._sequences]
        known = {spot: tuple([sizes[spot] for sizes in seen]) for spot in seen[0]}
        other = Point(1 if batches == (1,) else _CHECKED_BATCH, self._sequences[-1] - _CHECKED_BEFORE)
        value, sizes = value_at(batches, self._sequences, other), self._sizes(other)
        if {spot: value(given) for spot, given in known.items()} != sizes:
            raise NotAlikeError(f"what is allocated isn't a polynomial at {other.batch} x {other.sequence} tokens")
        trace, none = self._plan.simulation.trace, (0,) * len(seen)
        bytes_ = [
            (size,) * len(seen) if spot is None else known.get(spot, none)
            for spot, size in zip(self._of_plan, trace.sizes, strict=True)
        ]
        dropped = {index for index, spot in enumerate(self._of_plan) if spot is not None and spot not in known}
        return Spread(batches, self._sequences, trace, bytes_, dropped)

    def _step(self, point: Point) -> Simulation:
        other = self._blueprint.with_workload(batch_size=point.batch, sequence_length=point.sequence)
        return simulate(other, self._plan.method, self._values, self._depth, steps=1)

    def _sizes(self, point: Point) -> Sizes:
        """The sizes in a real step, by spot of the plan's size; without those that it doesn't have."""
        there = self._here.trace if point == self._start else self._step(point).trace
        pairs = aligned(self._here.trace, there)
        sizes: Sizes = {}
        missing: set[Spot | None] = set()
        for spot, index in zip(self._spots, pairs, strict=True):
            if index is None:
                missing.add(spot)
            elif spot is not None and sizes.setdefault(spot, there.sizes[index]) != there.sizes[index]:
                raise NotAlikeError("allocations of one place and size grow differently")
        if missing and (point.batch > 1 or None in missing or missing & set(sizes)):
            raise NotAlikeError(f"a step of {point.batch} x {point.sequence} tokens differs in more than sizes")
        return {spot: size for spot, size in sizes.items() if spot in self._needed}
