"""The papers' own formulas, to compare with a plan: they leave out activations and temporaries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from membench.planning.blueprint import Blueprint
from optimizers.shared.blocks import find_layers
from optimizers.shared.matrices import experts_in, layer_matrices


@dataclass(frozen=True)
class Facts:
    """The quantities in the formulas.

    Attributes:
        weights: M, for the whole model.
        layers: D.
        width: m, of the hidden state.
        matrices: (rows, columns) of each matrix in the layers.
        shards: N, over which ranks the model is sharded.
    """

    weights: int
    layers: int
    width: int
    matrices: tuple[tuple[int, int], ...]
    shards: int = 1


Formula = tuple[str, Callable[[Facts, Mapping[str, Any]], float]]

# BAdam, Table 1 (Luo, Yu & Li, 2024, arXiv 2404.02827), in bytes for M weights; GaLore, Table 1 (Zhao et al., 2024,
# arXiv 2403.03507): weights and states, in 16 bits. The papers of all other methods have no formula.
FORMULAS: dict[str, Formula] = {
    "adamw": ("18M", lambda facts, values: 18 * facts.weights),
    "lomo": ("2M + 2M/D", lambda facts, values: 2 * facts.weights * (1 + 1 / facts.layers)),
    "lora": (
        "2M + 36rM/m",
        lambda facts, values: 2 * facts.weights + 36 * values["rank"] * facts.weights / facts.width,
    ),
    "badam": ("2M + 16M/D", lambda facts, values: (2 + 16 / facts.layers) * facts.weights),
    "galore": ("mn + mr + 2nr", lambda facts, values: 2 * (facts.weights + _galore_states(facts, values["rank"]))),
}

# Of a rank, without buffers: ZeRO-3, Figure 1 (Rajbhandari et al., SC 2020, arXiv 1910.02054), and BAdam's README.
SHARDED: dict[str, Formula] = {
    "adamw": ("16M/N", lambda facts, values: 16 * facts.weights / facts.shards),
    "badam": ("(2M + 16M/D)/N", lambda facts, values: (2 + 16 / facts.layers) * facts.weights / facts.shards),
}

# What the papers count: with other values of these hyper-parameters a method keeps something else.
COUNTED: dict[str, tuple[str, ...]] = {
    "states": ("full",),
    "base": ("full",),
    "inner": ("adamw",),
    "variant": ("lora", "rslora", "pissa", "lora+"),
}


def facts(blueprint: Blueprint, weights: int) -> Facts:
    """The facts about a model with `weights` weights."""
    layers = find_layers(blueprint.skeleton)
    shapes = [(p.shape[-2], p.shape[-1]) for p in layer_matrices(blueprint.skeleton) for _ in range(experts_in(p))]
    return Facts(
        weights, len(layers), int(blueprint.source.config.hidden_size), tuple(shapes), blueprint.workload.shards
    )


def formula(method: str, known: Facts, values: Mapping[str, Any]) -> tuple[str, int] | None:
    """The formula of `method` and its value in bytes; None if its paper has none, or none with these `values`."""
    formulas = FORMULAS if known.shards == 1 else SHARDED
    if method not in formulas or any(values.get(name, usual[0]) not in usual for name, usual in COUNTED.items()):
        return None
    text, count = formulas[method]
    return text, round(count(known, values))


def _galore_states(known: Facts, rank: int) -> int:
    """Number of values: m r + 2 n r for each m x n matrix (m <= n) in the layers, two for each weight elsewhere.

    A matrix has no rank above m: there r is m.
    """
    in_layers = sum(rows * columns for rows, columns in known.matrices)
    projected = sum((min(shape) + 2 * max(shape)) * min(rank, *shape) for shape in known.matrices)
    return projected + 2 * (known.weights - in_layers)
