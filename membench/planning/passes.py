"""A step's forward and backward pass on fake tensors, noted once and repeated from the notes.

Without values they depend on the model, the batch and what requires gradients alone. So methods that hook into neither
pass share the notes, and so do all steps of such a method: what is left of the passes are the loss and the gradients.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from membench.memory.trace import Trace
from membench.planning.blueprint import Blueprint
from membench.planning.layers import kind
from membench.planning.metered import FakeMeter, Place
from membench.planning.workload import Batch, Loss
from optimizers import MemoryEfficientOptimizer

KEPT = 64  # notes; the oldest are forgotten first
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@dataclass(frozen=True)
class Notes:
    """What both passes allocate and free.

    Attributes:
        trace: of these passes alone.
        middle: the number of events in the forward pass.
        loss: its allocation and geometry.
        gradients: those of each parameter's gradient, if it has one.
    """

    trace: Trace
    middle: int
    loss: Place
    gradients: list[Place | None]


_known: dict[Hashable, Notes | None] = {}  # None: the passes leave something else, too


class RepeatedLoss:
    """A loss, from the notes if there are some. The meter must be entered, and the loss be differentiated.

    Args:
        loss: the real one.
        meter: of the model and the method.
        blueprint: of the model and the training step.
        hooks: of the model before the method was built.
    """

    def __init__(self, loss: Loss, meter: FakeMeter, blueprint: Blueprint, hooks: list[Any]):
        self._loss, self._meter, self._hooks = loss, meter, hooks
        self._structure = blueprint.workload, repr(blueprint.source.config), kind(meter.model)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        if hooks_of(model) != self._hooks or not _differentiates(self._meter.optimizer):
            return self._loss(model, batch)
        key = (*self._structure, *((p.dtype, p.grad_dtype, p.requires_grad) for p in model.parameters()))
        if key not in _known:
            return self._noted(key, model, batch)
        notes = _known[key]
        return self._loss(model, batch) if notes is None else self._repeated(notes, model)

    def _noted(self, key: Hashable, model: nn.Module, batch: Batch) -> Tensor:
        """The real loss; its backward pass completes the notes."""
        trace = self._meter.trace
        first, start = len(trace.sizes), len(trace.events)
        loss = self._loss(model, batch)
        middle, weakly = len(trace.events) - start, weakref.ref(loss)

        def backward() -> None:
            loss = weakly()
            assert loss is not None
            Tensor.backward(loss)
            if len(_known) == KEPT:
                del _known[next(iter(_known))]
            left = [loss, *(p.grad for p in model.parameters())]
            _known[key] = _notes(self._meter, trace.since(first, start), first, middle, left)

        vars(loss)["backward"] = backward
        return loss

    def _repeated(self, notes: Notes, model: nn.Module) -> Tensor:
        """A loss whose backward pass comes from the notes, too."""
        meter, first = self._meter, len(self._meter.trace.sizes)
        meter.trace.repeat(notes.trace, slice(notes.middle))

        def backward() -> None:
            meter.trace.repeat(notes.trace, slice(notes.middle, None), first)
            for p, place in zip(model.parameters(), notes.gradients, strict=True):
                p.grad = None if place is None else meter.put(first, place)

        loss = meter.put(first, notes.loss).requires_grad_()
        vars(loss)["backward"] = backward
        return loss


def _notes(meter: FakeMeter, trace: Trace | None, first: int, middle: int, left: list[Tensor | None]) -> Notes | None:
    """The notes of passes, if no more is left of them than the loss and the gradients, of which nothing was made."""
    loss, *gradients = [None if tensor is None else meter.place(tensor, first) for tensor in left]
    known = {place.allocation for place in (loss, *gradients) if place is not None}
    if any(index >= first for index in meter.of_gradients):  # by what acts when a gradient is accumulated
        return None
    if trace is None or loss is None or known != {index for index, freed in enumerate(trace.freed) if not freed}:
        return None
    return Notes(trace, middle, loss, gradients)


def hooks_of(model: nn.Module) -> list[Any]:
    """All that acts on the passes of a model besides its modules and parameters."""
    owned = [vars(module)[name] for module in model.modules() for name in _HOOKS]
    owned += [
        hooks for p in model.parameters() for hooks in (p._backward_hooks, p._post_accumulate_grad_hooks) if hooks
    ]
    patched = [vars(module)["forward"] for module in model.modules() if "forward" in vars(module)]
    return [*(hook for hooks in owned for hook in hooks.values()), *patched]


def _differentiates(method: object) -> bool:
    """Is its whole backward pass `loss.backward()`, with no gradients before?"""
    assert isinstance(method, MemoryEfficientOptimizer)
    plain = type(method).backward is MemoryEfficientOptimizer.backward and not method.asks_losses
    return plain and all(p.grad is None for p in method.model.parameters())
