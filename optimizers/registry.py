"""Methods by name: ours, those of installed packages, a user's own `package.module:Class`, and configurations of them.

`badam:switch_every=50` is a method like any other: BAdam with another default, so that the two can be compared.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import torch
from torch import nn

from optimizers.base import MemoryEfficientOptimizer
from optimizers.shared.names import suggestion
from optimizers.stock import wrap

Method = type[MemoryEfficientOptimizer]

_METHODS: dict[str, Method] = {}
ENTRY_POINTS = "membench.optimizers"
PLUGGED_IN: set[str] = set()  # modules of methods from outside


def register(name: str) -> Callable[[Method], Method]:
    """Class decorator: register a method as `name`."""

    def add(method: Method) -> Method:
        _METHODS[name] = method
        return method

    return add


def available() -> list[str]:
    """The names of all registered methods: ours in the order of the package, then those of installed packages."""
    return list(dict.fromkeys([*_METHODS, *(point.name for point in entry_points(group=ENTRY_POINTS))]))


def expand(names: Iterable[str]) -> list[str]:
    """The methods that these name, each once; "all" names all that are registered."""
    return list(dict.fromkeys(one for name in names for one in (available() if name == "all" else [name])))


def get(name: str) -> Method:
    """The class behind `name`: a registered one, `package.module:Class` (any torch optimizer, see `optimizers.stock`),
    or either with other defaults, `NAME:KEY=VALUE:KEY=VALUE`.

    Raises:
        ValueError: there is none; the message gives the nearest name and the list.
    """
    base, values = split(name)
    return _configured(name) if values else _find(base)


def split(name: str) -> tuple[str, dict[str, Any]]:
    """`lora:rank=16` as "lora" and {"rank": 16}: the method's own name, and the defaults that are changed.

    Raises:
        ValueError: one is changed twice.
    """
    parts = name.split(":")
    first = next((number for number, part in enumerate(parts) if "=" in part), len(parts))
    pairs = [part.partition("=")[::2] for part in parts[first:]]
    values = {key.strip(): _value(text) for key, text in pairs}
    if len(values) < len(pairs):
        raise ValueError(f"method {name!r} gives a hyper-parameter twice")
    return ":".join(parts[:first]), values


def _value(text: str) -> Any:
    """A value as on the command line: 50, 1e-5, true, none; anything else is a string."""
    constants = {"true": True, "false": False, "none": None}
    if text.strip().lower() in constants:
        return constants[text.strip().lower()]
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # the last two of brackets without end
        return text


@functools.cache
def _configured(name: str) -> Method:
    """A subclass with the defaults given in the name."""
    base, values = split(name)
    method = get(base)
    resolve(base, **values)  # refuses unknown hyper-parameters
    signature = inspect.signature(method)
    changed = [p.replace(default=values[p.name]) if p.name in values else p for p in signature.parameters.values()]
    ordered = sorted(changed, key=lambda p: (p.kind, p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty))

    def __init__(self: Any, model: nn.Module, *arguments: Any, **given: Any) -> None:
        bound = signature.bind_partial(model, *arguments, **given).arguments
        changed = {key: value for key, value in values.items() if key not in bound}
        method.__init__(self, model, *arguments, **changed, **given)  # type: ignore[misc]

    said = {"__init__": __init__, "__signature__": signature.replace(parameters=ordered), "__doc__": method.__doc__}
    return type(method.__name__, (method,), said)


def _find(name: str) -> Method:
    if name in _METHODS:
        return _METHODS[name]
    if ":" in name:
        return _checked(name, _import(name))
    for point in entry_points(group=ENTRY_POINTS):
        if point.name == name:
            return _checked(name, _load(point))
    raise ValueError(f"unknown method {name!r}. {suggestion(name, available())}")


def name_of(method: type) -> str | None:
    """The name under which a class is registered, if it is."""
    return next((name for name, known in _METHODS.items() if known is method), None)


def module_of(name: str) -> str | None:
    """The module of a method from outside: a user's own, or an installed package's; None of ours."""
    base, _ = split(name)
    if base in _METHODS:
        return None
    if ":" in base:
        return base.partition(":")[0]
    return next((point.module for point in entry_points(group=ENTRY_POINTS) if point.name == base), None)


def resolve(name: str, **given: Any) -> dict[str, Any]:
    """All hyper-parameters of a method, with the defaults filled in.

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
        ValueError: the method or a keyword is unknown, or the method refuses a value.
    """
    return get(name)(model, **resolve(name, **given))  # type: ignore[arg-type]


def in_use(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters that identify a run: `values` without later additions that are at their defaults."""
    method = get(split(name)[0])
    defaults = {key: parameter.default for key, parameter in inspect.signature(method).parameters.items()}
    unused = {key for key in method.added_later if key in defaults and values.get(key) == defaults[key]}
    return {key: value for key, value in values.items() if key not in unused}


def _import(path: str) -> Any:
    module_name, _, attribute = path.partition(":")
    _look_in_current_folder()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"method {path!r}: {error}; it must be importable from this folder or installed") from error
    except (Exception, SystemExit) as error:  # whatever a user's module does
        raise ValueError(f"method {path!r}: importing {module_name} fails: {type(error).__name__}: {error}") from error
    if attribute not in vars(module):
        raise ValueError(f"method {path!r}: {module_name} has no {attribute!r}")
    PLUGGED_IN.add(module_name)
    return vars(module)[attribute]


def _look_in_current_folder() -> None:
    """For a user's own module, which is wanted: the command line looks nowhere in that folder before. Last, so that
    none of its modules shadows another."""
    with contextlib.suppress(FileNotFoundError):  # somebody has deleted it
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.append(os.getcwd())


def _load(point: EntryPoint) -> Any:
    PLUGGED_IN.add(point.module)
    try:
        return point.load()
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"method {point.name!r} of an installed package can't be loaded: {type(error).__name__}: {error}"
        ) from error


def _checked(name: str, method: Any) -> Method:
    if isinstance(method, type) and issubclass(method, MemoryEfficientOptimizer):
        return method
    if isinstance(method, type) and issubclass(method, torch.optim.Optimizer):
        return wrap(name, method)  # type: ignore[arg-type]
    raise ValueError(
        f"method {name!r} must be a subclass of optimizers.MemoryEfficientOptimizer or of torch.optim.Optimizer, "
        f"not {method!r}"
    )
