"""A plan's traces replayed with other sizes: only the totals, and quickly, since a search asks for many."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from membench.memory.allocator import reserved_bytes
from membench.planning.extrapolate import NotAlikeError
from membench.planning.method import Plan
from membench.planning.moments import Key, named_moments
from membench.planning.simulate import Simulation

Bytes = NDArray[np.int64]
Places = dict[Key, list[int]]  # of the moments with a key, their positions in the trace


class Replay:
    """Says what `method.whole_profile` would say of the plan's simulations if their allocations had other sizes."""

    def __init__(self, plan: Plan, places: Sequence[Places] | None = None):
        self._depth = plan.depth
        self._simulations = plan.simulations
        named = places or places_of(plan)
        shared = [key for key in named[-1] if all(key in keys for keys in named)]
        others = [[key for key in keys if not all(key in every for every in named)] for keys in named]
        self._traces = [
            _Trace(one, keys, [*shared, *rest]) for one, keys, rest in zip(plan.simulations, named, others, strict=True)
        ]
        self._shared = len(shared)

    def peak_bytes(self, sizes: Sequence[Sequence[int]]) -> int:
        """The peak at the plan's depth; `sizes` are those of each simulation's allocations.

        Raises:
            NotAlikeError: the depths don't follow one rule.
        """
        maxima = [trace.maxima(given) for trace, given in zip(self._traces, sizes, strict=True)]
        if len(maxima) == 1:
            return int(maxima[0].max())
        return self._extended(maxima)

    def surplus_bytes(self, sizes: Sequence[Sequence[int]]) -> int:
        """What the allocator would reserve beyond the peak."""
        return max(
            reserved_bytes(trace.events, given) - int(trace.maxima(given).max())
            for trace, given in zip(self._traces, sizes, strict=True)
        )

    def _extended(self, maxima: list[Bytes]) -> int:
        """See `extrapolate.extend_depth`."""
        first, second, third = (one.depth for one in self._simulations)
        a, b, c = (every[: self._shared] for every in maxima)
        regular = (b - a) * (third - first) == (c - a) * (second - first)
        if not regular.any():
            raise NotAlikeError("no two depths have moments in common")
        peak = (a + (c - a) * (self._depth - first) // (third - first))[regular].max()
        rest = [np.append(every[: self._shared][~regular], every[self._shared :]).max(initial=0) for every in maxima]
        slope = max(0.0, (rest[2] - rest[1]) / (third - second))
        if rest[2] + slope * (self._depth - third) > peak:
            raise NotAlikeError("a maximum is at a moment whose sizes aren't on a line")
        return int(peak)


class _Trace:
    """The events of a simulation, and the moments by key in the order given."""

    def __init__(self, simulation: Simulation, moments: dict[Key, list[int]], order: list[Key]):
        self.events = simulation.trace.events
        events = np.asarray(self.events, dtype=np.int64)
        self._freed = events < 0
        self._index = np.where(self._freed, ~events, events)
        self._positions = np.concatenate([np.asarray(moments[key]) for key in order])
        self._starts = np.cumsum([0, *(len(moments[key]) for key in order[:-1])])

    def maxima(self, sizes: Sequence[int]) -> Bytes:
        """The most bytes at a moment with each key."""
        change = np.asarray(sizes, dtype=np.int64)[self._index]
        totals = np.cumsum(np.where(self._freed, -change, change))
        return np.maximum.reduceat(totals[self._positions], self._starts)


def places_of(plan: Plan) -> list[Places]:
    """For each of a plan's simulations, where its moments are."""
    return [_by_key(one, complete=len(plan.simulations) == 1) for one in plan.simulations]


def _by_key(simulation: Simulation, *, complete: bool) -> Places:
    found: Places = {}
    for key, position, _ in named_moments(simulation, complete=complete):
        found.setdefault(key, []).append(position)
    return found
