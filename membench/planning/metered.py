"""The memory meter on fake tensors: it asks the cache of their mode itself, instead of through torch's dispatcher."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from membench.memory.meter import MemoryMeter
from membench.planning.fake import UNKNOWN, QuickFakeTensorMode


class FakeMeter(MemoryMeter):
    """A `MemoryMeter` within the mode `fake`."""

    # torch guards each call of a mode against being compiled, which costs as much as the call; nothing compiles here
    __torch_dispatch__ = inspect.unwrap(MemoryMeter.__torch_dispatch__)

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, fake: QuickFakeTensorMode):
        super().__init__(model, optimizer)
        self._fake = fake

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def _carry_out(self, func: Any, args: Any, kwargs: Any) -> Any:
        result = self._fake.recall(func, args, kwargs)
        return func(*args, **kwargs) if result is UNKNOWN else result
