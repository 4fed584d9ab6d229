"""Shared by the block methods: how a model is split into blocks, and how all but some parameters are frozen."""

from __future__ import annotations

import functools
import random
import warnings
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

Blocks = dict[str, list[nn.Parameter]]

GRANULARITIES = ("layer", "sublayer", "matrix")


def split_into_blocks(
    model: nn.Module, granularity: str = "layer", *, embeddings: bool = False, leave_out: Collection[nn.Parameter] = ()
) -> Blocks:
    """The blocks of a model, in the order of its modules: name -> parameters that require gradients.

    Each is in one block: what several layers share is in that of the first. The layers are the members of the model's
    outermost `nn.ModuleList`s (of its `nn.Sequential`s, if it has no list); see `find_layers`.

    Args:
        model: any model with its layers in lists.
        granularity: "layer"; "sublayer": a layer's attention and the rest of it (half-layers); "matrix": each module
            of a layer that has a matrix, with its bias; norms go with the module before them.
        embeddings: also make a block of what comes before the first layer (embeddings), and one of what comes after
            the last (final norm, head).
        leave_out: parameters that belong to no block.

    Raises:
        ValueError: the model has no list of layers, or nothing in them is left to train.
    """
    warn_of_layers_elsewhere(model)
    layers = find_layers(model)
    blocks: Blocks = {}
    for name, layer in layers.items():
        blocks |= {f"{name}{suffix}": params for suffix, params in _split_layer(layer, granularity).items()}
    if embeddings:
        before, after = outside_layers(model)
        blocks = {"embeddings": before, **blocks, "head": after}
    taken = {*leave_out, *(p for p in model.parameters() if not p.requires_grad)}
    for name, params in blocks.items():
        blocks[name] = [p for p in dict.fromkeys(params) if p not in taken]
        taken.update(params)
    return without(blocks, ())


def without(blocks: Blocks, left_out: Collection[nn.Parameter]) -> Blocks:
    """The blocks without these parameters; blocks that become empty are dropped.

    Raises:
        ValueError: no block is left.
    """
    gone = set(left_out)
    kept = {name: [p for p in params if p not in gone] for name, params in blocks.items()}
    kept = {name: params for name, params in kept.items() if params}
    if not kept:
        raise ValueError("no block has anything to train: all parameters of the layers are frozen or always trained")
    return kept


def find_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The members of the model's outermost lists of layers, by their full names.

    A list of single modules isn't of layers beside one whose members have parts: Gemma 3n's `altup_projections`, heads.

    Raises:
        ValueError: there is no `nn.ModuleList` and no `nn.Sequential`.
    """
    listed = _members(model, nn.ModuleList, "")
    of_parts = {name.rpartition(".")[0] for name, member in listed.items() if any(True for _ in member.children())}
    layers = {name: member for name, member in listed.items() if name.rpartition(".")[0] in of_parts}
    found = layers or listed or _members(model, nn.Sequential, "")
    if found:
        return found
    raise ValueError(
        f"{type(model).__name__} has no layers to make blocks of: put them in an nn.ModuleList (or an nn.Sequential)"
    )


def _members(module: nn.Module, container: type[nn.Module], prefix: str) -> dict[str, nn.Module]:
    """The members with parameters of the outermost containers at or below `module`."""
    found: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(module, container) and not isinstance(module, ParametrizationList):  # one of a weight's parts
            found |= {path: child} if any(True for _ in child.parameters()) else {}
        else:
            found |= _members(child, container, path)
    return found


def warn_of_layers_elsewhere(model: nn.Module) -> None:
    """Say it if more trainable weights are in other lists, or in `nn.Sequential`s, than in those of the layers: these
    may be the layers that are meant, but count as what comes before, between or after layers."""
    layers = find_layers(model)
    inside = {p for layer in layers.values() for p in layer.parameters()}
    for container in (nn.ModuleList, nn.Sequential):
        elsewhere = {n: m for n, m in _members(model, container, "").items() if inside.isdisjoint(m.parameters())}
        count, others = (
            sum(p.numel() for p in params if p.requires_grad)
            for params in (inside, {p for module in elsewhere.values() for p in module.parameters()})
        )
        if others > count:
            warnings.warn(
                f"of {type(model).__name__} only {next(iter(layers))} and the like ({count:,} weights) are "
                f"treated as layers; {next(iter(elsewhere))} and what else is in an nn.{container.__name__} "
                f"({others:,} weights) aren't: put the layers, and nothing else, into an nn.ModuleList",
                stacklevel=2,
            )


def outside_layers(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters defined before the first layer, and those between and after layers, in the model's order.

    Raises:
        ValueError: the model has no list of layers.
    """
    inside = {p for layer in find_layers(model).values() for p in layer.parameters()}
    before: list[nn.Parameter] = []
    after: list[nn.Parameter] = []
    reached = False
    for p in model.parameters():
        reached = reached or p in inside
        if p not in inside:
            (after if reached else before).append(p)
    return before, after


def _split_layer(layer: nn.Module, granularity: str) -> Blocks:
    parts = {"layer": {}, "sublayer": _halves(layer), "matrix": _matrices(layer)}[granularity]
    if not parts:
        return {"": list(layer.parameters())}
    split: Blocks = {}
    taken: set[nn.Parameter] = set()
    for name, params in parts.items():
        split[f".{name}"] = [p for p in params if p not in taken]
        taken.update(params)
    # what is in no part (a parameter of the layer itself) goes with the last one
    split[f".{list(parts)[-1]}"] += [p for p in layer.parameters() if p not in taken]
    return split


def _halves(layer: nn.Module) -> Blocks:
    """Attention and the rest. Norms beside them are divided up in order, the first half going to the attention."""
    # the parts of a T5 layer are in a list; dropouts and activations are no norms
    listed = [list(child) if isinstance(child, nn.ModuleList) else [child] for child in layer.children()]
    children = [child for some in listed for child in some if any(True for _ in child.parameters())]
    norms = [child for child in children if all(p.dim() < 2 for p in child.parameters())]
    first_norms = norms[: (len(norms) + 1) // 2]
    halves: Blocks = {"attention": [], "mlp": []}
    for child in children:
        attends = any("attention" in type(module).__name__.lower() for module in child.modules())
        halves["attention" if attends or child in first_norms else "mlp"] += child.parameters()
    return {name: params for name, params in halves.items() if params}


def _matrices(layer: nn.Module) -> Blocks:
    """One block per module that holds a matrix; a module without one joins the block before it, or the first."""
    blocks: Blocks = {}
    waiting: list[nn.Parameter] = []
    for name, module in layer.named_modules():
        params = list(module.parameters(recurse=False))
        if any(p.dim() >= 2 for p in params):
            blocks[name] = waiting + params
            waiting = []
        elif blocks:
            blocks[list(blocks)[-1]] += params
        else:
            waiting += params
    return blocks


def matching(model: nn.Module, patterns: str | Iterable[str]) -> list[nn.Parameter]:
    """The trainable parameters whose name, or the name of a module above them, matches one of `patterns`.

    They may also be one text, separated by commas.

    "classifier" matches `classifier.dense.weight`; "*.LayerNorm" every norm of that name ("*" matches dots too).

    Raises:
        ValueError: a pattern matches no parameter that requires gradients.
    """
    found: dict[nn.Parameter, None] = {}
    for pattern in [part.strip() for part in patterns.split(",")] if isinstance(patterns, str) else patterns:
        named = model.named_parameters(remove_duplicate=False)  # a tied head is known by its own name, too
        matched = [p for name, p in named if p.requires_grad and _matches(name, pattern)]
        if not matched:
            raise ValueError(
                f"always_train: {pattern!r} matches no trainable parameter of {type(model).__name__}; "
                f"its parts are {', '.join(name for name, _ in model.named_children())}"
            )
        found |= dict.fromkeys(matched)
    return list(found)


def _matches(name: str, pattern: str) -> bool:
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def train_only(params: Iterable[nn.Parameter], active: Collection[nn.Parameter]) -> None:
    """Let exactly `active` of `params` require gradients; the others lose their gradients."""
    wanted = set(active)
    for p in params:
        p.requires_grad_(p in wanted)
        if p not in wanted:
            p.grad = None


@functools.lru_cache(maxsize=16)
def shuffled(count: int, *key: int) -> tuple[int, ...]:
    """The numbers below `count`, in an order that depends on `key` alone, not on the device or library version."""
    order = list(range(count))
    random.Random("/".join(map(str, key))).shuffle(order)
    return tuple(order)
