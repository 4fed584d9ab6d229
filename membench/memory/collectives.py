"""Collectives of torch.distributed, as the meter carries them out."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed import Work
from torch.utils._pytree import tree_leaves, tree_map_only

WAIT = torch.ops._c10d_functional.wait_tensor.default
_ALIASES = ("wait_tensor", "_wrap_tensor_autograd")  # of what a collective returned


@cache
def is_collective(func: Any) -> bool:
    """Is this operation a collective?"""
    space, _, name = func._schema.name.partition("::")
    return space in ("c10d", "_c10d_functional") and name not in _ALIASES


def on_copies(func: Any, args: Any, kwargs: Any) -> Any:
    """A collective of tensors on the CPU, complete.

    Gloo's threads let go of a tensor some time after they are done with it. They get copies, so that it doesn't depend
    on them how long a buffer lives.
    """
    originals: dict[int, tuple[Tensor, Tensor]] = {}

    def copy(tensor: Tensor) -> Tensor:
        made = tensor.clone()
        originals[id(made)] = tensor, made
        return made

    def original(tensor: Tensor) -> Tensor:
        return originals[id(tensor)][0] if id(tensor) in originals else tensor.clone()

    result = func(*tree_map_only(Tensor, copy, args), **tree_map_only(Tensor, copy, kwargs))
    for one in tree_leaves(result):
        if isinstance(one, Tensor):
            torch.ops._c10d_functional.wait_tensor(one)
        elif isinstance(one, torch.ScriptObject):
            Work.unbox(one).wait()
    for tensor, made in originals.values():
        tensor.copy_(made)
    return tree_map_only(Tensor, original, result)
