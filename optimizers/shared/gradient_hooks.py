"""Hooks that act where autograd has accumulated a parameter's gradient.

They must not keep the method alive: the garbage collector can't see a hook on a tensor, so the model, to which the
method refers, would never be freed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from optimizers.base import MemoryEfficientOptimizer


def hook_gradients(method: MemoryEfficientOptimizer, act: Callable[[nn.Parameter], None]) -> None:
    """Call `act` with each parameter, trained now or later, whose gradient is complete."""
    for p in method._group_of:
        trained = p.requires_grad
        method._hooks.append(p.requires_grad_(True).register_post_accumulate_grad_hook(act))  # none on a frozen one
        p.requires_grad_(trained)


def count_apart(params: Iterable[nn.Parameter]) -> None:
    """Give each parameter a count of changes of its own.

    Those that were cut from one tensor share it, whatever their memory now is (transformers cuts a checkpoint's fused
    weights), so that autograd takes an update of one for a change of the others, which it may still need.
    """
    before = {p: p._version for p in params}
    torch.autograd.graph.increment_version(before)
    for p, version in before.items():
        if p._version > version + 1:
            apart = nn.Parameter(p.detach().clone(), p.requires_grad)
            apart.grad = p.grad
            torch.utils.swap_tensors(p, apart)


def updating(method: MemoryEfficientOptimizer) -> Callable[[nn.Parameter], None]:
    """The hook of `in_backward`."""
    known = weakref.ref(method)

    def update(p: nn.Parameter) -> None:
        alive = known()
        if alive is not None:
            alive._receive(p)

    return update


def changing(method: MemoryEfficientOptimizer) -> Callable[[nn.Parameter], None]:
    """The hook of a replica that updates in `step()`: there are gradients that aren't averaged."""
    known = weakref.ref(method)

    def change(p: nn.Parameter) -> None:
        alive = known()
        if alive is not None:
            alive._averaged = False

    return change
