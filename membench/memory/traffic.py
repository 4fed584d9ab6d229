"""What a rank sends: bytes that it gives to the collectives of torch.distributed."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from membench.memory.collectives import is_collective

SENT = {"allreduce_", "broadcast_", "_allgather_base_", "allgather_", "_reduce_scatter_base_", "reduce_scatter_"}
_INPUT = {"_allgather_base_": 1, "allgather_": 1, "_reduce_scatter_base_": 1, "reduce_scatter_": 1}  # its place


class Traffic(TorchDispatchMode):
    """While entered, adds up the bytes of this rank's part in every collective, `sent_bytes`.

    What crosses a wire depends on the algorithm: a ring sends nearly twice the bytes of an all-reduce.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func._schema.name.partition("::")
        if space == "c10d" and name in SENT:
            given = args[_INPUT.get(name, 0)]
            self.sent_bytes += sum(t.nbytes for t in tree_leaves(given) if isinstance(t, Tensor))
        elif space == "_c10d_functional" and is_collective(func):
            self.sent_bytes += sum(t.nbytes for t in tree_leaves(args[0]) if isinstance(t, Tensor))
        return func(*args, **(kwargs or {}))
