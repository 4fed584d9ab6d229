"""One side of a race: a model and what trains it, its time and its memory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.models import Size, batch, loss
from benchmarks.paired import Seconds
from membench.memory.meter import MemoryMeter
from membench.training.clock import Clock
from membench.training.loop import training_step
from optimizers import MemoryEfficientOptimizer


@dataclass
class Side:
    """A model and its optimizer, ours or a peer."""

    model: nn.Module
    optimizer: Any  # MemoryEfficientOptimizer | StockOptimizer
    size: Size

    def step(self, number: int) -> Seconds:
        """One training step; its seconds: "forward", "backward", "update" and, in total, "step".

        For a method that updates in the backward pass, "update" is the time spent in its hooks, a part of "backward";
        on a GPU that is the time to start its kernels.
        """
        clock = Clock(torch.device(self.size.device))
        before = self._hook_seconds()
        training_step(self.model, self.optimizer, loss, [batch(self.size, number)], phase=clock.phase)
        total = clock.end_step()
        seconds = {name: taken[-1] for name, taken in clock.steps.items()}
        if self.optimizer.in_backward:
            seconds["update"] = self._hook_seconds() - before
        return {**seconds, "step": total}

    def _hook_seconds(self) -> float:
        return self.optimizer.hook_seconds if self.optimizer.in_backward else 0.0

    def peak_bytes(self, steps: int) -> int:
        """The peak of `steps` training steps, by our meter."""
        with MemoryMeter(self.model, self.optimizer) as meter:
            for number in range(steps):
                inputs = [batch(self.size, number)]
                with meter.hold(inputs):
                    training_step(self.model, self.optimizer, loss, inputs, phase=meter.phase)
        return meter.report()["peak_allocated_bytes"]


def with_timed_hooks(base: type[MemoryEfficientOptimizer]) -> Any:
    """`base` that adds up the time spent in its hooks as `hook_seconds`."""

    class Timed(base):  # type: ignore[valid-type, misc]
        hook_seconds = 0.0

        def _update_now(self, p: nn.Parameter) -> None:
            start = time.perf_counter()
            super()._update_now(p)
            self.hook_seconds += time.perf_counter() - start

    return Timed


def largest_difference(ours: nn.Module, theirs: nn.Module) -> float:
    """The largest difference between corresponding weights of two models, matched by the order of their parameters;
    NaN if any of them is.

    Parameters that aren't floating-point are left out: bitsandbytes has its packed bytes among the parameters.
    """
    weights = ([p for p in model.parameters() if p.is_floating_point()] for model in (ours, theirs))
    pairs = zip(*weights, strict=True)
    return torch.stack([(p.detach() - q.detach()).abs().max().double() for p, q in pairs]).max().item()


def step_on_the_same_gradients(ours: Side, theirs: Side, number: int) -> None:
    """One step on each side, both with the gradients of ours.

    The loss is scaled up: Adam doesn't notice, but the smallest gradient is then far above eps, which peers add in a
    different place.
    """
    ours.optimizer.backward(2.0**20 * loss(ours.model, batch(ours.size, number)))
    for p, q in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    for side in (ours, theirs):
        side.optimizer.step()
        side.optimizer.zero_grad()
