"""A trace as moments that have the same name at every depth, so that their sizes can be extrapolated."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from membench.memory.allocator import estimate_reserved_bytes
from membench.memory.trace import OPTIMIZER, Trace
from membench.planning.simulate import Simulation, layer_pattern
from reports.parts import FIELDS

ENDS = 2  # layers at each end of the model whose moments have their own names

Selected = tuple[int, int]


class Key(NamedTuple):
    """The name of a moment: the k-th allocation at its place, in a step on a selection."""

    selection: Selected  # its rank by name among those trained, and which visit
    step: int
    phase: str
    place: str  # a module; layers are numbered from the first (+0, +1) or from the last (-0, -1)
    number: int  # k; for the optimizer's own allocations, the size


@dataclass(frozen=True)
class Moment:
    """What exists right after an allocation.

    Attributes:
        sizes: bytes of everything, and of each part (`reports.parts`).
        position: of the event in the trace.
    """

    sizes: tuple[int, ...]
    position: int


@dataclass
class Moments:
    """The moments of a simulation, in order; those between the ends of the model are left out.

    `surplus_bytes` is what the allocator would reserve beyond the peak: rounding, and gaps too small to use.
    """

    moments: dict[Key, Moment]
    surplus_bytes: int

    @property
    def peak(self) -> Key:
        """The first moment with the most bytes."""
        return max(self.moments, key=lambda key: self.moments[key].sizes[0])

    def maximum(self, part: int) -> int:
        """Bytes of everything (0) or of a part (from 1), at their own maximum."""
        return max(moment.sizes[part] for moment in self.moments.values())


def profile(simulation: Simulation, *, complete: bool) -> Moments:
    """The moments of a simulation.

    Args:
        simulation: of one depth.
        complete: name the moments of all layers, numbered from the first, when no other depth is needed.
    """
    moments: dict[Key, Moment] = {}
    for key, position, sizes in named_moments(simulation, complete=complete):
        if key not in moments or sizes[0] > moments[key].sizes[0]:
            moments[key] = Moment(tuple(sizes), position)
    ordered = dict(sorted(moments.items(), key=lambda item: item[1].position))
    highest = max(moment.sizes[0] for moment in moments.values())
    return Moments(ordered, estimate_reserved_bytes(simulation.trace) - highest)


def named_moments(simulation: Simulation, *, complete: bool) -> Iterator[tuple[Key, int, list[int]]]:
    """The key, position and sizes (see `Moment`) of each moment; those near both ends of the model have two keys."""
    trace = simulation.trace
    name_places = _places(simulation, complete)
    counts: Counter[tuple[Selected, int, str, str]] = Counter()
    for position, selection, step, sizes in _walk(trace, _ranks(simulation)):
        index = trace.events[position]
        module, phase = trace.modules[index], trace.phases[index]
        for place in name_places(module):
            at = (selection, step, phase, place)
            counts[at] += 1
            yield Key(*at, trace.sizes[index] if module == OPTIMIZER else counts[at]), position, sizes


def _walk(trace: Trace, ranks: dict[str | None, int]) -> Iterator[tuple[int, Selected, int, list[int]]]:
    """For each allocation: its event's position, its selection and step, and the bytes after it."""
    positions, levels = _levels(trace)
    starts, selections = iter(trace.selections), Counter[int]()
    selection, step, phase = (0, 0), 0, ""
    start, name = next(starts, _NEVER)
    for position, sizes in zip(positions, levels, strict=True):
        while start <= position:
            selection, step = (ranks[name], selections[ranks[name]]), 0
            selections[ranks[name]] += 1
            start, name = next(starts, _NEVER)
        made_in = trace.phases[trace.events[position]]
        step += made_in == "forward" != phase
        phase = made_in or phase
        yield position, selection, step, sizes


_NEVER = (sys.maxsize, None)


def _levels(trace: Trace) -> tuple[list[int], list[list[int]]]:
    """The positions of allocations, and the bytes of everything and of each part after each."""
    events = np.asarray(trace.events, dtype=np.int64)
    made = events >= 0
    index = np.where(made, events, ~events)
    sizes = np.asarray(trace.sizes, dtype=np.int64)[index]
    changes = np.zeros((len(events), 1 + len(FIELDS)), dtype=np.int64)
    changes[:, 0] = np.where(made, sizes, -sizes)
    changes[np.arange(len(events)), 1 + np.asarray(trace.parts, dtype=np.int64)[index]] = changes[:, 0]
    return np.flatnonzero(made).tolist(), changes.cumsum(0)[made].tolist()


def _places(simulation: Simulation, complete: bool) -> Callable[[str], list[str]]:
    """A module's names, the same at every depth: two if its layer is near both ends, none if it is near neither."""
    pattern, depth = layer_pattern(simulation.layers), simulation.depth
    known: dict[str, list[str]] = {}

    def places(module: str) -> list[str]:
        if module not in known:
            match = pattern.search(module)
            if match is None:
                known[module] = [module]
            else:
                number = int(match[2])
                names = [f"+{number}"] if complete or number < ENDS else []
                names += [f"-{depth - 1 - number}"] if not complete and depth - 1 - number < ENDS else []
                known[module] = [f"{match[1]}.{name}{module[match.end() :]}" for name in names]
        return known[module]

    return places


def _ranks(simulation: Simulation) -> dict[str | None, int]:
    """The rank of each trained selection among all, by name and number; -1 for those skipped."""
    known = sorted(simulation.trained, key=lambda name: [part.zfill(9) for part in re.findall(r"\d+|\D+", name or "")])
    return {name: rank for rank, name in enumerate(known)} | {
        name: -1 for _, name in simulation.trace.selections if name not in simulation.trained
    }
