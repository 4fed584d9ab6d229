"""One run on several processes (ranks): the model's shards or replicas, each rank's share of a batch, their sums."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

import optimizers
from membench.training.checkpoint import digest
from optimizers import MemoryEfficientOptimizer
from optimizers.shared.blocks import find_layers
from optimizers.shared.ranks import check_shards
from optimizers.shared.sharded import gathered, sharded_like

Build = Callable[[nn.Module], MemoryEfficientOptimizer]


def ranks() -> int:
    """How many processes make this run together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """The number of this process among them."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def place(model: nn.Module, method: str, strategy: str, build: Build) -> MemoryEfficientOptimizer:
    """Build a method on `model`, sharded ("fsdp2") or replicated ("replicate") over the ranks.

    Args:
        model: whole.
        method: its name.
        strategy: one of those of `TrainingOptions`.
        build: makes the method on a model.
    """
    if ranks() == 1:
        return build(model)
    if strategy == "replicate":
        optimizer = build(model)
        optimizer.data_parallel()
        return optimizer
    adapts = optimizers.get(method).adds_parameters
    optimizer = build(model if adapts else _sharded(model))
    if adapts:  # adapters are sharded with the rest
        check_shards(optimizer)
        _sharded(model)
    return optimizer


def _sharded(model: nn.Module) -> nn.Module:
    with unset_fake_temporarily():  # a mesh holds numbers of ranks, which a plan's fake tensors wouldn't
        mesh = init_device_mesh(next(model.parameters()).device.type, (ranks(),))
    for layer in find_layers(model).values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def share_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's rows of a batch.

    Raises:
        ValueError: its tensors don't have the same rows, or not as many for each rank.
    """
    count = ranks()
    if count == 1:
        return batch
    rows = {len(value) for value in batch.values()}
    if len(rows) != 1 or rows.pop() % count:
        raise ValueError(f"the batches of this task can't be divided among {count} processes: leave --processes out")
    size = len(next(iter(batch.values()))) // count
    return {key: value[rank() * size : (rank() + 1) * size] for key, value in batch.items()}


def check_same(batches: Sequence[dict[str, Tensor]]) -> None:
    """Refuse batches of which the ranks couldn't each take their share: they differ between them.

    Raises:
        ValueError: says what a task must do.
    """
    if ranks() > 1 and len(set(of_all_ranks(digest(batches)))) > 1:
        raise ValueError(
            "the processes drew different batches of one step: batch(step) of a task must be a function of its seed "
            "and the step, so draw from torch.Generator().manual_seed(...) or numpy.random.default_rng((seed, step))"
        )


def mean_of(loss: Tensor) -> Tensor:
    """The mean of the ranks' losses, each weighted by its share of the labels times the number of ranks."""
    if ranks() == 1:
        return loss
    total = loss.detach().double()
    distributed.all_reduce(total)
    return total / ranks()


def of_all_ranks(value: Any) -> list[Any]:
    """The ranks' values, in their order."""
    values: list[Any] = [None] * ranks()
    if ranks() == 1:
        return [value]
    distributed.all_gather_object(values, value)
    return values


def is_sharded(model: nn.Module) -> bool:
    """Is it sharded over the ranks?"""
    return isinstance(model, FSDPModule)


def whole(state: Any) -> Any:
    """A state with all of each sharded tensor, on the CPU of the first rank; the other ranks get None for it."""
    if isinstance(state, DTensor):
        tensor = gathered(state)
        return tensor.cpu() if rank() == 0 else None
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    return [whole(value) for value in state] if isinstance(state, list) else state


def shards(state: dict[str, Tensor], named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """What `load_state_dict` of a model with these parameters takes: each rank's part of a whole state."""
    sharded = {name: p for name, p in named if isinstance(p, DTensor)}
    with torch.no_grad():
        return {
            name: sharded_like(value.to(sharded[name].device), sharded[name]) if name in sharded else value
            for name, value in state.items()
        }
