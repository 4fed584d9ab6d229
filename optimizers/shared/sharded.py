"""Models sharded by torch's FSDP2 (`fully_shard`): parameters, gradients and states are `DTensor`s.

A method whose update treats each weight by itself runs on the shards as they are. For any other, one tensor at a time
is gathered, updated alike on all ranks, and each rank keeps its shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.overrides import TorchFunctionMode

State = dict[str, Any]


def is_sharded(t: Any) -> bool:
    """Is it a `DTensor`, of which this process holds a part?"""
    return isinstance(t, DTensor)


def own_part(t: Tensor) -> Tensor:
    """This rank's shard of a tensor; a plain one is returned as it is."""
    return t.to_local() if isinstance(t, DTensor) else t


def has_values(t: Tensor) -> bool:
    """False for fake and meta tensors, and shards of them: a choice by values then takes the worst case in bytes."""
    local = own_part(t)
    return not isinstance(local, FakeTensor) and not local.is_meta


def gathered(t: Tensor) -> Tensor:
    """All of a tensor, on every rank; a plain one is returned as it is."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def sharded_like(t: Tensor, p: Tensor) -> Tensor:
    """The part of `t`, which is equal on all ranks, that goes with this rank's shard of `p`; a copy."""
    assert isinstance(p, DTensor)
    return distribute_tensor(t, p.device_mesh, p.placements, src_data_rank=None)


def placed(value: Any, p: Tensor) -> Any:
    """`value` as the state of `p` holds it: a tensor of its shape is sharded as `p` is; anything else is kept whole."""
    if not torch.is_tensor(value) or is_sharded(value) == is_sharded(p):
        return value
    if not is_sharded(p):
        return gathered(value)
    return sharded_like(value, p) if value.shape == p.shape and value.dim() else value


@contextmanager
def whole(p: nn.Parameter, state: State) -> Iterator[None]:
    """Within this context torch computes with all of `p`, and with what `state` keeps for all of it.

    `p` itself remains the key of everything that a method knows of it. At the end each rank keeps its shards.
    """
    weight = gathered(p.detach())
    state |= {key: gathered(value) for key, value in state.items() if is_sharded(value)}
    with _InPlaceOf(p, weight):
        yield
    p.copy_(sharded_like(weight, p))
    state |= {key: placed(value, p) for key, value in state.items()}


class _InPlaceOf(TorchFunctionMode):
    """Every function of torch gets `weight` where it is given `p`."""

    def __init__(self, p: Tensor, weight: Tensor):
        super().__init__()
        self._p, self._weight = p, weight

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__hash__:
            return func(*args)
        return func(*map(self._swap, args), **{name: self._swap(value) for name, value in (kwargs or {}).items()})

    def _swap(self, value: Any) -> Any:
        if value is self._p:
            return self._weight
        return type(value)(map(self._swap, value)) if type(value) in (list, tuple) else value  # tensors, together


def reshard(model: nn.Module) -> None:
    """Leave each sharded module with its shards alone.

    Some have their whole parameters: between forward and backward pass, after an evaluation, or as a loop has it
    (`set_reshard_after_backward(False)`). Those would be computed with after an update of the shards.
    """
    for module in _sharded_modules(model):
        module.reshard()


def follow_choice(model: nn.Module) -> None:
    """Let a sharded model reduce gradients as its mixed precision says, of whatever requires them now.

    FSDP2 notes the dtypes of a module's gradients at its first use, and none where all of it is frozen then.
    """
    for module in _sharded_modules(model):
        state: Any = module._get_fsdp_state()
        for group in vars(state).get("_fsdp_param_groups") or [state._fsdp_param_group]:  # the one of torch before 2.13
            if group is not None:
                group.lazy_init()


def _sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def replaced_parameters(model: nn.Module, known: Mapping[nn.Parameter, str]) -> dict[Tensor, nn.Parameter]:
    """For parameters that sharding has replaced since they were known by their names: the shards in their place."""
    if all(map(is_sharded, known)):
        return {}
    reshard(model)
    now = {_plain(name): p for name, p in model.named_parameters()}
    new = {p: now.get(_plain(name), p) for p, name in known.items() if not is_sharded(p)}
    return {p: shard for p, shard in new.items() if shard is not p and is_sharded(shard)}


def _plain(name: str) -> str:
    """A parameter's name without what wrappers add."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def put_in_place(value: Any, new: Mapping[Tensor, nn.Parameter]) -> Any:
    """`value` with each parameter replaced by its `new` one; containers and a method's own objects in place."""
    if isinstance(value, Tensor):
        return new.get(value, value)
    if isinstance(value, dict):
        items = [(put_in_place(key, new), put_in_place(item, new)) for key, item in value.items()]
        value.clear()
        value.update(items)
    elif isinstance(value, list):
        value[:] = [put_in_place(item, new) for item in value]
    elif isinstance(value, set):
        items = [put_in_place(item, new) for item in value]
        value.clear()
        value.update(items)
    elif type(value) in (tuple, frozenset):
        return type(value)(put_in_place(item, new) for item in value)
    elif type(value).__module__.split(".")[0] != "torch" and _has_contents(value):
        put_in_place(vars(value), new)
    return value


def _has_contents(value: Any) -> bool:
    skipped = type | nn.Module | torch.optim.Optimizer
    return hasattr(value, "__dict__") and not callable(value) and not isinstance(value, skipped)
