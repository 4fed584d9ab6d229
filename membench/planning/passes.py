"""A step's forward and backward pass on fake tensors, noted once and repeated from the notes.

Without values they depend on the model, the batch and what requires gradients alone. So the notes serve all steps of
all methods that act on nothing but gradients: these act again where each gradient is accumulated.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

from membench.planning.blueprint import Blueprint
from membench.planning.layers import kind
from membench.planning.metered import FakeMeter, Place
from membench.planning.notes import Notes, Noting
from membench.planning.workload import Batch, Loss
from optimizers import MemoryEfficientOptimizer
from optimizers.lomo import LOMO
from optimizers.shared.sharded import is_sharded

KEPT = 256  # notes; the oldest are forgotten first
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")

Hook = tuple[str, Any]  # where it is, and the hook

_known: dict[Hashable, Noting | Notes | None] = {}  # None: steps must be made


class RepeatedLoss:
    """A loss, from the notes if there are some. The meter must be entered, and the loss be differentiated.

    Args:
        loss: the real one.
        meter: of the model and the method.
        blueprint: of the model and the training step.
        hooks: of the model before the method was built.
    """

    def __init__(self, loss: Loss, meter: FakeMeter, blueprint: Blueprint, hooks: list[Hook]):
        self._loss, self._meter, self._hooks = loss, meter, _stateful(hooks)
        self._structure = blueprint.workload, repr(blueprint.source.config), kind(meter.model)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        hooks = hooks_of(model)
        if _stateful(hooks) != self._hooks or not _differentiates(self._meter.optimizer):
            return self._loss(model, batch)
        asked = ((p.dtype, p.grad_dtype, p.requires_grad) for p in model.parameters())
        key = (*self._structure, *((name, hook.__code__) for name, hook in hooks if _is_stateless(hook)), *asked)
        if key not in _known:
            return self._noted(key, model, batch)
        notes = _known[key]
        if isinstance(notes, Noting):
            notes = _known[key] = notes.notes()
        return self._loss(model, batch) if notes is None else self._repeated(notes, model)

    def _noted(self, key: Hashable, model: nn.Module, batch: Batch) -> Tensor:
        """The real loss; its backward pass completes the notes."""
        noting = Noting(self._meter, list(model.parameters()))
        loss = self._loss(model, batch)
        weakly = weakref.ref(loss)

        def backward() -> None:
            loss = weakly()
            assert loss is not None
            with noting.backward():
                Tensor.backward(loss)
            noting.end(loss)
            if len(_known) == KEPT:
                del _known[next(iter(_known))]
            _known[key] = noting

        vars(loss)["backward"] = backward
        return loss

    def _repeated(self, notes: Notes, model: nn.Module) -> Tensor:
        """A loss whose backward pass comes from the notes, too."""
        meter, trace = self._meter, self._meter.trace
        numbers: list[int] = []  # here, of the notes' allocations
        kept: list[Tensor] = []
        trace.repeat(notes.trace, slice(notes.middle), numbers)

        def here(place: Place) -> Tensor:
            return meter.put(place._replace(allocation=numbers[place.allocation]))

        def backward() -> None:
            parameters, done = list(model.parameters()), notes.middle
            shared: dict[int, Tensor] = {}  # by allocation, what holds the shards of several gradients
            for position, number, place in notes.gradients:
                trace.repeat(notes.trace, slice(done, position), numbers)
                if not is_sharded(parameters[number]):
                    meter.accumulate(here(place), parameters[number])
                else:
                    if place.allocation not in shared:
                        shared[place.allocation] = here(place.around(notes.trace.sizes[place.allocation]))
                    shard = shared[place.allocation].as_strided(place.shape, place.stride, place.offset)
                    meter.accumulate(shard, parameters[number])
                done = position
            trace.repeat(notes.trace, slice(done, None), numbers)
            left = reversed(notes.kept)  # a list frees its last first
            kept.extend(meter.put_bytes(numbers[index]) for index in left)

        loss = here(notes.loss).requires_grad_()
        vars(loss).update(backward=backward, kept=kept)
        return loss


def hooks_of(model: nn.Module) -> list[Hook]:
    """All that acts on the passes of a model besides its modules and parameters, up to a gradient's accumulation."""
    modules, parameters = list(model.named_modules()), model.named_parameters()
    owned = [(f"{name}.{kind}", vars(module)[kind]) for name, module in modules for kind in _HOOKS]
    owned += [(name, p._backward_hooks) for name, p in parameters if p._backward_hooks]
    patched = [(name, vars(module)["forward"]) for name, module in modules if "forward" in vars(module)]
    return [*((name, hook) for name, hooks in owned for hook in hooks.values()), *patched]


def _stateful(hooks: list[Hook]) -> list[Any]:
    """Without their places: adapters rename modules."""
    return [hook for _, hook in hooks if not _is_stateless(hook)]


def _is_stateless(hook: Any) -> bool:
    """Does it do the same to all models that are alike? FSDP2's hooks leave its state as it was before both passes."""
    if isinstance(getattr(hook, "__self__", None), FSDPState):
        return True
    return isinstance(hook, FunctionType) and not (hook.__closure__ or hook.__defaults__ or hook.__kwdefaults__)


def _differentiates(method: object) -> bool:
    """Is its whole backward pass `loss.backward()`, with no gradients before?"""
    assert isinstance(method, MemoryEfficientOptimizer)
    own = type(method).backward
    plain = own is MemoryEfficientOptimizer.backward or (own is LOMO.backward and not method.needs_loss)
    parameters = list(method.model.parameters())
    hooked = any(is_sharded(p) and p._post_accumulate_grad_hooks for p in parameters)  # they share an allocation
    return plain and not hooked and not method.asks_losses and all(p.grad is None for p in parameters)
