"""Which module of a model is running, in the forward or the backward pass, if any."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from membench.memory.trace import OPTIMIZER, ROOT

# Autograd's node that accumulates into a leaf's `.grad`; the leaf is its `variable`.
AccumulateGrad: Any = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]


class ModuleTracker:
    """Follows forward passes by two hooks on all modules, and backward passes by the numbers of autograd's nodes.

    Autograd numbers its nodes as it creates them, so a node's number tells which module was running at that time.
    """

    def __init__(self, model: nn.Module):
        self._names = {module: name for name, module in model.named_modules()}
        self._owners: dict[int, str] = {}
        for name, p in model.named_parameters():
            self._owners[id(p)] = name.rpartition(".")[0]
        self._sharded = isinstance(model, FSDPModule)
        self._stack: list[str] = []
        self._numbers: list[int] = [0]  # from this number on, autograd's nodes were made
        self._makers: list[str] = [ROOT]  # by this module
        self._handles: list[Any] = []

    def __enter__(self) -> ModuleTracker:
        self._handles = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
        ]
        return self

    def __exit__(self, *exception: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def owner(self, p: Tensor) -> str:
        """The module to which a parameter belongs; the first, if it is tied."""
        return self._owners.get(id(p), ROOT)

    def owns(self, leaf: Tensor) -> bool:
        """Is it a parameter of the model, rather than an input that was made to require gradients?"""
        return id(leaf) in self._owners or (self._sharded and self._find(leaf))

    def _find(self, leaf: Tensor) -> bool:
        """Is it in the place of a parameter now, as FSDP2's unsharded ones are while their module runs?"""
        for module, name in self._names.items():
            for p in module._parameters.values():
                self._owners.setdefault(id(p), name)  # all that are there, since more of them will be asked about
        return id(leaf) in self._owners

    def inside(self) -> bool:
        """Is a module's forward running?"""
        return bool(self._stack)

    def current(self, node: Any, phase: str) -> str:
        """The module that is running; `node` is the autograd node being executed, or None."""
        if self._stack:
            return self._stack[-1]
        if node is None:
            return ROOT if phase == "forward" else OPTIMIZER
        if isinstance(node, AccumulateGrad):
            return self.owner(node.variable)
        return self._makers[bisect_right(self._numbers, node._sequence_nr()) - 1]

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        outer = self._stack[-1] if self._stack else ROOT
        self._stack.append(self._names.get(module, outer))
        self._note_maker(self._stack[-1])

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        self._stack.pop()
        self._note_maker(self._stack[-1] if self._stack else ROOT)

    def _note_maker(self, name: str) -> None:
        number = torch.autograd._get_sequence_nr()
        if number == self._numbers[-1]:
            self._makers[-1] = name
        elif number > self._numbers[-1]:
            self._numbers.append(number)
            self._makers.append(name)
