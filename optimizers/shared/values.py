"""Checks that hyper-parameters are in range; each error is one sentence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

NAMES = ("always_train", "targets")  # hyper-parameters that name parts of a model


def check_hyperparameters(given: dict[str, Any]) -> None:
    """Refuse a value that is out of range.

    Raises:
        ValueError: names the hyper-parameter, its value and what it must be.
    """
    betas = given.get("betas", (0.0, 0.0))
    if not (is_pair(betas) and all(holds(lambda beta: 0.0 <= beta < 1.0, beta) for beta in betas)):
        raise ValueError(f"betas must be two numbers of at least 0 and below 1, not {betas!r}")
    for name in ("lr", "weight_decay", "eps"):
        values = given.get(name, 0.0)
        several = isinstance(values, tuple)  # of which one may be None, as in torch's Adafactor
        for value in [v for v in values if v is not None] if several else [values]:
            if not holds(lambda number: 0.0 <= number < float("inf"), value):
                raise ValueError(f"{name} must be a finite number of at least 0, not {value!r}")


def check_kinds(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse flags, seeds and names of parameters that are something else: any text is true, "false" as well.

    Raises:
        ValueError: names the hyper-parameter and its value.
    """
    for name, value in given.items():
        default, value = defaults.get(name), plain(value)
        if isinstance(default, bool) and not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, not {value!r}")
        if name == "seed" and (not isinstance(value, int) or isinstance(value, bool)):
            raise ValueError(f"{name} must be a whole number, not {value!r}")
        if name in NAMES and not (isinstance(value, str) or _are_texts(value)):
            raise ValueError(f"{name} must be name patterns (a text or several), not {value!r}")


def _are_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)


def is_pair(value: Any) -> bool:
    """Is it a list or tuple of two?"""
    return isinstance(value, list | tuple) and len(value) == 2


def holds(test: Callable[[Any], Any], value: Any) -> bool:
    """Does a test hold of a value? Not of what can't be compared with numbers: texts, as YAML reads 1e-4, or None."""
    try:
        return bool(test(value))
    except (TypeError, ValueError, RuntimeError):
        return False


def plain(value: Any) -> Any:
    """Numbers and arrays of numpy as Python's, also within lists and dicts: torch.load(weights_only=True) reads no
    others, so a checkpoint with one in it couldn't be resumed."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [*map(plain, value)] if isinstance(value, list) else tuple(map(plain, value))
    return value.tolist() if type(value).__module__ == "numpy" else value


def check_count(name: str, value: int | None, *, optional: bool = False) -> None:
    """Refuse a count (of steps, blocks, ranks) that isn't a positive whole number.

    Raises:
        ValueError: names the hyper-parameter and its value.
    """
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")


def check_positive(name: str, value: float | None, *, optional: bool = False) -> None:
    """Refuse a quantity (a threshold, a scale) that isn't a finite number above 0.

    Raises:
        ValueError: names the hyper-parameter and its value.
    """
    if optional and value is None:
        return
    if not holds(lambda number: 0.0 < number < float("inf"), value):
        raise ValueError(f"{name} must be a finite number above 0, not {value!r}")


def check_share(name: str, value: float) -> None:
    """Refuse a share or a decay rate that isn't at least 0 and below 1.

    Raises:
        ValueError: names the hyper-parameter and its value.
    """
    if not holds(lambda number: 0.0 <= number < 1.0, value):
        raise ValueError(f"{name} must be at least 0 and below 1, not {value!r}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a word that isn't one of `choices`.

    Raises:
        ValueError: names the hyper-parameter, its value and the choices.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def check_indices(name: str, indices: list[int], count: int) -> None:
    """Refuse indices in a saved state that aren't whole numbers below `count`.

    Raises:
        ValueError: names the entry and what is in it.
    """
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < count for i in indices):
        raise ValueError(f"this state is damaged: {name} must be whole numbers below {count}, not {indices}")
