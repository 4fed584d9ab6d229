"""Default learning rates, one visible table, and the hyper-parameters of a method in a comparison."""

import inspect
from collections.abc import Mapping
from typing import Any

import optimizers

from .errors import UserError
from .settings import ALL_METHODS
from .values import annotations, convert

# method: (fine-tuning pretrained weights, training from random weights). Methods that aren't here use their own default.
LEARNING_RATES = {
    "adamw": (2e-5, 1e-3),
    "sgd": (1e-2, 1e-1),
    "badam": (2e-5, 1e-3),
    "blockllm": (3e-5, 1e-3),
    "lisa": (2e-5, 1e-3),
    "galore": (1e-4, 1e-2),
    "lora": (2e-4, 1e-2),
    "lomo": (3e-2, 1e-1),
    "adalomo": (5e-4, 1e-2),
    "hft": (2e-5, 1e-3),
}


def hyperparameters(
    method: str, given: Mapping[str, Mapping[str, Any]], *, learning_rate: float | None, seed: int, from_scratch: bool
) -> dict[str, Any]:
    """Every hyper-parameter of `method`: what was given over the defaults for this kind of training over the method's own.

    Raises:
        UserError: a value of the wrong type.
        ValueError: an unknown method or hyper-parameter.
    """
    known = inspect.signature(optimizers.get(method)).parameters
    chosen: dict[str, Any] = {"lr": LEARNING_RATES[method][from_scratch]} if method in LEARNING_RATES else {}
    chosen |= {"lr": learning_rate} if learning_rate is not None else {}
    chosen |= {"seed": seed} if "seed" in known else {}
    chosen |= {"train_embeddings": True} if from_scratch and "train_embeddings" in known else {}
    chosen |= {key: value for key, value in given.get(ALL_METHODS, {}).items() if key in known}
    chosen |= given.get(method, {})
    return _typed(method, optimizers.resolve(method, **chosen))


def _typed(method: str, values: dict[str, Any]) -> dict[str, Any]:
    types = annotations(optimizers.get(method))
    for key, value in values.items():
        if value is inspect.Parameter.empty:
            raise UserError(f"{method} needs a value for {key}: --set {method}.{key}=VALUE")
        try:
            values[key] = convert(value, types.get(key, Any))
        except TypeError as error:
            raise UserError(f"{method}.{key} must be {error}, not {value!r}") from error
    return values
