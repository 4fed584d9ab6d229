"""A plan's trace replayed with other sizes: only the totals, and quickly, since a search asks for many."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from membench.memory.allocator import has_room, reserved_bytes
from membench.memory.trace import Trace

Ints = NDArray[np.int64]


class Replay:
    """The events of a trace.

    Args:
        trace: of a plan.
        dropped: allocations to leave out.

    Attributes:
        index: of the allocation that each event makes or frees.
        sign: of each event, 1 or -1.
    """

    def __init__(self, trace: Trace, dropped: Collection[int] = ()):
        events = np.asarray(trace.events, dtype=np.int64)
        index = np.where(events < 0, ~events, events)
        if dropped:
            kept = ~np.isin(index, list(dropped))
            events, index = events[kept], index[kept]
        self.index, self.sign = index, np.where(events < 0, -1, 1)
        self._events = events.tolist()

    def peak_bytes(self, sizes: Sequence[int]) -> int:
        """The most that is there at once if allocations had these sizes."""
        return int((np.asarray(sizes, dtype=np.int64)[self.index] * self.sign).cumsum().max())

    def has_room(self, sizes: Sequence[int], room_bytes: int) -> bool:
        """Would they pass on a GPU with so much room? See `allocator.has_room`."""
        return self.peak_bytes(sizes) <= room_bytes and has_room(self._events, sizes, room_bytes)

    def surplus_bytes(self, sizes: Sequence[int]) -> int:
        """What the allocator would reserve beyond that."""
        return reserved_bytes(self._events, sizes) - self.peak_bytes(sizes)
