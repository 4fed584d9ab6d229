"""Modules that stand in for linear ones while a method trains: in few bits, or as a product of factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SIZES = ("in_features", "out_features", "nx", "nf")  # as `nn.Linear` and transformers' `Conv1D` say them


class StandIn(nn.Module):
    """Replaces a linear module (`nn.Linear`, or `Conv1D` of transformers) until `restore`.

    It has the module's hooks, in the same dicts, so that their handles can still remove them. A subclass has W in some
    form, and the module's `bias`.

    Args:
        dense: the module.
    """

    def __init__(self, dense: Any):
        super().__init__()
        shared = [name for name in vars(self) if "hook" in name]
        vars(self).update({name: vars(dense)[name] for name in (*shared, *SIZES) if name in vars(dense)})
        self._dense = (dense,)  # in a tuple, so that it doesn't become a submodule
        self._is_transposed = not isinstance(dense, nn.Linear)

    def dense_weight(self) -> Tensor:
        """W in the dense module's layout and dtype."""
        raise NotImplementedError

    @torch.no_grad()
    def restore(self) -> Any:
        """The dense module, its weight now W."""
        (dense,) = self._dense
        dense.weight.data = self.dense_weight()
        return dense


def stand_ins(model: nn.Module) -> dict[str, StandIn]:
    """Those of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, StandIn)}


def restore_linears(model: nn.Module) -> None:
    """Put the dense modules back in place of all that stand in for them."""
    for owner in list(model.modules()):
        for attribute, module in list(owner.named_children()):
            if isinstance(module, StandIn):
                setattr(owner, attribute, module.restore())


@torch.no_grad()
def dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What `model.state_dict()` will be after `restore_linears`; the model isn't changed."""
    modules = stand_ins(model)
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        name, _, kind = key.rpartition(".")
        if name not in modules or kind == "bias":
            state[key] = value
        elif f"{name}.weight" not in state:  # the first of its own tensors
            state[f"{name}.weight"] = modules[name].dense_weight()
    return state
