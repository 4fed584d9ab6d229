"""The matrices of a model's layers, which some methods treat specially; everything else gets AdamW."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from optimizers.base import MemoryEfficientOptimizer
from optimizers.shared.blocks import find_layers
from optimizers.shared.construction import is_weight
from optimizers.shared.inner import InnerAdamW
from optimizers.shared.sharded import has_values

Groups = list[dict[str, Any]]


def layer_matrices(model: nn.Module, *, experts: bool = False) -> list[nn.Parameter]:
    """The two-dimensional weights in the model's layers that require gradients, without embeddings.

    Args:
        model: the model.
        experts: also those of three dimensions that are the matrices of as many experts (`matrices_of`), as
            transformers keeps them.
    """
    embeddings = {p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    inside = {p: name for layer in find_layers(model).values() for name, p in layer.named_parameters()}
    fused = set(_of_experts(model)) if experts else set()
    weights = [p for p, name in inside.items() if is_weight(name, p) and p.requires_grad]
    return [p for p in weights if (p.dim() == 2 and p not in embeddings) or p in fused]


def matrices_of(p: Tensor) -> Iterator[Any]:
    """The places in `p` of its matrices: all of it, or one of each expert.

    For fake tensors one expert is enough to find the bytes: all others would reuse its memory.
    """
    yield from [...] if p.dim() == 2 else range(len(p) if has_values(p) else min(len(p), 1))


def warn_of_experts(name: str, model: nn.Module) -> None:
    """Say what the method `name` leaves to AdamW that one would expect it to compress."""
    fused = [p for p in _of_experts(model) if p.requires_grad]
    if fused:
        share = sum(p.numel() for p in fused) / sum(p.numel() for p in model.parameters())
        warnings.warn(
            f"{name} projects single matrices: experts that are kept in one tensor, {share:.0%} of this model's "
            "weights, are trained by AdamW, with its states; muon and sinkgd take each expert's matrix",
            stacklevel=3,
        )


def _of_experts(model: nn.Module) -> Iterator[nn.Parameter]:
    """Tensors (experts, m, n), recognised by the type of their module, as attention is."""
    for module in model.modules():
        if "expert" in type(module).__name__.lower():
            yield from (p for p in module.parameters(recurse=False) if p.dim() == 3)


def input_dims(module: nn.Module, p: Tensor) -> tuple[int, ...]:
    """The input dimensions of a matrix (or larger tensor) of `module`; the others are output dimensions."""
    if isinstance(module, _ConvNd):
        return tuple(range(1, p.dim()))
    # transformers' Conv1D is a linear module with its weight transposed
    return (0,) if type(module).__name__ == "Conv1D" else (p.dim() - 1,)


def adamw_on_the_rest(
    optimizer: MemoryEfficientOptimizer,
    matrices: Collection[Tensor],
    params: list[Tensor],
    grads: list[Tensor],
    group: dict[str, Any],
    adamw: InnerAdamW | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Update the `params` that aren't in `matrices` by AdamW: `adamw`, or one in their own precision.

    Returns:
        The others with their gradients.
    """
    rest = [i for i, p in enumerate(params) if p not in matrices]
    if rest:
        adamw = adamw or InnerAdamW(optimizer.model, master_weights=False)
        trained = [params[i] for i in rest]
        states, keys = [optimizer.state[p] for p in trained], optimizer.rounding_keys(trained)
        adamw.update(states, trained, [grads[i] for i in rest], group, keys)
    return [(p, g) for p, g in zip(params, grads, strict=True) if p in matrices]


def with_rate_of_the_rest(groups: Groups, matrices: Collection[Tensor], rate: float) -> Groups:
    """`groups` of named parameters, split into groups of `matrices`, which come first, and the others at `rate`."""
    inside, outside = [], []
    for group in groups:
        own = [(name, p) for name, p in group["params"] if p in matrices]
        others = [(name, p) for name, p in group["params"] if p not in matrices]
        inside += [{**group, "params": own}] if own else []
        outside += [{**group, "params": others, "lr": rate}] if others else []
    return inside + outside
