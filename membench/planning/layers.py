"""Which layers of a model are alike, and hence which few depths represent the whole."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from itertools import chain
from typing import Any

from torch import nn

from optimizers.shared.blocks import find_layers

SHALLOWEST = 2  # layers: a first and a last
LAST = 2  # layers at the end of a simulated model that must be of the same kinds as the model's own last ones
_NUMBER = re.compile(r"idx|index|layer_(id|num)")  # attributes that number layers: these always differ


def kinds(model: nn.Module, listed: Mapping[str, Sequence[Any]] | None = None) -> dict[str, Hashable]:
    """A value for each layer, by name: layers with equal values have the same modules, shapes, flags and `listed`.

    Args:
        model: built, on any device.
        listed: what its configuration lists per layer.
    """
    rows = [str(row) for row in zip(*(listed or {}).values(), strict=True)]
    layers = find_layers(model)
    entries = rows if len(rows) == len(layers) else [""] * len(layers)
    return {name: (entry, kind(layer)) for (name, layer), entry in zip(layers.items(), entries, strict=True)}


def kind(module: nn.Module) -> Hashable:
    """A value that two modules share if both have the same modules, shapes of parameters and buffers, and flags."""
    return tuple([(name, type(inner), _flags(inner), _shapes(inner)) for name, inner in module.named_modules()])


def _flags(module: nn.Module) -> tuple[str, ...]:
    plain = bool | int | float | str | None
    return tuple([f"{k}={v}" for k, v in vars(module).items() if isinstance(v, plain) and not _NUMBER.search(k)])


def _shapes(module: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    own = chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
    return tuple([(name, tuple(tensor.shape)) for name, tensor in own])


def ends(of: dict[str, Hashable]) -> set[str]:
    """The names of the first and the last layer of each kind, given the kind of each layer."""
    first = {kind: name for name, kind in reversed(of.items())}
    last = {kind: name for name, kind in of.items()}
    return {*first.values(), *last.values()}


def simulated_depths(of: Sequence[Hashable]) -> tuple[int, ...]:
    """Three small depths between which the model grows by the same layers each time; its own depth if there are none.

    Args:
        of: the kind of each layer.
    """
    depth = len(of)
    found = [
        (first, first + period, first + 2 * period)
        for period in range(1, depth)
        for first in range(max(SHALLOWEST, 1 + period), depth - 2 * period)
        if (depth - first) % period == 0 and _grows_alike(of, first, period)
    ]
    return min(found, key=lambda depths: (depths[-1], depths), default=(depth,))


def _grows_alike(of: Sequence[Hashable], first: int, period: int) -> bool:
    repeats = all(of[i] == of[i - period] for i in range(first + period, len(of)))
    return repeats and all(of[first - i] == of[first + period - i] for i in range(1, LAST + 1))
