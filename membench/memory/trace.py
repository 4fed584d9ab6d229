"""A trace of allocations: what was allocated and freed, in order, and what each allocation was for."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from reports.parts import ACTIVATIONS, COMMUNICATION, TEMPORARIES

# Where allocations belong that weren't made by any module of the model.
INPUTS, ROOT, OPTIMIZER = "(inputs)", "", "(optimizer)"


@dataclass
class Trace:
    """All allocations of some training steps. Lists have one entry per allocation; `events` gives the order.

    Attributes:
        sizes: bytes, as requested (an allocator may round them up).
        parts: its purpose, as the index of one of `reports.parts`; certain only when the steps are over.
        phases: "forward", "backward", "update", "switch", or "" for what existed before.
        modules: name of the module that made or owns it; see `INPUTS`, `ROOT` and `OPTIMIZER` for the others.
        events: `i` where allocation `i` is made, `~i` where it is freed.
        freed: one byte per allocation, 1 if it was freed.
        selections: (index into `events`, what is trained from there on).
    """

    sizes: list[int] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    events: array[int] = field(default_factory=lambda: array("q"))
    freed: bytearray = field(default_factory=bytearray)
    selections: list[tuple[int, str | None]] = field(default_factory=list)

    def allocate(self, size: int, part: int, phase: str, module: str) -> int:
        """Note an allocation of `size` bytes and return its index."""
        index = len(self.sizes)
        self.sizes.append(size)
        self.parts.append(part)
        self.phases.append(phase)
        self.modules.append(module)
        self.events.append(index)
        self.freed.append(0)
        return index

    def free(self, index: int) -> None:
        """Note that allocation `index` was freed."""
        self.events.append(~index)
        self.freed[index] = 1

    def assign(self, index: int, part: int, module: str) -> None:
        """Set what allocation `index` was for from its birth on, unless it already has a lasting purpose."""
        if self.parts[index] in (ACTIVATIONS, COMMUNICATION, TEMPORARIES):
            self.parts[index] = part
            self.modules[index] = module

    def repeat(self, other: Trace, events: slice, numbers: list[int]) -> None:
        """Note some events of `other` again; `numbers` has the index here of each of its allocations so far."""
        for event in other.events[events]:
            if event < 0:
                self.free(numbers[~event])
            else:
                part, phase, module = other.parts[event], other.phases[event], other.modules[event]
                numbers.append(self.allocate(other.sizes[event], part, phase, module))
