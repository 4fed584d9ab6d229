"""AdamW on blocks drawn at random: shared by LISA and HFT."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from optimizers.base import MemoryEfficientOptimizer
from optimizers.shared.checkpointing import keep_backward_short
from optimizers.shared.coverage import Coverage
from optimizers.shared.draws import Draws, drop_state
from optimizers.shared.inner import InnerAdamW
from optimizers.shared.reach import Reach, check_reached


class DrawnBlocks(MemoryEfficientOptimizer):
    """Trains what is drawn, and `_always`. A subclass defines the draws, and calls `_begin` once it is built."""

    adamw: InnerAdamW
    _draws: Draws
    _always: Collection[nn.Parameter]  # trained at every step

    def _begin(self, before: Collection[nn.Parameter]) -> None:
        """Select the first draw. `before`: the parameters that the model uses before its layers."""
        if not any(p.requires_grad for p in before):  # then the backward pass ends at the lowest layer drawn
            self._hooks.append(keep_backward_short(self.model))
        self._train_drawn()
        self._reach = Reach(self.model, self._leave_out, self.on_any_replica, self.worst_case)
        self._hooks.append(self._reach)

    def _leave_out(self, unreached: set[nn.Parameter]) -> None:
        """From now on, draw only from the other blocks: the loss doesn't reach these parameters."""
        raise NotImplementedError

    @property
    def cycle_length(self) -> int:
        """How many draws it takes, with this seed, to draw every block; 1 if there is only one draw."""
        return self._draws.cycle_length

    @property
    def block_coverage(self) -> float:
        """Share of the blocks trained at least once."""
        return self._draws.coverage

    @property
    def elementwise(self) -> bool:
        return self.adamw.elementwise

    def coverage_after(self, steps: int) -> Coverage:
        """By the draws of this seed."""
        return self._draws.coverage_after(steps)

    def update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        self.adamw.update([self.state[p] for p in params], params, grads, group, self.rounding_keys(params))

    def expected_state(self, p: nn.Parameter, saved: dict[str, Any]) -> dict[str, Any]:
        return self.adamw.expected_state(p)

    def after_step(self) -> None:
        if self._draws.count_step():
            check_reached(self.model, self.state)
            self.advance()

    def advance(self) -> None:
        """Draw again; blocks that leave lose their gradients and state."""
        self._draws.next()
        self._select()

    def _select(self) -> None:
        drop_state(self.state, keep=self._train_drawn())

    def _train_drawn(self) -> set[nn.Parameter]:
        """Train what is drawn, and what always is; returns these."""
        return self.train_only(self._draws.with_drawn(self._always))

    def extra_state(self) -> dict[str, Any]:
        return {**self._draws.state(), **self._reach.state()}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        self._reach.load_state(extra)
        self._draws.load_state(extra)
        self._train_drawn()
