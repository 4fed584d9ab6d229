"""A deep model's trace from those of two shallow ones: what the deeper of these does more is repeated.

The traces of two depths are laid side by side, without the numbers of layers. Where they part, the deeper model goes
through a loop over its layers once more (in the forward pass, the backward pass, an update, ...), and after that they
agree again. A still deeper model does so as many more times. What a turn frees is named by how many allocations of its
kind are older, or newer, whichever is the same from turn to turn.

Two depths that agree by chance would show at a third, whose trace they must tell event by event: see `tells`.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from membench.memory.trace import Trace
from membench.planning.extrapolate import NotAlikeError
from membench.planning.simulate import Simulation, layer_pattern, made_between_passes

Ints = NDArray[np.int64]
Numbers = tuple[int, ...]

_NUMBER = re.compile(r"\d+")
_AHEAD = 4096  # items to look at where several lengths of a turn are possible
_NO_LAYER = -1


def deepen(shallow: Simulation, deeper: Simulation, depth: int) -> Simulation:
    """The simulation of `depth` layers from two of fewer, the second by a whole number of periods.

    Raises:
        NotAlikeError: what the second does more isn't made of turns of loops.
    """
    known = _Kinds()
    one, other = _Score(shallow, known), _Score(deeper, known)
    more = (depth - deeper.depth) // (deeper.depth - shallow.depth)
    return _Copy(one, other, more).simulation(depth)


def tells(shallow: Simulation, deeper: Simulation, third: Simulation) -> bool:
    """Do two simulations tell all events of a third, of still more layers?"""
    try:
        told = deepen(shallow, deeper, third.depth)
    except NotAlikeError:
        return False
    return told.trace == _of_trained(third) and told.trained == third.trained


def _of_trained(simulation: Simulation) -> Trace:
    """The trace without marks of selections that are skipped."""
    trace = simulation.trace
    return replace(trace, selections=[mark for mark in trace.selections if mark[1] in simulation.trained])


class _Kinds(dict[object, int]):
    """A number for each kind, the same in all scores."""

    def __missing__(self, kind: object) -> int:
        return self.setdefault(kind, len(self))


class _Item(NamedTuple):
    """An event of a trace, or the mark of a selection.

    Attributes:
        made: the allocation that begins here.
        freed: the allocation that ends here.
        selection: the place of the mark in the trace's list.
        numbers: of the layers in its names.
        older, newer: how many allocations of the kind that is freed are there, before and after it.
    """

    made: int | None = None
    freed: int | None = None
    selection: int | None = None
    numbers: Numbers = ()
    older: int = 0
    newer: int = 0


class _Score:
    """A simulation as a row of items, each with a kind that doesn't depend on the depth.

    Attributes:
        allocated: the kind of each allocation.
        kinds: of the items.
        layers: the number of the layer in each item's name.
    """

    def __init__(self, simulation: Simulation, known: _Kinds):
        self.simulation, self.trace = simulation, simulation.trace
        trace, gradients, pattern = self.trace, simulation.of_gradients, layer_pattern(simulation.layers)
        split = {module: _split(pattern, module) for module in set(trace.modules)}
        columns = zip(trace.phases, trace.modules, trace.parts, trace.sizes, trace.freed, strict=True)
        self.allocated = [
            known[phase, split[module][0], part, self._alike(index, size), freed, index in gradients]
            for index, (phase, module, part, size, freed) in enumerate(columns)
        ]
        self.items: list[_Item] = []
        kinds: list[int] = []
        left: dict[int, list[int]] = {}
        marks = self._marks()
        mark = next(marks, None)
        for position, event in enumerate(trace.events):
            while mark is not None and mark[0] == position:
                text = mark[2]
                kinds.append(known["mark", None if text is None else _NUMBER.sub("#", text)])
                self.items.append(_Item(selection=mark[1], numbers=_numbers(text)))
                mark = next(marks, None)
            if event >= 0:
                kind = self.allocated[event]
                left.setdefault(kind, []).append(event)
                self.items.append(_Item(made=event, numbers=split[trace.modules[event]][1]))
            else:
                kind = self.allocated[~event]
                alike = left[kind]
                older = bisect_left(alike, ~event)
                del alike[older]
                self.items.append(_Item(freed=~event, older=older, newer=len(alike) - older))
            kinds.append(known["made" if event >= 0 else "freed", kind])
        self.kinds: Ints = np.array(kinds, dtype=np.int64)
        named = [item.numbers[0] if item.made is not None and item.numbers else _NO_LAYER for item in self.items]
        self.layers: Ints = np.array(named, dtype=np.int64)

    def _alike(self, index: int, size: int) -> int | None:
        """The size, if it is the same at each depth; what a method makes of all gradients together grows."""
        return None if made_between_passes(self.trace, index) else size

    def _marks(self) -> Iterator[tuple[int, int, str | None]]:
        """The position, number and name of each selection that is trained; others are skipped, in whatever order."""
        for number, (position, name) in enumerate(self.trace.selections):
            if name in self.simulation.trained:
                yield position, number, name

    def trained(self, selection: int) -> int:
        """How many weights."""
        return self.simulation.trained[self.trace.selections[selection][1]]


def _split(pattern: re.Pattern[str], module: str) -> tuple[str, Numbers]:
    """A module's name without the number of its layer, and that number."""
    match = pattern.search(module)
    return (module, ()) if match is None else (_numbered(match, "*"), (int(match[2]),))


def _numbered(match: re.Match[str], number: int | str) -> str:
    """The name with another number of its layer."""
    return f"{match.string[: match.start(2)]}{number}{match.string[match.end(2) :]}"


def _numbers(text: str | None) -> Numbers:
    return tuple([int(number) for number in _NUMBER.findall(text or "")])


class _Turn(NamedTuple):
    """A turn that only the deeper of two scores has: where it begins there, and how many items it has."""

    start: int
    length: int


def _turns(shallow: _Score, deeper: _Score) -> list[_Turn]:
    """What the deeper score has more, in order.

    Raises:
        NotAlikeError: they differ in more than that.
    """
    one, other, period = shallow.kinds, deeper.kinds, deeper.simulation.depth - shallow.simulation.depth
    found: list[_Turn] = []
    i = j = 0
    while True:
        same = _in_common(one[i:], other[j:])
        here, there = shallow.layers[i : i + same], deeper.layers[j : j + same]
        elsewhere = np.flatnonzero((there != here) & (there != here + period))
        i, j = i + same, j + same
        ends = i == len(one) and j == len(other)
        length = 0 if ends else _turn(one[i:], other, j)
        if len(elsewhere):  # the next loop began as this one's next turn would have
            i, j = i - same + int(elsewhere[0]), j - same + int(elsewhere[0])
            if ends or not np.array_equal(other[j - length : j], other[j : j + length]):
                raise NotAlikeError("layers aren't gone through in the same order")
        if ends:
            return found
        found.append(_Turn(j, length))
        j += length


def _in_common(one: Ints, other: Ints) -> int:
    """How many items two rows share before they part."""
    size, start, step = min(len(one), len(other)), 0, 64
    while start < size:
        end = min(size, start + step)
        parted = np.flatnonzero(one[start:end] != other[start:end])
        if len(parted):
            return start + int(parted[0])
        start, step = end, 4 * step
    return size


def _turn(rest: Ints, other: Ints, start: int) -> int:
    """The length of the turn that begins at `start`, is like what precedes it, and is followed by `rest`.

    Raises:
        NotAlikeError: there is none.
    """
    most, best, longest = min(start, len(other) - start - len(rest)), 0, 0
    if most > 0:
        repeats = other[start - most : start][::-1] == other[start]
        follows = other[start + 1 : start + 1 + most] == rest[0] if len(rest) else np.arange(1, most + 1) == most
        for length in (1 + np.flatnonzero(repeats & follows)).tolist():
            if np.array_equal(other[start - length : start], other[start : start + length]):
                same = 1 + _in_common(rest[1:_AHEAD], other[start + length + 1 : start + length + _AHEAD])
                best, longest = (length, same) if same > longest else (best, longest)
    if not best:
        raise NotAlikeError("a deeper model does something that a shallower one doesn't")
    return best


class _Copy:
    """The trace of a deeper model: the deeper score with each of its turns `more` times as well."""

    def __init__(self, shallow: _Score, deeper: _Score, more: int):
        self._score, self._more = deeper, more
        self._pattern = layer_pattern(deeper.simulation.layers)
        self._trace, self._trained, self._of_gradients = Trace(), dict[str | None, int](), set[int]()
        self._left: dict[int, list[int]] = {}  # by kind, the allocations that are there
        self._named: dict[tuple[str, int], str] = {}
        # Of each of the deeper score's items so far: the numbers that it has here, and what is the same from turn to
        # turn of what it frees.
        self._numbers: list[Numbers] = []
        self._steady: list[tuple[bool, bool]] = []
        i = j = 0
        for turn in [*_turns(shallow, deeper), _Turn(len(deeper.items), 0)]:
            while j < turn.start:
                self._once(shallow, i, j)
                i, j = i + 1, j + 1
            self._again(turn)
            j += turn.length

    def simulation(self, depth: int) -> Simulation:
        return replace(
            self._score.simulation,
            depth=depth,
            trace=self._trace,
            trained=self._trained,
            of_gradients=self._of_gradients,
            component=self._components(),
        )

    def _components(self) -> dict[str, str]:
        """Of each module, by name, as at the shallower depth."""
        known = {_split(self._pattern, name)[0]: kind for name, kind in self._score.simulation.component.items()}
        modules = dict.fromkeys(self._trace.modules)
        general = {module: _split(self._pattern, module)[0] for module in modules}
        return {module: known[general[module]] for module in modules if general[module] in known}

    def _once(self, shallow: _Score, i: int, j: int) -> None:
        """An item that both scores have."""
        one, other = shallow.items[i], self._score.items[j]
        numbers = tuple([b + (b - a) * self._more for a, b in zip(one.numbers, other.numbers, strict=True)])
        steady = one.older == other.older, one.newer == other.newer
        self._numbers.append(numbers)
        self._steady.append(steady)
        amount = 0  # of weights that are trained, or bytes: on a line
        if other.selection is not None and one.selection is not None:
            amount = self._grown(shallow.trained(one.selection), self._score.trained(other.selection))
        elif other.made is not None and one.made is not None:
            amount = self._grown(shallow.trace.sizes[one.made], self._score.trace.sizes[other.made])
        self._put(other, numbers, steady, amount)

    def _again(self, turn: _Turn) -> None:
        """The turn, and as many more of it."""
        start, length = turn
        items, earlier = self._score.items[start : start + length], self._score.items[start - length : start]
        if any(item.selection is not None for item in items):
            raise NotAlikeError("a deeper model has more selections")
        numbers = self._numbers[start - length :]
        steps = [
            tuple([b - a for a, b in zip(before.numbers, item.numbers, strict=True)])
            for before, item in zip(earlier, items, strict=True)
        ]
        steady = [
            (was[0] and before.older == item.older, was[1] and before.newer == item.newer)
            for was, before, item in zip(self._steady[start - length :], earlier, items, strict=True)
        ]
        for _ in range(1 + self._more):
            numbers = [tuple([a + b for a, b in zip(*both, strict=True)]) for both in zip(numbers, steps, strict=True)]
            for item, given, same in zip(items, numbers, steady, strict=True):
                self._put(item, given, same, 0 if item.made is None else self._score.trace.sizes[item.made])
        self._numbers += numbers
        self._steady += steady

    def _grown(self, here: int, deeper: int) -> int:
        return deeper + (deeper - here) * self._more

    def _put(self, item: _Item, numbers: Numbers, steady: tuple[bool, bool], amount: int) -> None:
        """Note an item of the score here: an allocation and its bytes, or a selection and what it trains."""
        if item.made is not None:
            self._make(item.made, numbers, amount)
        elif item.freed is not None:
            self._free(item, item.freed, *steady)
        elif item.selection is not None:
            name, given = self._score.trace.selections[item.selection][1], iter(numbers)
            text = None if name is None else _NUMBER.sub(lambda match: str(next(given)), name)
            self._trace.selections.append((len(self._trace.events), text))
            self._trained[text] = amount

    def _make(self, index: int, numbers: Numbers, size: int) -> None:
        trace = self._score.trace
        module = self._name(trace.modules[index], *numbers) if numbers else trace.modules[index]
        here = self._trace.allocate(size, trace.parts[index], trace.phases[index], module)
        self._left.setdefault(self._score.allocated[index], []).append(here)
        if index in self._score.simulation.of_gradients:
            self._of_gradients.add(here)

    def _name(self, module: str, number: int) -> str:
        known = self._named.get((module, number))
        if known is None:
            match = self._pattern.search(module)
            assert match is not None
            known = self._named[module, number] = _numbered(match, number)
        return known

    def _free(self, item: _Item, index: int, older: bool, newer: bool) -> None:
        alike = self._left.get(self._score.allocated[index], [])
        place = len(alike) - 1 - item.newer if newer else item.older
        if not (older or newer) or not 0 <= place < len(alike):
            raise NotAlikeError("what is freed follows no rule")
        self._trace.free(alike.pop(place))
