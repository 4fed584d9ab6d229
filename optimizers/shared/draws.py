"""Random draws of blocks, a new one every so many steps: what LISA and HFT share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, MutableMapping
from typing import Any

from torch import Tensor, nn

from optimizers.shared.blocks import Blocks, train_only
from optimizers.shared.values import check_indices


class Draws:
    """Which blocks are trained now, which ever were, and when the next draw is due.

    Args:
        blocks: to draw from.
        draw: number of a draw (from 0) -> indices of blocks; a function of that number alone.
        every: steps between draws; None: the first one stays.
    """

    def __init__(self, blocks: Blocks, draw: Callable[[int], Iterable[int]], every: int | None):
        self.blocks = blocks
        self.names = list(blocks)
        self.every = every
        self._draw = draw
        self._number = 0
        self._steps = 0  # done with this draw
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
        """Share of the blocks that were trained for at least a step."""
        return len(self._visited) / len(self.names)

    def count_step(self) -> bool:
        """Note that a step is done: is it time for the next draw?"""
        self._visited.update(self.drawn)
        self._steps += 1
        return self.every is not None and self._steps >= self.every

    def next(self) -> None:
        """Draw anew."""
        self._number += 1
        self._steps = 0
        self.drawn = sorted(self._draw(self._number))

    def take(self, chosen: Iterable[int]) -> None:
        """Put `chosen` in place of what was drawn."""
        self.drawn = sorted(chosen)

    def train(self, params: Iterable[nn.Parameter], always: Collection[nn.Parameter]) -> set[nn.Parameter]:
        """Let exactly what is drawn and `always`, of `params`, require gradients; gives these."""
        blocks = list(self.blocks.values())
        active = set(always).union(*(blocks[i] for i in self.drawn))
        train_only(params, active)
        return active

    def state(self) -> dict[str, Any]:
        """What must be remembered, as JSON."""
        position = {"number": self._number, "steps": self._steps, "drawn": self.drawn}
        return {"blocks": self.names, **position, "visited": sorted(self._visited)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave.

        Raises:
            ValueError: it is of other blocks.
        """
        if state["blocks"] != self.names:
            raise ValueError(f"this state is of other blocks: {state['blocks']}, not {self.names}")
        for key in ("drawn", "visited"):
            check_indices(key, state[key], len(self.names))
        self._number, self._steps, self.drawn = state["number"], state["steps"], list(state["drawn"])
        self._visited = set(state["visited"])


def drop_state(state: MutableMapping[Tensor, Any], keep: Collection[Tensor]) -> None:
    """Forget what is kept for all parameters but those of `keep`."""
    for p in [p for p in state if p not in keep]:
        del state[p]
