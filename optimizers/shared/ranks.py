"""Training on several processes: what every method checks before it first updates, and when its choice changes.

Nothing here costs anything in a single process.
"""

from __future__ import annotations

import gc
import zlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from optimizers.shared.norms import norm_of
from optimizers.shared.replicas import Replicas
from optimizers.shared.sharded import is_sharded

if TYPE_CHECKING:
    from optimizers.base import MemoryEfficientOptimizer

TOLERANCE = 1e-5  # of the norm of the same gradients on two ranks, relative; different batches differ by far more

REPLICATE = (
    "build it on the plain model, without a wrapper, and call optimizer.data_parallel(); membench.MethodTrainer does so"
)
REPLICAS = "train replicas, by optimizer.data_parallel() without fully_shard(), or with --strategy replicate"
ALONE = "optimizer.data_parallel(group), with a group of this process alone, if each trains a model of its own"


def several(group: Any = None) -> bool:
    """Does the group (default: all) have more than one real process? Those of a fake one, for planning, don't count."""
    if not distributed.is_available() or not distributed.is_initialized():
        return False
    return distributed.get_world_size(group) > 1 and distributed.get_backend(group) != "fake"


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a `DistributedDataParallel`: there its parameters have their own names."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def check_model_on_ranks(method: MemoryEfficientOptimizer) -> None:
    """At construction: refuse shards that the method can't train, and adapters in a model that is wrapped or sharded.

    Raises:
        ValueError: says what to do instead.
    """
    name, sharded = type(method).__name__, any(is_sharded(p) for p in method.model.parameters())
    if sharded:
        check_shards(method)
    if method.adds_parameters and sharded:
        raise ValueError(
            f"{name} adds parameters, which a model that is already sharded would neither shard nor reduce: build it "
            "before fully_shard(model)"
        )
    if several() and method.adds_parameters and _is_wrapped(method.model):
        first = "build it first, then wrap the model, or " if method.why_not_sharded is None else ""
        raise ValueError(
            f"{name} changes parameters for others, which a DistributedDataParallel made before doesn't follow: "
            f"{first}use optimizer.data_parallel() instead of the wrapper"
        )


def check_shards(method: MemoryEfficientOptimizer) -> None:
    """Of a model that is sharded, or is going to be: refuse a method that can't train shards.

    Raises:
        ValueError: says why, and the way out.
    """
    if method.why_not_sharded is not None:
        raise ValueError(f"{type(method).__name__} {method.why_not_sharded}: {REPLICAS}")


def check_wrapper(method: MemoryEfficientOptimizer) -> None:
    """Refuse what a wrapper of the model can't do.

    Raises:
        ValueError: says what to do instead.
    """
    name = type(method).__name__
    if any(isinstance(module, FullyShardedDataParallel) for module in method.model.modules()):
        raise ValueError(f"{name} can't train the flattened parameters of FSDP1: use fully_shard(model), FSDP2")
    if not (method.chooses or method.in_backward or method.needs_loss or method.asks_losses):
        return
    if _is_wrapped(method.model):
        why = "updates inside the backward pass" if method.in_backward else "changes what it trains"
        why = "must see the loss of all ranks" if method.needs_loss and not method.in_backward else why
        why = "uses losses, not gradients" if method.asks_losses else why
        raise ValueError(f"{name} {why}, which DistributedDataParallel can't follow: {REPLICATE}")


def _is_wrapped(model: nn.Module) -> bool:
    """Is there a `DistributedDataParallel` of this model? The model doesn't know."""
    wrappers = (one for one in gc.get_objects() if issubclass(type(one), DistributedDataParallel))
    return any(wrapper.module is model or model in wrapper.module.modules() for wrapper in wrappers)


def mean_loss(method: MemoryEfficientOptimizer, loss: Tensor) -> Tensor:
    """The mean of a loss over the ranks that train the method's model."""
    replicas = method._replicas
    if replicas is None and several() and any(map(is_sharded, method._group_of)):
        replicas = Replicas()
    if replicas is None:
        return loss
    mean = loss.detach().clone()
    replicas.average([mean])
    return mean


def check(method: MemoryEfficientOptimizer, pairs: Iterable[tuple[nn.Parameter, Tensor | None]]) -> None:
    """If what is trained has changed: do all ranks train the same, and have they the same gradients of it?

    Args:
        method: the method.
        pairs: what it is about to update, with gradients if they have some; those of shards are different by nature.

    Raises:
        ValueError: there is a wrapper that the method can't work with.
        RuntimeError: the ranks differ; says in what, and the way out.
    """
    if not several(method._replicas.group if method._replicas else None):
        return
    trained = tuple(number for number, p in enumerate(method._group_of) if p.requires_grad)
    if trained == method._agreed:
        return
    if method._agreed is None and method._replicas is None:
        check_wrapper(method)
    _check_agreement(method, trained, _norm([g for p, g in pairs if g is not None]))
    method._agreed = trained


def _norm(grads: Sequence[Tensor]) -> float:
    norms = [norm_of(g) for g in grads if not is_sharded(g)]
    return torch.stack([norm.to(norms[0].device) for norm in norms]).norm().item() if norms else 0.0


def _settings(method: MemoryEfficientOptimizer) -> dict[str, Any]:
    """What must be the same on all ranks, by what a user would call it; of hyper-parameters, those of all groups."""
    groups = method.param_groups
    hyperparameters = {key: [_plain(group.get(key)) for group in groups] for key in method.defaults}
    return {"steps made": method._steps_done, "seed": method.seed, **hyperparameters}


def _plain(value: Any) -> Any:
    """A value that is equal where it is the same; of an object that isn't so in two processes, its kind."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Tensor):
        return value.tolist()
    return value if value is None or isinstance(value, int | float | str) else type(value).__name__


def _refuse_other_settings(name: str, settings: dict[str, Any], group: Any) -> None:
    """Raise RuntimeError with what differs. Digests are compared before: settings take more bytes than numbers."""
    found: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(found, settings, group=group)
    for key, first in found[0].items():
        for other in found:
            if other[key] != first:
                raise RuntimeError(
                    f"{name} doesn't have the same {key} on all ranks ({first} and {other[key]}): build it on each "
                    f"with the same seed and settings, and load the same state; or {ALONE}"
                )


def _check_agreement(method: MemoryEfficientOptimizer, trained: tuple[int, ...], norm: float) -> None:
    name, group = type(method).__name__, method._replicas.group if method._replicas else None
    settings = _settings(method)
    found: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(found, (trained, norm, zlib.crc32(repr(settings).encode())), group=group)
    if len({digest for _, _, digest in found}) > 1:
        _refuse_other_settings(name, settings, group)
    if any(theirs != trained for theirs, _, _ in found):
        raise RuntimeError(
            f"{name} doesn't train the same parameters on all ranks: build it on each with the same model, seed and "
            f"settings; or {ALONE}"
        )
    largest = max(norm for _, norm, _ in found)
    if any(not largest - norm <= TOLERANCE * largest for _, norm, _ in found):
        raise RuntimeError(
            f"the gradients that {name} is about to use differ between ranks, since nothing has averaged them: call "
            f"optimizer.data_parallel(), or build it after fully_shard(model); or {ALONE}"
        )
