"""The matrices of a model's layers, which some methods treat specially; everything else gets AdamW."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from optimizers.base import MemoryEfficientOptimizer
from optimizers.shared.blocks import find_layers, warn_of_layers_elsewhere
from optimizers.shared.construction import is_weight
from optimizers.shared.inner import InnerAdamW
from optimizers.shared.quantized import PIECE, pieces
from optimizers.shared.sharded import has_values

Groups = list[dict[str, Any]]
State = dict[str, Any]

AT_ONCE_ON_GPU = 1 << 24  # values of experts' matrices: ten of Qwen3-30B's, whose single products fill a part of one


@dataclass(frozen=True)
class Matrix:
    """A matrix of the layers, or that of one expert, as views of what belongs to its tensor.

    Attributes:
        of: the parameter.
        weights: (m, n), updated in place.
        gradient: (m, n).
        state: what is kept for it alone.
        key: its number among the layers' matrices, and that of the expert: of its random numbers.
    """

    of: Tensor
    weights: Tensor
    gradient: Tensor
    state: State
    key: tuple[int, ...]


def layer_matrices(model: nn.Module, *, experts: bool = True) -> dict[Tensor, int]:
    """The two-dimensional weights in the layers that require gradients, without embeddings, each with its number.

    Args:
        model: the model.
        experts: also those of three dimensions that are the matrices of as many experts, as transformers keeps them.
    """
    warn_of_layers_elsewhere(model)
    embeddings = {p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    inside = {p: name for layer in find_layers(model).values() for name, p in layer.named_parameters()}
    fused = set(expert_tensors(model)) if experts else set()
    weights = [p for p, name in inside.items() if is_weight(name, p) and p.requires_grad]
    found = [p for p in weights if (p.dim() == 2 and p not in embeddings) or p in fused]
    return {p: number for number, p in enumerate(found)}


def expert_tensors(model: nn.Module) -> Iterator[nn.Parameter]:
    """Tensors (experts, m, n), recognised by the type of their module, as attention is."""
    for module in model.modules():
        if "expert" in type(module).__name__.lower():
            yield from (p for p in module.parameters(recurse=False) if p.dim() == 3)


def experts_in(p: Tensor) -> int:
    """How many matrices a tensor of `layer_matrices` has."""
    return 1 if p.dim() == 2 else len(p)


def expected_of_matrices(p: Tensor, of_one: State) -> State:
    """The state of `p` where that of one matrix is `of_one`; as meta tensors."""
    return of_one if p.dim() == 2 else {name: _of_all(value, len(p)) for name, value in of_one.items()}


def _of_all(value: Any, experts: int) -> Any:
    return value.new_empty(experts, *value.shape) if torch.is_tensor(value) else [value] * experts


def input_dims(module: nn.Module, p: Tensor) -> tuple[int, ...]:
    """The input dimensions of a matrix (or larger tensor) of `module`; the others are output dimensions."""
    if isinstance(module, _ConvTransposeNd):  # (in, out, ...)
        return (0, *range(2, p.dim()))
    if isinstance(module, _ConvNd):
        return tuple(range(1, p.dim()))
    return (p.dim() - (2 if _is_transposed(module) else 1),)


def _is_transposed(module: nn.Module) -> bool:
    """Are its matrices (in, out)? transformers' Conv1D is a linear module that has them so; some experts say it."""
    return type(module).__name__ in ("Conv1D", "Llama4TextExperts") or getattr(module, "is_transposed", False) is True


def computed_at_once(p: Tensor) -> Iterator[Any]:
    """Places of a matrix, or of as many experts' as a batched product computes at once without large temporaries.

    Each expert's alone would keep a GPU waiting for the next of thousands of small kernels.
    """
    if p.dim() == 2:
        yield ...
    else:
        yield from pieces(p[:, 0, 0], max(1, (AT_ONCE_ON_GPU if p.is_cuda else PIECE) // p[0].numel()))


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


def update_matrices(
    optimizer: MemoryEfficientOptimizer,
    matrices: Mapping[Tensor, int],
    params: list[Tensor],
    grads: list[Tensor],
    group: dict[str, Any],
    update: Callable[[Matrix, dict[str, Any]], None],
    adamw: InnerAdamW | None = None,
) -> None:
    """Update those of `params` that are in `matrices` by `update`, the others as in `adamw_on_the_rest`.

    Args:
        optimizer: the method.
        matrices: the number of each parameter that `layer_matrices` has found.
        params, grads, group, adamw: as for `adamw_on_the_rest`.
        update: changes the weights of one matrix in place.
    """
    for p, g in adamw_on_the_rest(optimizer, matrices, params, grads, group, adamw):
        _update_each(update, p, g, optimizer.state[p], matrices[p], group)


def _update_each(
    update: Callable[[Matrix, dict[str, Any]], None],
    p: Tensor,
    g: Tensor,
    state: State,
    number: int,
    group: dict[str, Any],
) -> None:
    """Update `p` (m, n), or each of (experts, m, n), whose `state` has tensors of one more dimension, and lists.

    For fake tensors two experts are enough to find the bytes, the first of which has made the state: all others would
    reuse their memory.
    """
    if p.dim() == 2:
        update(Matrix(p, p, g, state, (number,)), group)
        return
    before = dict(state)  # what the first expert adds, the others don't have yet
    for expert in range(len(p) if has_values(p) else min(len(p), 2)):
        views = {name: value[expert] for name, value in before.items()}
        own = dict(views)
        update(Matrix(p, p[expert], g[expert], own, (number, expert)), group)
        for name, value in own.items():
            if name not in state:
                state[name] = _of_all(value, len(p))
            if value is not views.get(name):
                state[name][expert] = value


def with_rate_of_the_rest(groups: Groups, matrices: Collection[Tensor], rate: float) -> Groups:
    """`groups` of named parameters, split into groups of `matrices`, which come first, and the others at `rate`."""
    inside, outside = [], []
    for group in groups:
        own = [(name, p) for name, p in group["params"] if p in matrices]
        others = [(name, p) for name, p in group["params"] if p not in matrices]
        inside += [{**group, "params": own}] if own else []
        outside += [{**group, "params": others, "lr": rate}] if others else []
    return inside + outside
