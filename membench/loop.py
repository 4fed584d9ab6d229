"""The training step that timing, memory meter and planner share."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from optimizers import MemoryEfficientOptimizer

Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]
Phase = Callable[[str], AbstractContextManager]


def training_step(
    model: nn.Module,
    optimizer: MemoryEfficientOptimizer,
    loss_fn: Loss,
    micro_batches: Sequence[Batch],
    *,
    max_grad_norm: float | None = None,
    phase: Phase,
) -> Tensor:
    """One update from the mean loss of `micro_batches`, which are on the model's device; returns that loss, detached.

    The loss stays a tensor because fake tensors have no values. `phase(name)` is a context manager that is entered for
    "forward" and "backward" of each micro-batch and once for "update", which includes dropping the gradients.

    Raises:
        ValueError: accumulation or clipping with a method that updates inside the backward pass.
    """
    check_combination(optimizer, len(micro_batches), max_grad_norm)
    losses = [_backpropagate(model, optimizer, loss_fn, batch, len(micro_batches), phase) for batch in micro_batches]
    with phase("update"):
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(optimizer.trainable, max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum()


def _backpropagate(
    model: nn.Module, optimizer: MemoryEfficientOptimizer, loss_fn: Loss, batch: Batch, parts: int, phase: Phase
) -> Tensor:
    with phase("forward"):
        loss = loss_fn(model, batch)
        loss = loss / parts if parts > 1 else loss
    with phase("backward"):
        optimizer.backward(loss)
    return loss.detach()


def check_combination(optimizer: MemoryEfficientOptimizer, micro_batches: int, max_grad_norm: float | None) -> None:
    """Refuses what can't work once gradients are gone before the step: accumulating them, or clipping all of them."""
    if not optimizer.in_backward:
        return
    method = type(optimizer).__name__
    if micro_batches > 1:
        raise ValueError(
            f"{method} updates inside the backward pass and can't accumulate {micro_batches} micro-batches: "
            "use a larger batch size with 1 accumulation step, or in_backward=False"
        )
    if max_grad_norm is not None:
        raise ValueError(
            f"{method} updates inside the backward pass, so the loop can't clip gradients to {max_grad_norm}: "
            "leave max_grad_norm out, use the method's own clipping, or in_backward=False"
        )
