"""Methods by name: ours, those of installed packages, and a user's own `package.module:Class`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

from torch import nn

from optimizers.base import MemoryEfficientOptimizer
from optimizers.shared.names import suggestion

Method = type[MemoryEfficientOptimizer]

_METHODS: dict[str, Method] = {}
ENTRY_POINTS = "membench.optimizers"


def register(name: str) -> Callable[[Method], Method]:
    """Class decorator: make a method known as `name`."""

    def add(method: Method) -> Method:
        _METHODS[name] = method
        return method

    return add


def available() -> list[str]:
    """The names of all registered methods: ours in the order of the package, then those of installed packages."""
    return list(dict.fromkeys([*_METHODS, *(point.name for point in entry_points(group=ENTRY_POINTS))]))


def get(name: str) -> Method:
    """The class behind `name`, a registered one or `package.module:Class`.

    Raises:
        ValueError: there is none; the message has the nearest name and the list.
    """
    if name in _METHODS:
        return _METHODS[name]
    if ":" in name:
        return _checked(name, _import(name))
    for point in entry_points(group=ENTRY_POINTS):
        if point.name == name:
            return _checked(name, point.load())
    raise ValueError(f"unknown method {name!r}. {suggestion(name, available())}")


def resolve(name: str, **given: Any) -> dict[str, Any]:
    """All hyper-parameters of a method, the defaults filled in.

    Raises:
        ValueError: the method or a keyword is unknown.
    """
    parameters = inspect.signature(get(name)).parameters
    known = [key for key in list(parameters)[1:] if parameters[key].kind is not inspect.Parameter.VAR_KEYWORD]
    for key in given:
        if key not in known:
            raise ValueError(f"{name} has no hyper-parameter {key!r}. {suggestion(key, known)}")
    return {key: given.get(key, parameters[key].default) for key in known}


def create(name: str, model: nn.Module, **given: Any) -> MemoryEfficientOptimizer:
    """Build the method `name` on `model`.

    Raises:
        ValueError: the method or a keyword is unknown, or a value is refused by the method.
    """
    return get(name)(model, **resolve(name, **given))  # type: ignore[arg-type]


def in_use(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters that make a run what it is: `values` without later additions that are at their defaults."""
    method = get(name)
    defaults = {key: parameter.default for key, parameter in inspect.signature(method).parameters.items()}
    unused = {key for key in method.added_later if values.get(key) == defaults[key]}
    return {key: value for key, value in values.items() if key not in unused}


def _import(path: str) -> Any:
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"method {path!r}: {error}; it must be importable from this folder or installed") from error
    if attribute not in vars(module):
        raise ValueError(f"method {path!r}: {module_name} has no {attribute!r}")
    return vars(module)[attribute]


def _checked(name: str, method: Any) -> Method:
    if not (isinstance(method, type) and issubclass(method, MemoryEfficientOptimizer)):
        raise ValueError(f"method {name!r} must be a subclass of optimizers.MemoryEfficientOptimizer, not {method!r}")
    return method
