"""Where the memory goes: from a trace to the peak, its parts, and what holds them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from membench.memory.allocator import estimate_reserved_bytes
from membench.memory.components import COMPONENTS
from membench.memory.trace import Trace
from reports.parts import FIELDS

Sizes = dict[str, int]  # bytes of each part


def summarize(trace: Trace, component: Mapping[str, str]) -> dict[str, Any]:
    """The report on a trace of training steps of a model whose modules belong to a `component` each: see `classify`.

    Returns:
        peak_allocated_bytes: the most that was held at once, as requested (without an allocator's rounding).
        at_peak: the parts (`reports.parts`) at that moment; they add up to it.
        maximum: the parts, each at its own maximum; they don't add up.
        peak_phase: the phase of the peak: "forward", "backward", "update", "switch", or "" outside all phases.
        peak_module: the module that holds most at the peak, without what its children hold.
        peak_selection: what was being trained at the peak, or None for a method without a choice.
        estimated_reserved_bytes: what PyTorch's allocator would reserve for it on a GPU; see `allocator`.
        selections: a list of {"selection", "peak_allocated_bytes"}, in the order of training.
        components: the parts at the peak for each of the `COMPONENTS`.
        modules: the parts at the peak for each module, without what its children hold ("" is the model itself and the
            loss; "(inputs)" and "(optimizer)" belong to no module).
    """
    peaks, maximum = find_peaks(trace)
    highest = max(range(len(peaks)), key=lambda turn: peaks[turn][0])
    peak_bytes, moment = peaks[highest]
    alive = alive_at(trace, moment)
    modules = _group(trace, alive, trace.modules)
    components = _group(trace, alive, [component.get(module, "other") for module in trace.modules])
    return {
        "peak_allocated_bytes": peak_bytes,
        "at_peak": _group(trace, alive, [""] * len(trace.sizes))[""],
        "maximum": dict(zip(FIELDS, maximum, strict=True)),
        "peak_phase": trace.phases[trace.events[moment]],
        "peak_module": max(modules, key=lambda module: sum(modules[module].values())),
        "peak_selection": trace.selections[highest][1],
        "estimated_reserved_bytes": estimate_reserved_bytes(trace),
        "selections": [
            {"selection": selection, "peak_allocated_bytes": peak}
            for (_, selection), (peak, _) in zip(trace.selections, peaks, strict=True)
        ],
        "components": {name: components.get(name, _nothing()) for name in COMPONENTS},
        "modules": modules,
    }


def find_peaks(trace: Trace) -> tuple[list[tuple[int, int]], list[int]]:
    """The peak of each selection as (bytes, index of the event that made it), and the maximum of each part."""
    by_part = levels(trace)
    total = by_part.sum(1)
    starts, peaks = [start for start, _ in trace.selections], []
    for start, end in pairwise([*starts, len(trace.events)]):
        before = max(start - 1, 0)  # what is there when a selection begins may be its peak
        moment = before + int(total[before:end].argmax()) if end > before else before
        peaks.append((int(total[moment]) if len(total) else 0, moment))
    return peaks, by_part.max(0, initial=0).tolist()


def levels(trace: Trace) -> NDArray[np.int64]:
    """Bytes of each part after each event (events, parts)."""
    events = np.asarray(trace.events, dtype=np.int64)
    index = np.where(events < 0, ~events, events)
    sizes = np.asarray(trace.sizes, dtype=np.int64)[index]
    changes = np.zeros((len(events), len(FIELDS)), dtype=np.int64)
    changes[np.arange(len(events)), np.asarray(trace.parts, dtype=np.int64)[index]] = np.where(
        events < 0, -sizes, sizes
    )
    return changes.cumsum(0)


def alive_at(trace: Trace, moment: int) -> list[int]:
    """The allocations that exist just after the event at index `moment`."""
    alive: dict[int, None] = {}
    for event in trace.events[: moment + 1]:
        if event < 0:
            del alive[~event]
        else:
            alive[event] = None
    return list(alive)


def _group(trace: Trace, allocations: Iterable[int], key: Sequence[Hashable]) -> dict[Any, Sizes]:
    """The parts of `allocations`, summed by `key`, which has one entry per allocation."""
    groups: dict[Any, Sizes] = {}
    for index in allocations:
        groups.setdefault(key[index], _nothing())[FIELDS[trace.parts[index]]] += trace.sizes[index]
    return groups


def _nothing() -> Sizes:
    return dict.fromkeys(FIELDS, 0)
