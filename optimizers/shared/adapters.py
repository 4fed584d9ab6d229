"""Where LoRA's adapters go, and how `peft` puts them there without a trace elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optimizers.base import has_values
from optimizers.shared.blocks import find_layers
from optimizers.shared.names import suggestion

if TYPE_CHECKING:  # peft imports transformers, which takes seconds
    from peft import LoraModel

ALL_LINEAR = "all-linear"


def find_targets(model: nn.Module, targets: str | tuple[str, ...], leave_out: Collection[nn.Parameter]) -> list[str]:
    """Names of the linear modules that match one of `targets` and hold nothing frozen and nothing of `leave_out`.

    Raises:
        ValueError: a pattern matches no linear module, or one whose weight is another module's too; or none is left.
    """
    linear = linear_modules(model)
    patterns = [part.strip() for part in targets.split(",")] if isinstance(targets, str) else targets
    chosen: dict[str, None] = {}
    for pattern in patterns:
        matched = _in_layers(model, linear) if pattern == ALL_LINEAR else _named(pattern, linear)
        if not matched:
            raise ValueError(f"targets: {pattern!r} matches no linear module. {_hint(pattern, linear)}")
        chosen |= dict.fromkeys(matched)
    names = _without(chosen, linear, leave_out)
    if not names:
        raise ValueError(f"targets {', '.join(patterns)}: all of these modules are frozen or always trained")
    _check_not_tied(model, names)
    return names


def frozen_linears(model: nn.Module, adapted: Collection[str], leave_out: Collection[nn.Parameter]) -> list[str]:
    """Names of the linear modules that a method with adapters freezes: `adapted`, and all others of the layers.

    Without those that were frozen before, which are the user's, and those of `leave_out`.
    """
    linear = linear_modules(model)
    try:
        in_layers = _in_layers(model, linear)
    except ValueError:  # a model without lists of layers
        in_layers = []
    return _without(dict.fromkeys([*adapted, *in_layers]), linear, leave_out)


def _without(names: Iterable[str], linear: dict[str, nn.Module], leave_out: Collection[nn.Parameter]) -> list[str]:
    """`names` without what is frozen and what holds something of `leave_out`."""
    left_out = set(leave_out)
    return [n for n in names if linear[n].weight.requires_grad and not left_out & set(linear[n].parameters())]


def _check_not_tied(model: nn.Module, names: Collection[str]) -> None:
    owner = {p: path for path, module in model.named_modules() for p in module.parameters(recurse=False)}
    first = {p: name.rpartition(".")[0] for name, p in model.named_parameters()}
    for name in names:
        weight: Any = model.get_submodule(name).weight
        if owner[weight] != first[weight]:
            other = first[weight] if owner[weight] == name else owner[weight]
            raise ValueError(f"targets: {name!r} is tied to {other!r}, so an adapter merged into it would change both")


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that can be adapted, by name.

    Raises:
        ValueError: some are adapted already.
    """
    from peft.tuners.lora.layer import Conv1D
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has adapters already: finish() the method that made them first")
    # nn.MultiheadAttention reads the weight of its output projection without calling it: an adapter would be ignored
    read_only = {module.out_proj for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    modules = ((name, module) for name, module in model.named_modules() if module not in read_only)
    return {name: module for name, module in modules if isinstance(module, nn.Linear | Conv1D)}


def _named(pattern: str, names: Collection[str]) -> list[str]:
    return [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")]


def _in_layers(model: nn.Module, names: Collection[str]) -> list[str]:
    try:
        layers = tuple(f"{layer}." for layer in find_layers(model))
    except ValueError as error:
        raise ValueError(f"targets: {ALL_LINEAR!r}: {error}, or name the modules to adapt") from error
    return [name for name in names if f"{name}.".startswith(layers)]


def _hint(pattern: str, linear: Collection[str]) -> str:
    known = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    return suggestion(pattern, known, unlisted=(ALL_LINEAR,))


def inject(model: nn.Module, names: list[str], settings: dict[str, Any], seed: int) -> LoraModel:
    """Adapt the modules `names` of `model` in place; everything else is frozen."""
    from peft import LoraConfig, LoraModel
    from peft.tuners.lora.layer import Conv1D

    # a regular expression, since peft takes a name for an ending, which may fit other modules too
    config = LoraConfig(target_modules="|".join(map(re.escape, names)), **settings)
    config.fan_in_fan_out = isinstance(model.get_submodule(names[0]), Conv1D)  # peft finds out itself, but warns
    like = next(model.parameters())
    with _seeded(seed, like), _conversion_of_fake_tensors(like):
        return LoraModel(model, config, "default")


@contextmanager
def _seeded(seed: int, like: Tensor) -> Iterator[None]:
    """Seed the generators of the CPU and of the device of `like`, and put them back at the end."""
    devices = [like.device.index] if like.is_cuda and has_values(like) else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        yield


@contextmanager
def _conversion_of_fake_tensors(like: Tensor) -> Iterator[None]:
    """Let `module.to()`, which peft calls, work on fake tensors: torch swaps them, which fails at a weak reference."""
    original = nn.Module._apply
    if not has_values(like):
        nn.Module._apply = _apply_to_parameters  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = original  # type: ignore[method-assign]


def _apply_to_parameters(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`, with new parameters in place of swapped ones."""
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            part.register_parameter(name, nn.Parameter(fn(p.detach()), p.requires_grad))
    return module
