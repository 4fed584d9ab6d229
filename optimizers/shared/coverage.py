"""How many of its blocks a method comes to in a training of so many steps."""

from __future__ import annotations

from typing import NamedTuple


class Coverage(NamedTuple):
    """Blocks visited, all blocks, and the selections that it takes to visit all."""

    visited: int
    blocks: int
    selections: int

    def words(self, steps: int) -> str:
        """`visits 2 of 6 blocks in 17 steps; switch_every <= 2 visits all`; "" if it visits all."""
        if self.visited == self.blocks:
            return ""
        every = steps // self.selections
        out = f"switch_every <= {every} visits all" if every else f"to visit all takes {self.selections} steps or more"
        return f"visits {self.visited} of {self.blocks} blocks in {steps:,} steps; {out}"
