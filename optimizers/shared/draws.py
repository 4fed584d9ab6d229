"""Random draws of blocks, repeated every so many steps: shared by LISA and HFT."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, MutableMapping
from typing import Any

from torch import Tensor, nn

from optimizers.shared.blocks import Blocks
from optimizers.shared.coverage import Coverage
from optimizers.shared.values import check_indices


class Draws:
    """Which blocks are being trained, which ever were, and when the next draw is due.

    Args:
        blocks: the blocks to draw from.
        draw: maps a draw's number (from 0) to indices of blocks; a function of that number alone.
        every: steps between draws; None: the first one stays.
    """

    def __init__(self, blocks: Blocks, draw: Callable[[int], Iterable[int]], every: int | None):
        self.blocks = blocks
        self.names = list(blocks)
        self.every = every
        self._draw = draw
        self._number = 0
        self._steps = 0  # taken with this draw
        self._visited: set[int] = set()
        self.drawn = sorted(draw(0))
        self.cycle_length = 1 if every is None else self._draws_until_all()

    def _draws_until_all(self) -> int:
        seen: set[int] = set()
        number = 0
        while len(seen) < len(self.names):
            seen.update(self._draw(number))
            number += 1
        return number

    @property
    def coverage(self) -> float:
        """Share of the blocks trained for at least one step."""
        return len(self._visited) / len(self.names)

    def coverage_after(self, steps: int) -> Coverage:
        """What so many steps come to."""
        draws = 1 if self.every is None else -(-steps // self.every)
        visited = {i for number in range(min(draws, self._draws_until_all())) for i in self._draw(number)}
        return Coverage(len(visited), len(self.names), self._draws_until_all())

    def count_step(self) -> bool:
        """Count a step: is it time for the next draw?"""
        self._visited.update(self.drawn)
        self._steps += 1
        return self.every is not None and self._steps >= self.every

    def next(self) -> None:
        """Draw again."""
        self._number += 1
        self._steps = 0
        self.drawn = sorted(self._draw(self._number))

    def take(self, chosen: Iterable[int]) -> None:
        """Replace what was drawn by `chosen`, for two steps at least: the second has the state that the first made."""
        self.drawn, self._steps = sorted(chosen), -1

    def with_drawn(self, always: Collection[nn.Parameter]) -> set[nn.Parameter]:
        """`always`, and the parameters of what is drawn."""
        blocks = list(self.blocks.values())
        return set(always).union(*(blocks[i] for i in self.drawn))

    def state(self) -> dict[str, Any]:
        """What must be saved, as JSON."""
        position = {"number": self._number, "steps": self._steps, "drawn": self.drawn}
        return {"blocks": self.names, **position, "visited": sorted(self._visited)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned.

        Raises:
            ValueError: it was saved for other blocks.
        """
        if state["blocks"] != self.names:
            raise ValueError(f"this state was saved for other blocks: {state['blocks']}, not {self.names}")
        for key in ("drawn", "visited"):
            check_indices(key, state[key], len(self.names))
        self._number, self._steps, self.drawn = state["number"], state["steps"], list(state["drawn"])
        self._visited = set(state["visited"])


def drop_state(state: MutableMapping[Tensor, Any], keep: Collection[Tensor]) -> None:
    """Drop the state of all parameters except those in `keep`."""
    for p in [p for p in state if p not in keep]:
        del state[p]
