"""The memory meter on fake tensors: it asks the cache of their mode itself, instead of through torch's dispatcher."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from membench.memory.collectives import WAIT
from membench.memory.meter import MemoryMeter
from membench.memory.modules import AccumulateGrad
from membench.planning.fake import UNKNOWN, QuickFakeTensorMode
from optimizers.shared.sharded import own_part

_EMPTY = torch.ops.aten.empty_strided.default


class Place(NamedTuple):
    """The allocation of a tensor, and what it takes to make another; `offset` elements of it come before."""

    allocation: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    offset: int = 0

    def around(self, size: int) -> Place:
        """The place of a tensor that fills the allocation, of so many bytes."""
        return self._replace(shape=torch.Size([size // self.dtype.itemsize]), stride=(1,), offset=0)


class FakeMeter(MemoryMeter):
    """A `MemoryMeter` within the mode `fake`."""

    # torch guards each call of a mode against being compiled, which costs as much as the call; nothing compiles here
    __torch_dispatch__ = inspect.unwrap(MemoryMeter.__torch_dispatch__)

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, fake: QuickFakeTensorMode):
        super().__init__(model, optimizer)
        self._fake = fake
        self._accumulating: Any = None  # autograd's node, while its hooks run without autograd
        # allocations made while a parameter's gradient is accumulated, and its hooks run
        self.of_gradients: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def _carry_out(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is WAIT:
            return args[0]  # as in reality; torch's fake one makes another tensor
        result = self._fake.recall(func, args, kwargs)
        return func(*args, **kwargs) if result is UNKNOWN else result

    def _see(self, tensor: Tensor, node: Any = None) -> list[int]:
        if type(tensor) is not FakeTensor:
            return super()._see(tensor, node)
        storage = tensor.untyped_storage()
        here = tensor.fake_device.type == self._device and storage.nbytes()
        return [self._allocation(storage, node)] if here else []

    def _allocation(self, storage: torch.UntypedStorage, node: Any) -> int:
        seen = len(self.trace.sizes)
        index = super()._allocation(storage, node)
        if index >= seen and isinstance(node, AccumulateGrad):
            self.of_gradients.add(index)
        return index

    def _node(self) -> Any:
        return self._accumulating or super()._node()

    def place(self, tensor: Tensor) -> Place | None:
        """The place of a tensor, or of this rank's shard of it, if it fills an allocation that was noted.

        FSDP2 makes the shards of several gradients in one allocation.
        """
        local = own_part(tensor)
        watch = self._alive.get(local.untyped_storage()._cdata)
        if watch is None or (local is tensor and self.trace.sizes[watch.index] != local.nbytes):
            return None
        return Place(watch.index, local.shape, local.stride(), local.dtype, local.device, int(local.storage_offset()))

    def put(self, place: Place) -> Tensor:
        """A new tensor for an allocation that is noted already."""
        allocation, shape, stride, dtype, device, _ = place
        tensor: Tensor = self._fake.dispatch(_EMPTY, (), (shape, stride), {"dtype": dtype, "device": device})
        self._watch(tensor.untyped_storage(), allocation)
        return tensor

    def put_bytes(self, allocation: int) -> Tensor:
        """A new tensor of bytes, which nobody will look at, for an allocation that is noted already."""
        shape = torch.Size([self.trace.sizes[allocation]])
        return self.put(Place(allocation, shape, (1,), torch.uint8, torch.device(self._device)))

    def accumulate(self, gradient: Tensor, p: nn.Parameter) -> None:
        """Give `p` its gradient (a shard, its shard's), and let hooks act on it, as in a backward pass."""
        if isinstance(p, DTensor):
            gradient = DTensor.from_local(gradient, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
        p.grad = gradient
        del gradient  # the parameter alone holds it
        hooks: Any = p._post_accumulate_grad_hooks
        if not hooks:
            return
        self._accumulating = self._leaf = torch.autograd.graph.get_gradient_edge(p).node
        try:
            with torch.no_grad():
                for hook in list(hooks.values()):
                    hook(p)
        finally:
            self._accumulating = self._leaf = None
