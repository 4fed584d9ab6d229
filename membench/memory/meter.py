"""The memory meter: every allocation of a training step, sorted by purpose, exact to the byte on any device."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from membench.memory.breakdown import summarize
from membench.memory.collectives import is_collective, on_copies
from membench.memory.components import classify
from membench.memory.modules import AccumulateGrad, ModuleTracker
from membench.memory.stock import StockOptimizer
from membench.memory.trace import INPUTS, Trace
from optimizers import MemoryEfficientOptimizer
from reports.parts import (
    ACTIVATIONS,
    COMMUNICATION,
    GRADIENTS,
    OPTIMIZER_STATE,
    TEMPORARIES,
    UNSHARDED_WEIGHTS,
    WEIGHTS,
)

current_node = torch._C._current_autograd_node
_DEVICE = torch.ops.prim.device.default  # autograd asks a fake tensor for it at every turn


class MemoryMeter(TorchDispatchMode):
    """While entered, sees the output of every operation, and when the storage behind it is freed.

    A storage is counted once, however many views it has, and lives as long as the last of them. It is sorted, from its
    birth on, by what becomes of it:

    - weights: parameters and buffers of the model; under FSDP2 this rank's shards;
    - unsharded weights: what FSDP2 gathers of all ranks' shards for a module that runs;
    - gradients: what autograd accumulates into a parameter's `.grad`, whoever frees it and when;
    - optimizer state: tensors in `optimizer.state`, including fp32 masters;
    - activations: made in the forward phase, or when a checkpointed segment is recomputed, and still alive at its end:
      autograd keeps it for the backward pass. The inputs of a step (`hold`) count too;
    - communication: what collectives of torch.distributed read or write, and nothing of the above;
    - temporaries: everything else.

    What is allocated outside any phase (data, evaluation) isn't seen until it turns up in the model or optimizer. Only
    the device of the model's first parameter counts (by type: all its GPUs together). Works the same on real tensors
    and fake ones (enter the `FakeTensorMode` first), and with re-entrant and non-re-entrant checkpointing. It computes
    nothing itself, so the weights after a metered step are those after an unmetered one, to the last bit.

    What it can't see: the workspace that a kernel allocates and frees inside one operation (SVD, QR, convolutions,
    cuBLAS), and what an allocator adds by rounding (`allocator.py` estimates that). Some torch operations avoid working
    in place while any dispatch mode is on, which can add a temporary of one tensor's size. Python's garbage collector
    is disabled, and run before each forward phase, so that two runs agree to the byte.

    Args:
        model: the model being trained.
        optimizer: its optimizer. What `after_step` and `advance` allocate belongs to the phase "switch".

    Raises:
        ValueError: the model has no parameters.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | StockOptimizer | None = None):
        super().__init__()
        self.model = model
        self.optimizer = optimizer
        self.trace = Trace()
        self._modules = ModuleTracker(model)
        self._owned = [(p, self._modules.owner(p)) for p in model.parameters()]
        if not self._owned:
            raise ValueError(f"{type(model).__name__} has no parameters: there is no training step to meter")
        self._device = self._owned[0][0].device.type
        self._phase = ""
        self._alive: dict[int, _Watch] = {}
        self._segment: list[int] = []
        self._leaf: Any = None

    def __enter__(self) -> MemoryMeter:
        gc.collect()
        with ExitStack() as cleanup:
            cleanup.callback(self._alive.clear)
            if gc.isenabled():
                gc.disable()
                cleanup.callback(gc.enable)
            cleanup.enter_context(self._modules)
            if isinstance(self.optimizer, MemoryEfficientOptimizer):
                self._meter_switching(self.optimizer, cleanup)
            self._meter_resizing(cleanup)
            self._note_selection()
            self._scan(self.model.named_buffers())
            super().__enter__()
            cleanup.push(super().__exit__)
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._cleanup.__exit__(*exception)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Allocations within this context belong to the phase `name`: "forward", "backward", "update" or "switch"."""
        if name == "forward":
            gc.collect(1)
        outer, self._phase = self._phase, name
        try:
            yield
        finally:
            self._end_segment()
            self._leaf = None
            self._scan()
            self._phase = outer

    @contextmanager
    def hold(self, inputs: Any) -> Iterator[None]:
        """Within this context, count the tensors in `inputs` (nested in mappings and sequences) as activations."""
        first = len(self.trace.sizes)
        for tensor in _tensors(inputs):
            self._assign(tensor, ACTIVATIONS, INPUTS)
        held = range(first, len(self.trace.sizes))
        yield
        for watch in [watch for watch in self._alive.values() if watch.index in held]:
            self._freed(watch)

    def report(self) -> dict[str, Any]:
        """The peak and where it occurs; see `breakdown.summarize`."""
        return summarize(self.trace, classify(self.model))

    # ---- each operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:
            return args[0].device
        result = self._carry_out(func, args, kwargs or {})
        if not self._phase:
            return result
        node = self._node()
        if is_collective(func):
            self._see_communication((args, result))
            return result
        if self._is_gradient(result, node):
            self._assign(result, GRADIENTS, self._modules.owner(node.variable))
        elif not _only_aliases(func):
            for tensor in [result] if isinstance(result, Tensor) else _tensors(result):
                self._see(tensor, node)
        return result

    def _node(self) -> Any:
        return current_node()

    def _see_communication(self, tensors: Any) -> None:
        for tensor in _tensors(tensors):
            for index in self._see(tensor):
                if self.trace.parts[index] == TEMPORARIES:
                    self.trace.assign(index, COMMUNICATION, self.trace.modules[index])

    def _carry_out(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self._device == "cpu" and is_collective(func):
            return on_copies(func, args, kwargs)
        return func(*args, **kwargs)

    def _is_gradient(self, result: Any, node: Any) -> bool:
        """Is it what autograd accumulates: the first of the parameter's shape, before the parameter's hooks run?"""
        if not isinstance(node, AccumulateGrad) or not self._modules.owns(node.variable):
            self._leaf = None
            return False
        if node is self._leaf or not isinstance(result, Tensor) or result.shape != node.variable.shape:
            return False
        self._leaf = node
        return True

    def _see(self, tensor: Tensor, node: Any = None) -> list[int]:
        """The allocations behind a tensor (several for a wrapper or a sparse tensor); new ones are noted."""
        if tensor.device.type != self._device:
            return []
        return [self._allocation(storage, node) for storage in _storages(tensor) if storage.nbytes()]

    def _allocation(self, storage: torch.UntypedStorage, node: Any) -> int:
        watch = self._alive.get(storage._cdata)
        if watch is None:
            return self._allocate(storage, TEMPORARIES, self._modules.current(node, self._phase))
        index, size = watch.index, storage.nbytes()
        if size == self.trace.sizes[index]:
            return index
        self.trace.free(index)
        return self._allocate(storage, self.trace.parts[index], self.trace.modules[index])

    def _allocate(self, storage: torch.UntypedStorage, part: int, module: str) -> int:
        computing = self._is_computing_activations()
        if not computing:
            self._end_segment()
        index = self.trace.allocate(storage.nbytes(), part, self._phase, module)
        if computing:
            self._segment.append(index)
        self._watch(storage, index)
        return index

    def _watch(self, storage: torch.UntypedStorage, index: int) -> None:
        watch = _Watch(storage, self._freed)
        watch.index, watch.key = index, storage._cdata
        self._alive[watch.key] = watch

    def _is_computing_activations(self) -> bool:
        """Is this the forward phase, or a checkpointed segment being recomputed in the backward pass?"""
        if self._phase != "backward":
            return self._phase == "forward"
        return self._modules.inside() or (torch.is_grad_enabled() and current_node() is not None)

    def _end_segment(self) -> None:
        """Whatever a forward computation leaves behind at its end is kept for the backward pass."""
        trace = self.trace
        for index in self._segment:
            if not trace.freed[index] and trace.parts[index] == TEMPORARIES:
                trace.parts[index] = ACTIVATIONS
        self._segment.clear()

    def _freed(self, watch: Any) -> None:
        del self._alive[watch.key]
        if not self.trace.freed[watch.index]:
            self.trace.free(watch.index)

    def _meter_resizing(self, cleanup: ExitStack) -> None:
        """FSDP2 frees gathered weights, and makes room for them again, by resizing storages: no operation says so."""
        resize: Any = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self._resized(storage)
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        cleanup.callback(delattr, torch.UntypedStorage, "resize_")  # then it is inherited, as before

    def _resized(self, storage: torch.UntypedStorage) -> None:
        watch = self._alive.get(storage._cdata)
        if watch is None:
            return
        index, module = watch.index, self.trace.modules[watch.index]
        if not self.trace.freed[index]:
            self.trace.assign(index, UNSHARDED_WEIGHTS, module)
            self.trace.free(index)
        if storage.nbytes():
            self._allocate(storage, UNSHARDED_WEIGHTS, module)

    # ---- what exists between operations

    def _scan(self, buffers: Iterable[tuple[str, Tensor]] = ()) -> None:
        """Find weights, gradients and optimizer state, including new ones among the allocations seen."""
        for parameter, module in self._owned:
            self._assign(parameter, WEIGHTS, module)
            if parameter.grad is not None:
                self._assign(parameter.grad, GRADIENTS, module)
        for name, buffer in buffers:
            self._assign(buffer, WEIGHTS, name.rpartition(".")[0])
        if self.optimizer is not None:
            for p, state in self.optimizer.state.items():
                for tensor in _tensors(state):
                    self._assign(tensor, OPTIMIZER_STATE, self._modules.owner(p))

    def _assign(self, tensor: Tensor, part: int, module: str) -> None:
        for index in self._see(tensor):
            self.trace.assign(index, part, module)

    def _note_selection(self) -> None:
        selection = self.optimizer.selection if isinstance(self.optimizer, MemoryEfficientOptimizer) else None
        if not self.trace.selections or self.trace.selections[-1][1] != selection:
            self.trace.selections.append((len(self.trace.events), selection))

    def _meter_switching(self, optimizer: MemoryEfficientOptimizer, cleanup: ExitStack) -> None:
        """Give selection its own phase, on this one optimizer, until the meter is exited."""
        for name in ("after_step", "advance", "worst_case"):
            setattr(optimizer, name, self._as_switch(getattr(optimizer, name)))
            cleanup.callback(delattr, optimizer, name)

    def _as_switch(self, method: Any) -> Any:
        @wraps(method)
        def switch(*given: Any) -> None:
            self._scan()  # a switch may drop state that the scan at the phase's end would miss
            with self.phase("switch"):
                method(*given)
            self._note_selection()

        return switch


class _Watch(weakref.ref[torch.UntypedStorage]):
    """A weak reference from a storage to its allocation; torch keeps the Python object as long as the storage."""

    __slots__ = ("index", "key")
    index: int
    key: int


@cache
def _only_aliases(func: Any) -> bool:
    """Does an operation return only views of its arguments, so that nothing new can come from it?"""
    name, returns = func._schema.name, func._schema.returns
    may_resize = "out" in func._overloadname or name in ("aten::resize_", "aten::resize_as_", "aten::set_")
    return not may_resize and all(value.alias_info is not None for value in returns)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested mappings and sequences."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """The storages of a tensor: one, or those of the tensors inside a wrapper or sparse tensor."""
    if is_traceable_wrapper_subclass(tensor):
        for inner in (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]):
            if isinstance(inner, Tensor):  # a DTensor also has a mesh
                yield from _storages(inner)
    elif tensor.layout is torch.sparse_coo:
        yield tensor._indices().untyped_storage()
        yield tensor._values().untyped_storage()
    else:
        yield tensor.untyped_storage()
