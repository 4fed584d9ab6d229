"""Two traces of one training step laid side by side, where one lacks some allocations."""

from __future__ import annotations

from membench.memory.trace import Trace
from membench.planning.extrapolate import NotAlikeError

_TRIES = 20_000  # events to look at


def aligned(more: Trace, fewer: Trace) -> list[int | None]:
    """For each allocation of `more` its index in `fewer`, where everything else is the same; None: it isn't there.

    Raises:
        NotAlikeError: something else differs: a place, a purpose, or when something is freed.
    """
    lacking = len(more.sizes) - len(fewer.sizes)
    if more.events == fewer.events and _kinds(more) == _kinds(fewer):
        return list(range(len(more.sizes)))
    if lacking > 0:
        found = _search(more, fewer, lacking)
        if found is not None:
            return [found.get(index) for index in range(len(more.sizes))]
    raise NotAlikeError("two steps differ in more than sizes")


def _search(more: Trace, fewer: Trace, lacking: int) -> dict[int, int] | None:
    """Takes each allocation for the other's next one where it can, and comes back if that leads nowhere."""
    kinds, others = _kinds(more), _kinds(fewer)
    turns: list[tuple[int, int, dict[int, int]]] = []  # where an allocation was taken for the other's
    i, j, pairs = 0, 0, dict[int, int]()
    for _ in range(_TRIES):
        if i == len(more.events):
            return pairs if j == len(fewer.events) else None
        event, other = more.events[i], fewer.events[j] if j < len(fewer.events) else None
        if event < 0 and ~event not in pairs:
            i += 1
        elif event < 0 and other is not None and other == ~pairs[~event]:
            i, j = i + 1, j + 1
        elif event >= 0 and other is not None and other >= 0 and kinds[event] == others[other]:
            turns.append((i, j, dict(pairs)))
            pairs[event] = other
            i, j = i + 1, j + 1
        elif event >= 0 and event - len(pairs) < lacking:
            i += 1
        else:
            while turns and more.events[turns[-1][0]] - len(turns[-1][2]) >= lacking:
                turns.pop()
            if not turns:
                return None
            i, j, pairs = turns.pop()
            i += 1
    return None


def _kinds(trace: Trace) -> list[tuple[str, str, int]]:
    return list(zip(trace.phases, trace.modules, trace.parts, strict=True))
