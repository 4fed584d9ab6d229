"""The matrices of a model's layers, which some methods treat specially; everything else gets AdamW."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from optimizers.base import MemoryEfficientOptimizer
from optimizers.shared.blocks import find_layers
from optimizers.shared.construction import is_weight
from optimizers.shared.inner import InnerAdamW

Groups = list[dict[str, Any]]


def layer_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The two-dimensional weights in the model's layers that require gradients, without embeddings."""
    embeddings = {p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    inside = {p: name for layer in find_layers(model).values() for name, p in layer.named_parameters()}
    weights = [p for p, name in inside.items() if is_weight(name, p)]
    return [p for p in weights if p.requires_grad and p.dim() == 2 and p not in embeddings]


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
