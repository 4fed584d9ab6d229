"""The parts of a layer by category (attention matrices, MLP matrices, norms), recognised by module type."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn

from optimizers.shared.blocks import find_layers, without
from optimizers.shared.construction import is_weight

CATEGORIES = ("attention", "mlp", "norms")
Parts = dict[str, list[nn.Parameter]]  # a matrix with its bias, or a norm, by its name


def parts_of_layers(model: nn.Module, leave_out: Collection[nn.Parameter]) -> tuple[Parts, list[list[list[int]]]]:
    """All parts, and the numbers of the parts in each layer and category.

    Raises:
        ValueError: nothing in the layers is left to train.
    """
    all_parts: Parts = {}
    layers = []
    taken = set(leave_out)
    for layer_name, layer in find_layers(model).items():
        numbers: dict[str, list[int]] = {category: [] for category in CATEGORIES}
        for name, category, params in _parts_of(layer, layer_name):
            params = [p for p in params if p.requires_grad and p not in taken]
            if params:
                taken.update(params)
                numbers[category].append(len(all_parts))
                all_parts[name] = params
        layers.append(list(numbers.values()))
    if not all_parts:
        raise ValueError("nothing to draw from: all parameters of the layers are frozen or always trained")
    return all_parts, layers


def parts_without(
    parts: Parts, layers: list[list[list[int]]], left_out: Collection[nn.Parameter]
) -> tuple[Parts, list[list[list[int]]]]:
    """The result of `parts_of_layers` without these parameters; layers that become empty are dropped."""
    kept = without(parts, left_out)
    number = {name: i for i, name in enumerate(kept)}
    moved = {i: number[name] for i, name in enumerate(parts) if name in number}
    remaining = [[[moved[i] for i in category if i in moved] for category in layer] for layer in layers]
    return kept, [layer for layer in remaining if any(layer)]


def _parts_of(module: nn.Module, path: str, attends: bool = False) -> Iterator[tuple[str, str, list[nn.Parameter]]]:
    """Name, category and parameters of each part at or below `module`, by the types of modules, never their names."""
    named = dict(module.named_parameters(recurse=False))
    parts = {f"{path}.{name}": [p] for name, p in named.items() if is_weight(name, p)}  # of fused experts several
    others = {f"{path}.{name}": p for name, p in named.items() if not is_weight(name, p)}
    if others and not parts:
        yield path, "norms", list(others.values())
    for name, p in others.items() if parts else ():
        parts[_matrix_of(name, list(parts))].append(p)
    for name, params in parts.items():
        yield name, "attention" if attends else "mlp", params
    for name, child in module.named_children():
        yield from _parts_of(child, f"{path}.{name}", attends or "attention" in type(child).__name__.lower())


def _matrix_of(bias: str, matrices: list[str]) -> str:
    """The matrix that a bias goes with: its namesake (GPT-OSS's `down_proj` and `down_proj_bias`), else the first."""
    return next((matrix for matrix in matrices if bias.startswith(matrix)), matrices[0])
