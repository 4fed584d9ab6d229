"""What `load_state_dict` checks before it changes anything."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optimizers.shared.values import check_hyperparameters

if TYPE_CHECKING:
    from optimizers.base import MemoryEfficientOptimizer

HOW_TO_SAVE = (
    "with torch.distributed.checkpoint save optimizer.state_dict(), and read it back with "
    "format_utils.dcp_to_torch_save and torch.load (in the Trainer use membench.MethodTrainer)"
)


State = dict[int, dict[str, Any]]  # what is kept for each parameter, by its number


def adapted(optimizer: MemoryEfficientOptimizer, state_dict: Any) -> Any:
    """A saved state as the user's hooks want it to be loaded: other names, say; they get a copy, as in torch."""
    hooks = optimizer._optimizer_load_state_dict_pre_hooks
    state_dict = copy.copy(state_dict) if hooks else state_dict
    for hook in hooks.values():
        changed = hook(optimizer, state_dict)
        state_dict = state_dict if changed is None else changed
    return state_dict


def parts(optimizer: MemoryEfficientOptimizer, state_dict: Any) -> tuple[dict[str, Any], list[dict[str, Any]], State]:
    """A saved state in three parts: the method's own JSON, the groups, what is kept for each parameter.

    Raises:
        ValueError: it is incomplete, or belongs to another method or another model.
    """
    extra = _extra_of(state_dict, type(optimizer).__name__)
    own = optimizer.param_groups
    _check_groups(state_dict["param_groups"], own, [key for key in optimizer.defaults if key in own[0]])
    counted = {"steps_done": 0} if "steps_done" in extra else {}
    _check_extra(extra, {**optimizer.extra_state(), **counted})
    state = _by_number(state_dict.get("state"), _keys(state_dict["param_groups"]), _names(optimizer))
    _check_count(state, extra.get("tensors"))
    groups = [{key: value for key, value in group.items() if key != "extra"} for group in state_dict["param_groups"]]
    return extra, groups, state


def check_entries(optimizer: MemoryEfficientOptimizer, state: State) -> None:
    """Refuse a parameter's saved state unless it has the names, shapes and dtypes that the method expects.

    Raises:
        ValueError: names the parameter, the entry and what it should be.
    """
    params, names = [p for group in optimizer.param_groups for p in group["params"]], _names(optimizer)
    for number, saved in state.items():
        if saved:
            _check_entry(names[number], saved, optimizer.expected_state(params[number], saved))


def check_same_settings(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse a state that was saved with other settings than a method's own, by name.

    Raises:
        ValueError: names the first that differs, and both values.
    """
    for name, value in own.items():
        if saved.get(name) != value:
            raise ValueError(f"this state was saved with {name}={saved.get(name)!r}, not {value!r}")


def _names(optimizer: MemoryEfficientOptimizer) -> list[str]:
    return [name for group in optimizer.param_groups for name in group["param_names"]]


def _extra_of(state_dict: Any, method: str) -> dict[str, Any]:
    """The method's own part of a saved state.

    Raises:
        ValueError: it isn't a state of this method.
    """
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"a state is the dict that {method}.state_dict() returned, not a {type(state_dict).__name__}")
    groups = state_dict.get("param_groups")
    if not isinstance(groups, list) or not groups or not all(isinstance(group, Mapping) for group in groups):
        raise ValueError(f"this state has no param_groups: it isn't one that {method}.state_dict() returned")
    extra = state_dict.get("extra", groups[0].get("extra"))
    if not isinstance(extra, Mapping) or extra.get("method") != method:
        saved_by = extra.get("method") if isinstance(extra, Mapping) else None
        raise ValueError(f"this state was saved by {saved_by or 'another optimizer'}, not by {method}")
    return dict(extra)


def _check_groups(saved: list[Mapping[str, Any]], own: list[dict[str, Any]], hyperparameters: Iterable[str]) -> None:
    """Refuse param groups that belong to another model, or lack one of the `hyperparameters`.

    Raises:
        ValueError: names what differs.
    """
    if [group.get("param_names") for group in saved] != [group["param_names"] for group in own]:
        raise ValueError("this state belongs to a model with other parameters: their names differ")
    for number, (there, here) in enumerate(zip(saved, own, strict=True)):
        if not isinstance(there.get("params"), list) or len(there["params"]) != len(here["params"]):
            raise ValueError(f"param_groups[{number}] of this state doesn't list its {len(here['params'])} parameters")
        for key in hyperparameters:
            if key not in there:
                raise ValueError(f"param_groups[{number}] of this state has no {key}")
            if not _fits(there[key], here[key], float):
                raise ValueError(f"param_groups[{number}] of this state has {key}={there[key]!r}, unlike {here[key]!r}")
        try:
            check_hyperparameters({key: there[key] for key in hyperparameters})
        except ValueError as error:
            raise ValueError(f"param_groups[{number}] of this state: {error}") from error


def _check_extra(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse a method's own JSON if an entry is missing or has another type.

    Raises:
        ValueError: names the entry.
    """
    for key, value in own.items():
        if key not in saved and value is not None:
            raise ValueError(f"this state is damaged: extra has no {key!r}")
        if not _fits(saved.get(key), value, int):
            raise ValueError(f"this state is damaged: extra has {key}={saved[key]!r}, unlike {value!r}")


def _keys(groups: list[Mapping[str, Any]]) -> list[Any]:
    """Under which key the state of each parameter is saved: as torch has it, the entries of `params`, in order.

    Raises:
        ValueError: two parameters have the same one.
    """
    keys = [key for group in groups for key in group["params"]]
    if not all(isinstance(key, int | str) for key in keys) or len(set(keys)) < len(keys):
        raise ValueError("this state is damaged: the params of its param_groups must be different numbers or names")
    return keys


def _by_number(state: Any, keys: list[Any], names: list[str]) -> State:
    """The saved state of each parameter by number. torch.distributed.checkpoint makes a string or name of its key.

    Raises:
        ValueError: it isn't such a state.
    """
    if not isinstance(state, Mapping):
        raise ValueError(
            "this state has no 'state', what is kept for each parameter (torch.distributed.checkpoint drops it "
            "if it is empty: put {} there)"
        )
    numbers = {key: number for number, key in [*enumerate(names), *enumerate(map(str, keys)), *enumerate(keys)]}
    found: State = {}
    for key, saved in state.items():
        number = None if isinstance(key, bool) else numbers.get(key)
        if number is None:
            raise ValueError(f"this state has an entry for parameter {key!r}, which the model doesn't have")
        if not isinstance(saved, Mapping):
            raise ValueError(f"what this state keeps for {names[number]} is a {type(saved).__name__}, not a dict")
        found[number] = dict(saved)
    return found


def _check_count(state: State, tensors: int | None) -> None:
    """Refuse a state without some of its `tensors`.

    Raises:
        ValueError: says how many are there.
    """
    count = count_tensors(state)
    if tensors is not None and tensors != count:
        raise ValueError(f"this state holds {count} of the {tensors} tensors that were saved: {HOW_TO_SAVE}")


def count_tensors(state: Mapping[Any, Mapping[str, Any]]) -> int:
    """How many tensors a state has."""
    return sum(torch.is_tensor(value) for saved in state.values() for value in saved.values())


def _check_entry(name: str, saved: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    if saved.keys() != expected.keys():
        there, here = (", ".join(sorted(map(str, keys))) or "nothing" for keys in (saved, expected))
        raise ValueError(f"this state doesn't fit: it keeps {there} for {name}, where this optimizer keeps {here}")
    for key, value in expected.items():
        if _described(saved[key]) != _described(value):
            raise ValueError(
                f"this state doesn't fit: {key} of {name} is {_described(saved[key])}, and must be {_described(value)}"
            )


def example(value: Any, p: Tensor) -> Any:
    """What `value` would be for `p`, if it has one entry for each weight, or is a scalar."""
    if not torch.is_tensor(value):
        return value
    known = not value.is_floating_point() or value.dtype in (p.dtype, torch.float32)
    return torch.empty(p.shape if value.dim() else (), dtype=value.dtype if known else p.dtype, device="meta")


def _described(value: Any) -> str:
    if torch.is_tensor(value):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    return type(value).__name__


def _fits(value: Any, own: Any, number: type) -> bool:
    """Could `value` replace `own`? With `number` int, only a whole number can replace a whole number."""
    if own is None or value is None:
        return True
    if isinstance(own, list | tuple):
        return isinstance(value, list | tuple) and (number is int or len(value) == len(own))
    if isinstance(own, bool) or not isinstance(own, int | float | Tensor):
        return isinstance(value, type(own))
    whole = number is int and isinstance(own, int)
    return isinstance(value, int if whole else int | float | Tensor) and not isinstance(value, bool)
