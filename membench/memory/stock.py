"""Any `torch.optim.Optimizer` behind the training loop's interface, so that third-party optimizers can be metered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class StockOptimizer:
    """An optimizer that trains all its parameters at once, after the backward pass.

    Args:
        optimizer: does the work; its state and groups are exposed.
    """

    in_backward = asks_losses = False
    cycle_length = 1
    selection = None

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self.step = optimizer.step
        self.zero_grad = optimizer.zero_grad

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        """What the optimizer keeps, by parameter."""
        return self.optimizer.state

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The parameters being trained."""
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of `loss`, a scalar."""
        loss.backward()

    def average_gradients(self) -> None:
        """Averages nothing: there is one process."""

    worst_cases = 1

    def worst_case(self, number: int = 0) -> None:
        """Selects nothing: there is no choice."""

    def advance(self) -> None:
        """Selects nothing: there is no choice."""
