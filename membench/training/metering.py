"""Metering a full cycle of a method: a few steps on each block that it trains in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from membench.memory.meter import MemoryMeter
from membench.memory.stock import StockOptimizer
from membench.training.loop import Batch, Loss, training_step
from optimizers import MemoryEfficientOptimizer
from tasks.models.modes import all_layers_running

Batches = Callable[[int], Sequence[Batch]]


def meter_cycle(
    model: nn.Module,
    optimizer: MemoryEfficientOptimizer | torch.optim.Optimizer,
    loss_fn: Loss,
    batches: Batches,
    *,
    max_grad_norm: float | None = None,
    steps_per_selection: int = 2,
    selections: int | None = None,
) -> dict[str, Any]:
    """Train `model` through a cycle of what `optimizer` selects and report the memory: see `breakdown.summarize`.

    If a method's choice depends on values, this starts with the selections that may need most (`worst_case`). Two steps
    per selection are needed: state created by the first one's update is present in the second one's forward and
    backward. No layer is left out at random. Works on real and fake tensors. It trains the model, so pass a copy.

    Args:
        model: on the device to meter.
        optimizer: a method of `optimizers`, or any other optimizer, which is assumed to train everything at once.
        loss_fn: the loss of `model` on a micro-batch.
        batches: the micro-batches of a step, on the model's device; they are counted for the duration of that step.
        max_grad_norm: clip gradients in the loop.
        steps_per_selection: training steps for each selection.
        selections: how many to go through; `turns_of` the optimizer if None.
    """
    method = optimizer if isinstance(optimizer, MemoryEfficientOptimizer) else StockOptimizer(optimizer)
    turns = selections_of(method, selections)
    first = next(turns)  # before the meter, which counts a switch
    with all_layers_running(model), MemoryMeter(model, method) as meter:
        for turn in chain([first], turns):
            train_selection(meter, loss_fn, batches, turn, max_grad_norm, steps_per_selection)
    return meter.report()


def selections_of(method: MemoryEfficientOptimizer | StockOptimizer, count: int | None = None) -> Iterator[int]:
    """Make the selections to meter one after another, and number them: the worst cases, then further ones.

    Args:
        method: may go on to its next selection itself, while it is trained on one.
        count: how many, but for the worst cases after the first; `turns_of` the method if None.
    """
    method.worst_case()
    before = method.selection
    for turn in range(method.worst_cases - 1 + (count or turns_of(method))):
        if 0 < turn < method.worst_cases:
            method.worst_case(turn)
        elif turn and method.selection == before:
            method.advance()
        before = method.selection
        yield turn


def turns_of(method: MemoryEfficientOptimizer | StockOptimizer) -> int:
    """The number of selections in a cycle; two for a method with one selection that renews what it keeps: a renewal's
    bytes come on top of the state that exists by then."""
    base, kind = MemoryEfficientOptimizer, type(method)
    chooses = not isinstance(method, base) or kind.worst_case is not base.worst_case
    renews = method.cycle_length == 1 and not chooses and kind.advance is not base.advance
    return 2 if renews else method.cycle_length


def train_selection(
    meter: MemoryMeter,
    loss_fn: Loss,
    batches: Batches,
    turn: int,
    max_grad_norm: float | None = None,
    steps: int = 2,
) -> None:
    """A few steps on the current selection, number `turn` of the cycle, or fewer if the method then goes on to its next
    itself; with `meter` entered.
    """
    method: Any = meter.optimizer
    selection = method.selection
    for step in range(turn * steps, (turn + 1) * steps):
        _step(meter, loss_fn, batches(step), max_grad_norm)
        if method.selection != selection:
            break


def _step(meter: MemoryMeter, loss_fn: Loss, micro_batches: Sequence[Batch], max_grad_norm: float | None) -> None:
    method: Any = meter.optimizer
    with meter.hold(micro_batches):
        training_step(meter.model, method, loss_fn, micro_batches, max_grad_norm=max_grad_norm, phase=meter.phase)
