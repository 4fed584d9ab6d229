"""The memory meter on fake tensors: it asks the cache of their mode itself, instead of through torch's dispatcher."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from membench.memory.collectives import WAIT
from membench.memory.meter import MemoryMeter
from membench.memory.modules import AccumulateGrad
from membench.planning.fake import UNKNOWN, QuickFakeTensorMode


class FakeMeter(MemoryMeter):
    """A `MemoryMeter` within the mode `fake`."""

    # torch guards each call of a mode against being compiled, which costs as much as the call; nothing compiles here
    __torch_dispatch__ = inspect.unwrap(MemoryMeter.__torch_dispatch__)

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, fake: QuickFakeTensorMode):
        super().__init__(model, optimizer)
        self._fake = fake
        self.of_gradients: set[int] = (
            set()
        )  # allocations made while a parameter's gradient is accumulated, and its hooks run

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def _carry_out(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is WAIT:
            return args[0]  # as in reality; torch's fake one makes another tensor
        result = self._fake.recall(func, args, kwargs)
        return func(*args, **kwargs) if result is UNKNOWN else result

    def _allocation(self, storage: torch.UntypedStorage, node: Any) -> int:
        seen = len(self.trace.sizes)
        index = super()._allocation(storage, node)
        if index >= seen and isinstance(node, AccumulateGrad):
            self.of_gradients.add(index)
        return index
